"""The tables of the report, by section."""

from collections.abc import Mapping, Sequence
from typing import Any

from bsbr.report.cells import (
    BASE,
    REGIMES,
    Cell,
    Table,
    evidence,
    head,
    place_text,
    reference_or,
    row_cell,
)
from bsbr.report.density import density_tables
from bsbr.report.facts import fit_range
from bsbr.report.metrics import capital, metric, order
from bsbr.report.names import AGREEMENT, EXPONENTS, PERPLEXITY, SIMILARITY, SPEED, SPEED_VARIANTS, SWEEP, variant
from bsbr.report.results import Results, Row, preference
from bsbr.report.slices import by_place, noise_table, profiles
from bsbr.report.wording import count_text

_TIMES = ("time_s", "speedup", "tokens_per_s", "peak_bytes")
_FIT = ("exponent", "constant_s", "coefficient", "loglog_slope", "crossover_length")
_PHYSICAL = ("physical_constant_s", "physical_linear", "physical_quadratic", "physical_relative_error")


def tables(results: Results) -> dict[str, list[Table]]:
    """Build the tables of every section that was measured.

    Args:
        results: a results folder.
    Returns:
        Tables by section; "summary" holds the one to paste.
    """
    built = {
        "summary": [summary_table(results)],
        AGREEMENT: [
            *by_place(results, AGREEMENT, ("text", "bucket", "length")),
            *profiles(results, AGREEMENT, ("top1_agreement", "kl"), "bucket"),
            *noise_table(results),
        ],
        PERPLEXITY: [
            *by_place(results, PERPLEXITY, ("text", "bucket", "length", "rows")),
            *profiles(results, PERPLEXITY, ("ppl_ratio",), "bucket"),
        ],
        SIMILARITY: [
            *by_place(results, SIMILARITY, ("input", "layer", "bucket")),
            *profiles(results, SIMILARITY, ("cosine", "relative_l2"), "layer"),
        ],
        SPEED: [*_speed_tables(results), *_other_rows(results, SPEED, _TIMES)],
        EXPONENTS: [*_exponent_tables(results), *_other_rows(results, EXPONENTS, (*_FIT, *_PHYSICAL))],
        SWEEP: density_tables(results),
    }
    return {name: [table for table in group if table.rows] for name, group in built.items()}


_SUMMARY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (AGREEMENT, "top1_agreement", {}),
    (AGREEMENT, "overlap@5", {}),
    (AGREEMENT, "kl", {}),
    (PERPLEXITY, "perplexity", {"text": "wikitext"}),
    (PERPLEXITY, "ppl_ratio", {"text": "wikitext"}),
    (PERPLEXITY, "ppl_ratio", {"text": "book"}),
    (SIMILARITY, "cosine", {"layer": "last", "input": "text"}),
)


def summary_table(results: Results) -> Table:
    """Build the paste-ready table: one row per variant, fidelity and quality side by side.

    Args:
        results: a results folder.
    Returns:
        The table; without any quality file, the speed by length instead.
    """
    columns = []
    for section, name, where in _SUMMARY:
        rows = results.rows(section, name, None, where)
        if rows:
            first = min(rows, key=preference)
            same = {key: first.slice[key] for key in ("bucket", "text", "length") if key in first.slice}
            columns.append((section, name, {**where, **same}))
    if not columns:
        speed = _speed_tables(results)
        return speed[0] if speed else Table("Summary", (), ())
    kinds = list(dict.fromkeys(k for section in (AGREEMENT, PERPLEXITY, SIMILARITY) for k in results.variants(section)))
    kinds.sort(key=lambda kind: kind != BASE)
    body, used = [], []
    for kind in kinds:
        cells = [Cell(variant(kind).label, state="name")]
        for section, name, where in columns:
            row = results.best(section, name, kind, where)
            used.extend([row] if row and name != "perplexity" else [])
            cells.append(reference_or(row, results, section, name, kind, where))
        body.append(tuple(cells))
    heads = (_column_head(name, where) for _, name, where in columns)
    places = {place_text(where, skip=("text", "input", "layer", "length")) for _, _, where in columns} - {""}
    note = f"Measured on: {'; '.join(sorted(places))}. {evidence(used)}" if places else evidence(used)
    return Table("Summary", ("model", *heads), tuple(body), note.strip())


def _column_head(name: str, where: Mapping[str, Any]) -> str:
    place = place_text(where, skip=("bucket", "length"))
    return head(name) + (f", {place}" if place else "")


def _speed_tables(results: Results) -> list[Table]:
    rows = [row for row in results.rows(SPEED) if row.slice.get("length") is not None]
    regimes: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        regime = str(row.slice.get("regime") or "")
        batch = row.slice.get("batch") if regime != "fixed_tokens" else None
        regimes.setdefault((regime, batch), []).append(row)
    built = []
    for (regime, batch), group in sorted(regimes.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        kinds = [kind for kind in results.variants(SPEED) if any(row.variant == kind for row in group)]
        kinds.sort(key=lambda kind: SPEED_VARIANTS.index(kind) if kind in SPEED_VARIANTS else len(SPEED_VARIANTS))
        title = REGIMES.get(regime, regime or "speed") + (f", batch {batch}" if batch is not None else "")
        times = [(kind, "time_s") for kind in kinds] + [(kind, "speedup") for kind in kinds if kind != BASE]
        note = "Times are medians with their 20 and 80 % quantiles; variants were timed in turn in the same run."
        built.append(_by_length(results, group, times, capital(title), note))
        for name, minor in (("tokens_per_s", True), ("peak_bytes", False)):
            mine = [(kind, name) for kind in kinds if any(_is(row, kind, name) for row in group)]
            if mine:
                words = f"{capital(title)}: {head(name)}"
                built.append(_by_length(results, group, mine, words, "", minor))
    return built


def _by_length(
    results: Results,
    group: Sequence[Row],
    wanted: Sequence[tuple[str, str]],
    title: str,
    note: str,
    minor: bool = False,
) -> Table:
    lengths = sorted({row.slice["length"] for row in group}, key=lambda length: (str(type(length)), length))
    body = []
    for length in lengths:
        cells = [Cell(count_text(length) if isinstance(length, int) else str(length), state="name")]
        for kind, name in wanted:
            found = [row for row in group if _is(row, kind, name) and row.slice["length"] == length]
            cells.append(reference_or(found[0] if found else None, results, SPEED, name, kind, {"length": length}))
        body.append(tuple(cells))
    single = len({name for _, name in wanted}) == 1
    words = (variant(kind).short if single else f"{variant(kind).short}: {head(name)}" for kind, name in wanted)
    heads = ("tokens", *words)
    return Table(title, heads, tuple(body), note, minor)


def _is(row: Row, kind: str, name: str) -> bool:
    return row.variant == kind and row.metric == name


def _other_rows(results: Results, section: str, shown: Sequence[str]) -> list[Table]:
    """What no other table of the section holds, row by row, so that nothing measured is left out."""
    rows = results.rows(section)
    rows = [row for row in rows if row.metric not in shown or (section == SPEED and "length" not in row.slice)]
    rows.sort(
        key=lambda row: (
            order(row.metric),
            row.variant,
            str(row.slice.get("length")).zfill(9),
            preference(row),
        )
    )
    body = []
    for row in rows:
        name, where = Cell(head(row.metric), state="name"), Cell(place_text(row.slice))
        body.append((name, Cell(variant(row.variant).label), where, row_cell(row)))
    heads = ("measure", "model", "where", "value")
    return [Table("Other figures", heads, tuple(body), evidence(rows), minor=True)] if body else []


def _exponent_tables(results: Results) -> list[Table]:
    regimes = {str(row.slice.get("regime") or ""): row.slice.get("regime") for row in results.rows(EXPONENTS)}
    built = []
    for name, regime in sorted(regimes.items()):
        title = capital(REGIMES.get(name, name or "fit"))
        where = {"regime": regime} if name else {}
        built += _fits(results, where, _FIT, title)
        built += _fits(results, where, _PHYSICAL, f"{title}: physical model, t = a + b n + c n^2")
    return built


def _fits(results: Results, where: Mapping[str, Any], wanted: Sequence[str], title: str) -> list[Table]:
    """One regime: variants down, what was fitted across; what no variant has is not a column."""
    rows = [row for name in wanted for row in results.rows(EXPONENTS, name, None, where)]
    names = [name for name in wanted if any(row.metric == name for row in rows)]
    body = []
    for kind in results.variants(EXPONENTS):
        mine = {row.metric: row for row in rows if row.variant == kind}
        if mine:
            span = next((text for row in mine.values() if (text := fit_range(row))), "not stated")
            cells = (reference_or(mine.get(name), results, EXPONENTS, name, kind, where) for name in names)
            body.append((Cell(variant(kind).label, state="name"), Cell(span), *cells))
    heads = ("model", "fitted over, tokens", *(metric(name).label for name in names))
    return [Table(title, heads, tuple(body), evidence(rows))] if body else []
