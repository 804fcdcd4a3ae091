"""Cells, tables and the words for their heads, as HTML and Markdown both write them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bsbr.report.metrics import metric
from bsbr.report.names import AGREEMENT, SIMILARITY
from bsbr.report.results import Results, Row
from bsbr.report.wording import NOT_MEASURED, count_text, interval_text, join_words, value_text

BASE = "original"
"""The variant all others are compared with."""

_ARROWS = {
    "higher": "\N{NO-BREAK SPACE}\N{UPWARDS ARROW}",
    "lower": "\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}",
    "": "",
}
_BUCKETS = {
    "all": "all scored positions",
    "exposed": "positions where the sparse part acts",
    "not exposed": "positions read exactly",
    "key tokens": "tokens that need long context",
    "long context": "tokens with long context",
}
_TEXTS = {"wikitext": "WikiText", "book": "book"}
_INPUTS = {"text": "real text", "random": "random tokens"}
REGIMES = {"fixed_batch": "fixed batch", "fixed_tokens": "tokens per batch constant (published protocol)"}
_SHOWN = {
    "bucket": _BUCKETS,
    "regime": REGIMES,
    "text": _TEXTS,
    "input": _INPUTS,
    "layer": {"last": "last layer"},
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    interval: str = ""
    state: Literal["value", "absent", "reference", "name"] = "value"


@dataclass(frozen=True)
class Table:
    """One table: a title, heads of columns, rows of cells, and what a reader must know beside them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    minor: bool = False
    """Detail that may be folded away."""


def row_cell(row: Row | None, reason: str = "") -> Cell:
    """Write one row as a cell; an absent row reads "not measured".

    Args:
        row: the row, or None.
        reason: why it is absent, if known.
    Returns:
        The cell.
    """
    if row is None:
        return Cell(f"{NOT_MEASURED}: {reason}" if reason else NOT_MEASURED, state="absent")
    kind = metric(row.metric).kind
    return Cell(value_text(kind, row.value), interval_text(kind, row.value, row.ci_low, row.ci_high))


def head(name: str) -> str:
    """Return the heading of a metric, with the direction of improvement.

    Args:
        name: the metric.
    Returns:
        For instance "KL divergence" and an arrow down.
    """
    words = metric(name)
    return f"{words.label}{_ARROWS[words.better]}"


def place_text(position: Any, skip: Sequence[str] = ()) -> str:
    """Write a slice in words.

    Args:
        position: the slice of a row.
        skip: keys to leave out.
    Returns:
        For instance "wikitext, sparse part acts, window 1024".
    """
    words = []
    for key in ("text", "input", "layer", "bucket", "length", "batch", "regime"):
        value = position.get(key)
        if value is None or key in skip:
            continue
        shown = _SHOWN.get(key, {}).get(str(value), str(value))
        label = {"layer": "layer ", "length": "window ", "batch": "batch "}.get(key, "")
        prefix = "positions " if key == "bucket" and shown[:1].isdigit() else ""
        label = "" if shown == "last layer" else label
        words.append(f"{prefix}{label}{shown}")
    known = ("text", "input", "layer", "bucket", "length", "batch", "regime", "extrapolated")
    words.extend(f"{key} {value}" for key, value in sorted(position.items()) if key not in known and key not in skip)
    return ", ".join(words)


def evidence(rows: Iterable[Row]) -> str:
    """Say what the intervals of some rows rest on.

    Args:
        rows: rows of one table.
    Returns:
        For instance "Intervals: 95 %, document-clustered t; n = 12,345, clusters = 41."
    """
    rows = list(rows)
    words = []
    methods = sorted({row.ci_method for row in rows if row.ci_method and row.ci_low is not None})
    if methods:
        words.append(f"95 % intervals: {join_words(methods)}")
    for label, counts in (
        ("n", {r.n for r in rows if r.n}),
        ("clusters", {r.clusters for r in rows if r.clusters}),
    ):
        if counts:
            low, high = min(counts), max(counts)
            span = count_text(low) if low == high else f"{count_text(low)} to {count_text(high)}"
            words.append(f"{label} = {span}".replace(" ", "\N{NO-BREAK SPACE}"))
    return f"{'; '.join(words)}." if words else ""


def reference_or(
    row: Row | None,
    results: Results,
    section: str,
    name: str,
    kind: str,
    where: Mapping[str, Any] | None = None,
) -> Cell:
    """Write a row as a cell, or "reference" where the original is compared with itself.

    Args:
        row: the row, or None.
        results: a results folder, for the reason why a row is absent.
        section, name, kind, where: result file, metric, variant and slice.
    Returns:
        The cell.
    """
    compared = section in (AGREEMENT, SIMILARITY) or name in (
        "ppl_ratio",
        "ppl_difference",
        "crossover_length",
    )
    if row is None and kind == BASE and compared:
        return Cell("reference", state="reference")
    return row_cell(row, results.unmeasured(section, name, kind, where))
