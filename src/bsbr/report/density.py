"""The sweep in tables and in a sentence: quality of each method at each point of density."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bsbr.report.cells import Cell, Table, evidence, head, place_text, row_cell
from bsbr.report.metrics import capital, metric
from bsbr.report.names import SWEEP, SWEEP_VARIANTS, variant
from bsbr.report.results import Results, Row
from bsbr.report.wording import count_text, join_words, value_text

QUALITY = ("kl", "top1_agreement", "ppl_ratio")
_TIMES = ("time_s", "speedup")


@dataclass(frozen=True)
class Panel:
    """The windows of one length of one text, with everything measured there."""

    text: str
    length: int
    main: str
    """The positions of the main figures, as a bucket."""
    buckets: tuple[str, ...]
    """The doubling ranges of positions, in order."""
    points: tuple[tuple[int, int], ...]
    """(unit, top_k), by tokens retrieved, then by unit."""

    @property
    def title(self) -> str:
        """The panel in words."""
        words = place_text({"text": self.text}) + f", windows of {count_text(self.length)} tokens"
        return capital(f"{words}, positions {self.main}")

    def where(self, point: tuple[int, int]) -> dict[str, Any]:
        """The part of a slice that names a point of this length."""
        return {"length": self.length, "retrieval_block_size": point[0], "top_k": point[1]}

    def row(self, results: Results, name: str, kind: str, point: tuple[int, int], bucket: str = "") -> Row | None:
        """The row of a quality figure of a method at a point, of the main positions unless others are named."""
        where = {"text": self.text, "bucket": bucket or self.main, **self.where(point)}
        return next(iter(results.rows(SWEEP, name, kind, where)), None)

    def density(self, results: Results, point: tuple[int, int]) -> float | None:
        """Share of keys read at a point."""
        found = results.rows(SWEEP, "keys_read", None, self.where(point))
        return found[0].value if found else None

    def kinds(self, results: Results) -> list[str]:
        """Methods measured here, in their usual order."""
        found = {row.variant for row in results.rows(SWEEP, None, None, {"text": self.text, "length": self.length})}
        return [kind for kind in SWEEP_VARIANTS if kind in found]


def panels(results: Results) -> list[Panel]:
    """Find the texts and lengths of a sweep.

    Args:
        results: a results folder.
    Returns:
        One panel for each, WikiText first, then by name and length; none without a sweep.
    """
    rows = results.rows(SWEEP, "kl")
    mains = {row.slice.get("length"): str(row.slice.get("bucket")) for row in results.rows(SWEEP, "keys_read")}
    found = []
    places = {(str(row.slice.get("text")), row.slice.get("length")) for row in rows}
    named_places = [(text, length) for text, length in places if isinstance(length, int) and length in mains]
    for text, length in sorted(named_places, key=lambda place: (place[0] != "wikitext", place)):
        mine = [row for row in rows if (str(row.slice.get("text")), row.slice.get("length")) == (text, length)]
        numbers = {(row.slice.get("retrieval_block_size"), row.slice.get("top_k")) for row in mine}
        named = [(unit, top_k) for unit, top_k in numbers if isinstance(unit, int) and isinstance(top_k, int)]
        points = sorted(named, key=lambda point: (point[0] * point[1], point[0]))
        buckets = dict.fromkeys(str(row.slice.get("bucket")) for row in mine)
        ranges = tuple(sorted((b for b in buckets if b != mains[length]), key=_start))
        found.append(Panel(text, length, mains[length], ranges, tuple(points)))
    return found


def density_tables(results: Results) -> list[Table]:
    """Build the tables of a sweep: the frontier, and what it is over positions.

    Args:
        results: a results folder.
    Returns:
        For each text and length the main table, and minor ones by position.
    """
    built = []
    for panel in panels(results):
        built.append(_frontier(results, panel))
        built += [table for name in QUALITY if (table := _by_position(results, panel, name)).rows]
        built += _original(results, panel)
    return built


def density_sentence(results: Results) -> str:
    """Say what the sparsest point of the longest windows costs each method.

    Args:
        results: a results folder.
    Returns:
        A sentence; "" without a sweep.
    """
    found = panels(results)
    if not found:
        return ""
    panel = max(found, key=lambda panel: panel.length)
    densities = {point: share for point in panel.points if (share := panel.density(results, point)) is not None}
    point = min(densities, key=lambda point: (densities[point], point), default=None)
    measured = [(kind, panel.row(results, "kl", kind, point)) for kind in SWEEP_VARIANTS] if point else []
    words = [f"{value_text('small', row.value)} ({variant(kind).short})" for kind, row in measured if row]
    if not words or point is None:
        return ""
    read = value_text("share", densities[point])
    return (
        f"With {read} of the keys read ({place_text({'text': panel.text})}, windows of {count_text(panel.length)} "
        f"tokens, {point[1]} blocks of {point[0]}), the KL divergence in nats is {join_words(words)}."
    )


def _frontier(results: Results, panel: Panel) -> Table:
    body, used = [], []
    timed = _TIMES if results.rows(SWEEP, "time_s", None, {"length": panel.length}) else ()
    for kind in ("original", "value_only") if timed else ():
        cells = [_time(results, name, kind, {"length": panel.length}, absent="") for name in _TIMES]
        if cells[0].text:
            blank = (Cell("", state="reference"),) * 2
            quality = (Cell("reference" if kind == "original" else "", state="reference"),) * len(QUALITY)
            body.append((Cell(variant(kind).label, state="name"), *blank, *quality, *cells))
    for point in panel.points:
        share = panel.density(results, point)
        density = Cell("not measured", state="absent") if share is None else Cell(value_text("share", share))
        for kind in panel.kinds(results):
            rows = [panel.row(results, name, kind, point) for name in QUALITY]
            used += [row for row in rows if row]
            absent = "not timed" if kind == "uncalibrated" else "a control"  # older files have no time for it
            times = [_time(results, name, kind, panel.where(point), absent=absent) for name in timed]
            blocks = Cell(f"{point[1]} of {point[0]}")
            body.append((Cell(variant(kind).label, state="name"), blocks, density, *map(row_cell, rows), *times))
    heads = ("model", "blocks read", "keys read", *(head(name) for name in (*QUALITY, *timed)))
    note = "Time: whole model, one window, in turn in the same run, median with 20 and 80 % quantiles. "
    return Table(panel.title, heads, tuple(body), (note if timed else "") + evidence(used))


def _time(results: Results, name: str, kind: str, where: Mapping[str, Any], *, absent: str) -> Cell:
    rows = [row for row in results.rows(SWEEP, name, kind) if dict(row.slice) == dict(where)]
    return row_cell(rows[0]) if rows else Cell(absent, state="reference")


def _by_position(results: Results, panel: Panel, name: str) -> Table:
    body, used = [], []
    for point in panel.points:
        for kind in panel.kinds(results):
            rows = [panel.row(results, name, kind, point, bucket) for bucket in panel.buckets]
            used += [row for row in rows if row]
            words = f"{variant(kind).label}, {point[1]} of {point[0]}"
            body.append((Cell(words, state="name"), *map(row_cell, rows)))
    heads = ("model, blocks read", *(f"positions {bucket}" for bucket in panel.buckets))
    return Table(f"{panel.title.rpartition(', ')[0]}: {head(name)}", heads, tuple(body), evidence(used), minor=True)


def _original(results: Results, panel: Panel) -> list[Table]:
    where = {"text": panel.text, "length": panel.length}
    rows = sorted(results.rows(SWEEP, "perplexity", "original", where), key=lambda row: _start(_bucket(row)))
    cells = (row_cell(row) for row in rows)
    heads = ("model", *(f"positions {_bucket(row)}" for row in rows))
    title = f"{panel.title.rpartition(', ')[0]}: {metric('perplexity').label}"
    body = ((Cell(variant("original").label, state="name"), *cells),)
    return [Table(title, heads, body, evidence(rows), minor=True)] if rows else []


def _bucket(row: Row) -> str:
    return str(row.slice.get("bucket"))


def _start(bucket: str) -> tuple[int, str]:
    start = bucket.partition("-")[0]
    return (int(start) if start.isdigit() else 0, bucket)
