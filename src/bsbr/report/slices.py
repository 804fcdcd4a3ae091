"""Tables of the quality figures: per slice, by position and by layer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bsbr.report.cells import Cell, Table, evidence, head, place_text, reference_or, row_cell
from bsbr.report.metrics import EXPOSURE, capital, is_detail, order
from bsbr.report.names import AGREEMENT, NOISE, PERPLEXITY, variant
from bsbr.report.results import Results, Row, preference


def by_place(results: Results, section: str, keys: tuple[str, ...]) -> list[Table]:
    """Build one table per slice, metrics down and variants across; the slice to quote first, the rest minor.

    Args:
        results: a results folder.
        section: the result file.
        keys: keys of the slice that tell tables apart.
    Returns:
        The tables.
    """
    places: dict[tuple, list[Row]] = {}
    for row in results.rows(section):
        if row.metric not in EXPOSURE:
            places.setdefault(tuple(str(row.slice.get(key)) for key in keys), []).append(row)
    ordered = sorted(places.values(), key=lambda group: _place_key(group[0]))
    built = []
    for number, group in enumerate(ordered):
        first = ordered[0][0].slice.get("bucket")
        in_view = _major(group[0]) and (section == PERPLEXITY or group[0].slice.get("bucket") == first)
        where = {key: group[0].slice[key] for key in keys if key in group[0].slice}
        title = capital(place_text(where) or "all")
        for detail in (False, True):
            part = [row for row in group if is_detail(row.metric) == detail]
            words = f"{title}: more statistics" if detail else title
            minor = detail or (number > 0 and not in_view)
            built += _measures(results, section, part, words, where, minor)
    return built


def _measures(
    results: Results, section: str, rows: Sequence[Row], title: str, where: Mapping[str, Any], minor: bool
) -> list[Table]:
    """One slice: metrics down, variants across."""
    kinds = [kind for kind in results.variants(section) if any(row.variant == kind for row in rows)]
    known = {(row.metric, row.variant): row for row in reversed(rows)}
    body = []
    for name in sorted({row.metric for row in rows if row.variant in kinds}, key=order):
        cells = (reference_or(known.get((name, kind)), results, section, name, kind, where) for kind in kinds)
        body.append((Cell(head(name), state="name"), *cells))
    heads = ("measure", *(variant(kind).label for kind in kinds))
    return [Table(title, heads, tuple(body), evidence(rows), minor)] if body else []


def noise_table(results: Results) -> list[Table]:
    """Build the table of the original against itself.

    Args:
        results: a results folder.
    Returns:
        One table, or none if that was not measured.
    """
    rows = [row for row in results.rows(AGREEMENT) if row.variant in NOISE]
    names = sorted({row.metric for row in rows}, key=order)
    body = []
    for kind, meaning in NOISE.items():
        mine = {row.metric: row for row in sorted(rows, key=preference, reverse=True) if row.variant == kind}
        if mine:
            body.append((Cell(meaning, state="name"), *(row_cell(mine.get(name)) for name in names)))
    note = "Nothing nearer to the original than this is a difference."
    return [Table("Noise floor", ("", *map(head, names)), tuple(body), note)] if body else []


def _across(results: Results, section: str, name: str, key: str, where: Mapping[str, Any]) -> list[Table]:
    """One metric, variants down and the values of one slice key across."""
    rows = results.rows(section, name, None, where)
    places = {str(row.slice[key]): row for row in rows if key in row.slice}
    columns = sorted(places.values(), key=lambda row: (row.slice.get("layer") == "last", _place_key(row)))
    if len(columns) < 2:
        return []
    wanted = [column.slice[key] for column in columns]
    body = []
    for kind in results.variants(section, name):
        mine = {str(row.slice.get(key)): row for row in rows if row.variant == kind}
        body.append((Cell(variant(kind).label, state="name"), *(row_cell(mine.get(str(place))) for place in wanted)))
    heads = ("model", *(place_text({key: place}) for place in wanted))
    around = place_text({**columns[0].slice, **where}, skip=(key,))
    by = {"bucket": "by position", "layer": "by layer"}[key]
    return [
        Table(
            f"{capital(head(name))} {by}{f' ({around})' if around else ''}",
            heads,
            tuple(body),
            evidence(rows),
        )
    ]


def profiles(results: Results, section: str, names: Sequence[str], key: str) -> list[Table]:
    """Build tables of one metric each, variants down and the values of one slice key across.

    Args:
        results: a results folder.
        section, names: the result file and its metrics.
        key: "bucket" or "layer".
    Returns:
        One table for every metric and every other setting of the slice that was measured.
    """
    built = []
    for name in names:
        rows = [row for row in results.rows(section, name) if key in row.slice]
        others = {json.dumps(rest, sort_keys=True, default=str): rest for row in rows if (rest := _without(row, key))}
        for _, where in sorted(others.items(), key=lambda item: _place_key(replace(rows[0], slice=item[1]))):
            built += _across(results, section, name, key, where)
        if rows and not others:
            built += _across(results, section, name, key, {})
    return built


def _without(row: Row, key: str) -> dict[str, Any]:
    return {name: value for name, value in row.slice.items() if name != key}


def _major(row: Row) -> bool:
    """Beside the first slice, these stay in view: the other texts, all positions, random tokens."""
    bucket_shown = row.slice.get("bucket") in (None, "all", "exposed")
    return bucket_shown and row.slice.get("layer") in (None, "last")


def _place_key(row: Row) -> tuple:
    layer, bucket = row.slice.get("layer"), str(row.slice.get("bucket") or "")
    start = bucket.split("-")[0]
    number = int(start) if start.isdigit() else -1
    kind = 0 if bucket in ("", "all", "exposed") else 1 if number >= 0 else 2
    depth = layer if isinstance(layer, int) else -1
    return (not _major(row), kind, *preference(row)[:4], number, depth, *preference(row)[4:])
