"""The table at the end of a run: one row per variant, fidelity, quality and speed side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from bsbr.terminal import harmless

_QUALITY = (
    ("top1_agreement", "same top-1 \N{UPWARDS ARROW}", lambda value: f"{100 * value:.2f} %"),
    ("overlap@5", "overlap@5 \N{UPWARDS ARROW}", lambda value: f"{100 * value:.2f} %"),
    ("kl", "KL, nats \N{DOWNWARDS ARROW}", lambda value: f"{value:.4f}"),
    ("perplexity", "perplexity \N{DOWNWARDS ARROW}", lambda value: f"{value:.2f}"),
    ("ppl_ratio", "PPL ratio \N{DOWNWARDS ARROW}", lambda value: f"\N{MULTIPLICATION SIGN}{value:.4f}"),
)
_ABSENT = "\N{EN DASH}"


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Draw the headline figures of a run for the terminal.

    Args:
        summary: from `run_suite`.
    Returns:
        One table per text, then one of speed; a part that was not measured has no table.

    Example:
        >>> [str(table.title) for table in summary_tables({"quality": {}, "speedup": {"converted": {128: 1.0}}})]
        ['Speed-up over the original, batch 1']
    """
    tables = []
    for text, variants in summary.get("quality", {}).items():
        # Hidden states have tables in the report; beside these they would need a column of their own.
        if any("kl" in figures for figures in variants.values()):
            tables.append(_quality_table(text, variants, summary.get("positions", "all")))
    if summary.get("speedup"):
        tables.append(_speed_table(summary["speedup"], summary.get("exponent", {})))
    return tables


def _quality_table(text: str, variants: Mapping[str, Mapping[str, float]], positions: str) -> Table:
    where = "where the sparse part acts" if positions == "exposed" else "all positions"
    table = _new_table(f"Quality on {text}, {where}")
    for _, head, _ in _QUALITY:
        table.add_column(head, justify="right")
    for name, figures in sorted(variants.items(), key=lambda item: item[0] != "original"):
        cells = [write(figures[metric]) if metric in figures else _ABSENT for metric, _, write in _QUALITY]
        table.add_row(_text(name), *cells, style=_style(name))
    return table


def _speed_table(speedups: Mapping[str, Mapping[int, float]], exponents: Mapping[str, float]) -> Table:
    table = _new_table("Speed-up over the original, batch 1")
    lengths = sorted({length for by_length in speedups.values() for length in by_length})
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    if exponents:
        table.add_column("exponent k", justify="right")
    for name, by_length in speedups.items():
        cells = _cells(by_length, lengths)
        if exponents:
            cells.append(f"{exponents[name]:.2f}" if name in exponents else _ABSENT)
        table.add_row(_text(name), *cells, style=_style(name))
    return table


def _cells(by_length: Mapping[int, float], lengths: Sequence[int]) -> list[str]:
    return [f"{by_length[length]:.2f}\N{MULTIPLICATION SIGN}" if length in by_length else _ABSENT for length in lengths]


def _new_table(title: str) -> Table:
    table = Table(title=_text(title), title_justify="left")
    table.add_column("model", no_wrap=True, min_width=14)
    return table


def _text(foreign: str) -> Text:
    """Text that rich takes for no markup, and a terminal for no command."""
    return Text(harmless(foreign))


def _style(name: str) -> str | None:
    return "bold" if name == "converted" else None
