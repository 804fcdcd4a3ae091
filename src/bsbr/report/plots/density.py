"""The sweep: distance from the original against the share of keys read, against time and over positions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bsbr.report.cells import evidence
from bsbr.report.density import Panel, panels
from bsbr.report.names import SWEEP, SWEEP_VARIANTS
from bsbr.report.plots.axes import length_axis, short_count, tick_text
from bsbr.report.plots.style import MUTED, colour, errors, frame, label, line_style, new_figure, printable, styled
from bsbr.report.results import Results, Row
from bsbr.report.wording import value_text

_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1, 2)))
_SMALLEST = 1e-7
"""What is nearer than this is rounding: it would stretch a logarithmic axis over nothing."""

Measure = Callable[[Row], tuple[float, list[list[float]]]]


@styled
def quality_against_density(results: Results) -> Figure | None:
    """Draw KL, disagreement and excess perplexity against the share of keys read, one row for each text and length.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without a sweep.
    """
    found = panels(results)
    if not found:
        return None
    measures: list[tuple[str, str, Measure]] = [
        ("kl", "KL to the original, nats", _plain),
        ("top1_agreement", "positions with another first choice", _complement),
        ("ppl_ratio", "perplexity / original's, less 1", _excess),
    ]
    figure, grid = _grid(results, found, len(measures), "Quality against density", "Lower and further left is better.")
    for line, panel in zip(grid, found, strict=True):
        for axes, (name, words, measure) in zip(line, measures, strict=True):
            for kind, unit, points in _lines(results, panel):
                rows = [(panel.density(results, point), panel.row(results, name, kind, point)) for point in points]
                _draw(axes, panel, kind, unit, [(x, row) for x, row in rows if x and row], measure)
            _log_axes(axes, lambda x: value_text("share", x).replace(".0 %", " %"))
            axes.set_title(words)
            axes.set_xlabel("share of keys read")
        _name_row(line[0], panel)
    _legend(figure, results, found)
    return figure


@styled
def kl_against_time(results: Results) -> Figure | None:
    """Draw KL against the time of a forward pass, between the floor without attention and the original.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without times.
    """
    found = [panel for panel in panels(results) if results.rows(SWEEP, "time_s", None, {"length": panel.length})]
    if not found:
        return None
    note = "Whole model, one window. Lines up: the original, and no attention at all."
    figure, grid = _grid(results, found, 1, "KL divergence against time", note)
    for (axes,), panel in zip(grid, found, strict=True):
        for kind, unit, points in _lines(results, panel):
            rows = [(_seconds(results, panel, kind, point), panel.row(results, "kl", kind, point)) for point in points]
            _draw(axes, panel, kind, unit, [(x, row) for x, row in rows if x and row], _plain)
        lines = [
            (row.value, kind)
            for kind in ("original", "value_only")
            for row in results.rows(SWEEP, "time_s", kind, {"length": panel.length})
        ]
        for place, (value, kind) in enumerate(sorted(lines)):
            axes.axvline(value, color=colour(kind), linewidth=1.4, linestyle=(0, (4, 3)), zorder=1)
            # the two may be close: the name of each is on its outer side
            axes.annotate(
                label(kind), (value, 1), xycoords=("data", "axes fraction"), xytext=(3 if place else -3, -3),
                textcoords="offset points", ha="left" if place else "right", va="top", rotation=90, fontsize=7.5,
                color=MUTED,
            )  # fmt: skip
        _log_axes(axes, lambda x: tick_text("seconds", x))
        axes.set_ylabel("KL, nats")
        axes.set_xlabel("time of one forward pass")
        axes.set_title(printable(panel.title))
    _legend(figure, results, found, timed=True)
    return figure


@styled
def kl_by_position(results: Results) -> Figure | None:
    """Draw KL over ranges of positions that double, at the sparsest, a middle and the densest point.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without a sweep.
    """
    found = [panel for panel in panels(results) if len(panel.buckets) > 1]
    if not found:
        return None
    columns = max(len(_spread(panel.points)) for panel in found)
    note = "Ranges of positions that double."
    figure, grid = _grid(results, found, max(2, columns), "KL divergence over the position", note)
    for line, panel in zip(grid, found, strict=True):
        chosen = _spread(panel.points)
        for axes, point in zip(line, chosen, strict=False):
            for kind in panel.kinds(results):
                rows = [(_middle(b), panel.row(results, "kl", kind, point, b)) for b in panel.buckets]
                _draw(axes, panel, kind, point[0], [(x, row) for x, row in rows if row], _plain, by_unit=False)
            _log_axes(axes, short_count)
            edges = [int(end) for bucket in panel.buckets for end in bucket.split("-")]
            length_axis(axes, [edge for edge in edges if edge])
            share = panel.density(results, point)
            words = f"{point[1]} blocks of {point[0]}" + (f": {value_text('share', share)} of keys" if share else "")
            axes.set_title(words)
            axes.set_xlabel("position in the window, tokens")
        for axes in line[len(chosen) :]:
            axes.set_visible(False)
        _name_row(line[0], panel)
    _legend(figure, results, found, units=False)
    return figure


def _grid(
    results: Results, found: Sequence[Panel], columns: int, title: str, note: str
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with one row of axes for each panel, titles above and the legend's place below them."""
    width, height = (3.9 * columns + 0.9 if columns > 1 else 9.4), 3.2 * len(found) + 1.7
    figure = new_figure(width, height)
    rows = [row for row in results.rows(SWEEP, "kl") if row.ci_low is not None]
    frame(figure, results, (SWEEP,), title, printable(f"{note} {evidence(rows)}"))
    axes = figure.subplots(len(found), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.85 / width, right=1 - 0.25 / width, top=1 - 1.45 / height, bottom=0.95 / height, hspace=0.42, wspace=0.27
    )
    return figure, [list(line) for line in axes]


def _lines(results: Results, panel: Panel) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """Method, unit, and the points of that unit."""
    units = sorted({unit for unit, _ in panel.points}, reverse=True)
    return [
        (kind, unit, [point for point in panel.points if point[0] == unit])
        for kind in panel.kinds(results)
        for unit in units
    ]


def _draw(
    axes: Axes,
    panel: Panel,
    kind: str,
    unit: int,
    points: Sequence[tuple[float, Row]],
    measure: Measure,
    by_unit: bool = True,
) -> None:
    measured = [(x, *measure(row)) for x, row in points]
    measured = [(x, y, bars) for x, y, bars in measured if y > _SMALLEST]
    if not measured:
        return
    # a bar that passes 0 has no end on a logarithmic axis: it ends a decade below its value
    below = [min(bars[0][0], 0.9 * y) for _, y, bars in measured]
    above = [bars[1][0] for _, _, bars in measured]
    units = sorted({unit for unit, _ in panel.points}, reverse=True)
    dashes = _DASHES[min(units.index(unit), len(_DASHES) - 1)] if by_unit else "-"
    style: dict[str, Any] = line_style(kind) | {"linestyle": dashes, "linewidth": 1.6, "markersize": 5}
    x, y = ([item[place] for item in measured] for place in (0, 1))
    axes.errorbar(x, y, yerr=[below, above], elinewidth=1.1, capsize=2, **style)


def _plain(row: Row) -> tuple[float, list[list[float]]]:
    return row.value, errors([row])


def _complement(row: Row) -> tuple[float, list[list[float]]]:
    below, above = errors([row])
    return 1 - row.value, [above, below]


def _excess(row: Row) -> tuple[float, list[list[float]]]:
    return row.value - 1, errors([row])


def _seconds(results: Results, panel: Panel, kind: str, point: tuple[int, int]) -> float | None:
    """Time of a method."""
    return next((row.value for row in results.rows(SWEEP, "time_s", kind, panel.where(point))), None)


def _log_axes(axes: Axes, write: Callable[[float], str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        steps = (1, 2, 5) if high / max(low, 1e-30) < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=30))
        axis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    if high / low < 6:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))


def _name_row(axes: Axes, panel: Panel) -> None:
    axes.set_ylabel(printable(f"{panel.text}, {panel.length:,} tokens"))


def _legend(
    figure: Figure, results: Results, found: Sequence[Panel], *, units: bool = True, timed: bool = False
) -> None:
    kinds = [kind for kind in SWEEP_VARIANTS if any(kind in panel.kinds(results) for panel in found)]
    if timed:
        kinds = [kind for kind in kinds if any(_seconds(results, found[0], kind, point) for point in found[0].points)]
    handles = [Line2D([], [], **(line_style(kind) | {"linestyle": "-"}), label=label(kind)) for kind in kinds]
    sizes = sorted({unit for panel in found for unit, _ in panel.points}, reverse=True)
    if units and len(sizes) > 1:
        handles += [
            Line2D([], [], color=MUTED, linestyle=_DASHES[min(i, len(_DASHES) - 1)], label=f"blocks of {size}")
            for i, size in enumerate(sizes)
        ]
    height = figure.get_size_inches()[1]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.84 / height), ncols=len(handles), fontsize=8,
        handlelength=2.2, columnspacing=1.3, borderaxespad=0,
    )  # fmt: skip


def _spread(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most three points: first, middle and last of the smallest unit."""
    unit = min(unit for unit, _ in points)
    mine = [point for point in points if point[0] == unit]
    return list(dict.fromkeys([mine[0], mine[len(mine) // 2], mine[-1]]))


def _middle(bucket: str) -> float:
    """Geometric middle of a range of positions; half its end where it begins at 0."""
    low, high = map(int, bucket.split("-"))
    return math.sqrt(low * high) if low else high / math.sqrt(2)
