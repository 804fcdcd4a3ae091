"""Distributions of similarity and divergence, per variant, real text against random tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bsbr.report.names import AGREEMENT, SIMILARITY, VARIANTS
from bsbr.report.plots.style import INK, MUTED, colour, frame, label, new_figure, styled
from bsbr.report.results import Histogram, Results, Row, preference
from bsbr.report.wording import value_text

_DECADES = 30.0
"""Values that span more than this factor are drawn on a logarithmic axis."""

_SPAN = 1e-6
"""A logarithmic axis shows at most this much of its upper end."""

_DISTRIBUTIONS = (
    (SIMILARITY, "cosine", "1 - cosine\nlast layer"),
    (SIMILARITY, "mse", "MSE\nlast layer"),
    (SIMILARITY, "relative_l2", "relative L2\nlast layer"),
    (SIMILARITY, "feature_kl_legacy", "feature-softmax KL\nlast layer (legacy 'KL')"),
    (AGREEMENT, "kl", "KL of predictions\nnats"),
)


@styled
def metrics_distribution(results: Results) -> Figure | None:
    """Draw how each measure is distributed: real text above each line, random tokens below it.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without histograms.
    """
    panels = {title: _histograms(results, section, name) for section, name, title in _DISTRIBUTIONS}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return None
    names = {histogram.variant for found in panels.values() for histogram in found}
    order = [name for name in VARIANTS if name in names] + sorted(names - set(VARIANTS))
    width, height = 1.5 + 2.6 * len(panels), 2.3 + 0.62 * len(order)
    figure = new_figure(max(width, 7.6), height)
    subtitle = (
        "Filled: real text. Hatched: random tokens, the published inputs. Tick: median. Each shape has its own height."
    )
    frame(figure, results, (SIMILARITY, AGREEMENT), "Distribution of each measure", subtitle)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    width = figure.get_size_inches()[0]
    figure.subplots_adjust(
        left=1.25 / width, right=1 - 0.25 / width, top=1 - 1.25 / height, bottom=0.95 / height, wspace=0.1
    )
    for axes, (title, found) in zip(all_axes, panels.items(), strict=True):
        _ridges(axes, title, found, order)
    all_axes[0].set_yticks(range(len(order)), [label(name) for name in order])
    return figure


def _histograms(results: Results, section: str, name: str) -> list[Histogram]:
    """One histogram per variant and input, of the slice to quote."""
    found = results.sections.get(section)
    chosen: dict[tuple[str, bool], Histogram] = {}
    for histogram in found.histograms if found else ():
        if histogram.metric != name or sum(histogram.counts) <= 0:
            continue
        key = (histogram.variant, histogram.slice.get("input") == "random")
        if key not in chosen or _order(histogram) < _order(chosen[key]):
            chosen[key] = histogram
    return [_drawable(_as_distance(one) if name == "cosine" else one) for one in chosen.values()]


def _as_distance(histogram: Histogram) -> Histogram:
    """1 - cosine: cosines near 1 differ by orders of magnitude that only their distance from 1 shows."""
    edges = tuple(1 - edge for edge in reversed(histogram.edges))
    return replace(histogram, edges=edges, counts=tuple(reversed(histogram.counts)))


def _drawable(histogram: Histogram) -> Histogram:
    """Begin a first bin that reaches down to 0 one step before its end, for a logarithmic axis."""
    edges = histogram.edges
    if len(edges) > 2 and edges[1] > 0 and edges[-1] > _DECADES * edges[1]:
        edges = (max(edges[0], edges[1] ** 2 / edges[2]), *edges[1:])
    return replace(histogram, edges=edges)


def _order(histogram: Histogram) -> tuple:
    return preference(Row(histogram.metric, histogram.variant, histogram.slice, 0.0))


def _ridges(axes: Axes, title: str, found: Sequence[Histogram], order: Sequence[str]) -> None:
    low, high = _limits(found)
    logarithmic = low > 0 and high / low > _DECADES
    axes.set_title(title, fontsize=9.5)
    scale = "log axis" if logarithmic else "linear axis"
    axes.set_xlabel(f"{scale}, lower is better", fontsize=8.5, color=MUTED)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(low, high)
    for histogram in found:
        _ridge(axes, histogram, order.index(histogram.variant), low)
    axes.set_ylim(len(order) - 0.45, -0.62)
    axes.set_yticks(range(len(order)), [])
    axes.grid(axis="y", visible=False)
    measured = {histogram.variant for histogram in found}
    for position, variant in enumerate(order):
        axes.axhline(position, color="#d0d5dd", linewidth=0.8, zorder=1)
        if variant not in measured:
            axes.text(0.5, position - 0.08, "not measured", ha="center", **_note(axes))


def _note(axes: Axes) -> dict[str, Any]:
    return {"transform": axes.get_yaxis_transform(), "fontsize": 7, "color": MUTED, "zorder": 5}


def _limits(found: Sequence[Histogram]) -> tuple[float, float]:
    """Ends of the axis: what holds all but the outer thousandths, on a logarithmic one at most six decades.

    Positions that the change does not touch differ by rounding alone, many decades below all others.
    """
    edges = [edge for histogram in found for edge in _occupied(histogram)]
    low, high = min(edges), max(edges)
    return (max(low, high * _SPAN) if low > 0 else low), high


def _occupied(histogram: Histogram) -> tuple[float, float]:
    """Edges that hold all but the outer thousandth of the counts on each side."""
    total, run = sum(histogram.counts), 0.0
    first, last = 0, len(histogram.counts) - 1
    for number, count in enumerate(histogram.counts):
        if run <= total * 1e-3:
            first = number
        run += count
        if run >= total * (1 - 1e-3):
            last = number
            break
    return histogram.edges[first], histogram.edges[last + 1]


def _ridge(axes: Axes, histogram: Histogram, position: int, low: float) -> None:
    """Draw one shape; what lies left of the axis is told as a share, and does not set the height."""
    random = histogram.slice.get("input") == "random"
    shade, reach = colour(histogram.variant), 0.34 if random else -0.5
    shown = [count if end > low else 0.0 for count, end in zip(histogram.counts, histogram.edges[1:], strict=True)]
    heights = [position + reach * count / (max(shown) or 1) for count in shown]
    look: dict[str, Any] = {"facecolor": shade, "edgecolor": shade, "alpha": 0.75, "linewidth": 0.5}
    if random:
        look = {"facecolor": "white", "edgecolor": shade, "hatch": "/////", "linewidth": 0.8}
    axes.stairs(heights, histogram.edges, baseline=position, fill=True, zorder=3, **look)
    median = _median(histogram)
    if median >= low:
        axes.plot([median, median], [position, position + reach * 1.06], color=INK, linewidth=1.5, zorder=4)
    hidden = 1 - sum(shown) / sum(histogram.counts)
    if hidden >= 0.005:
        place = position + (0.3 if random else -0.08)
        axes.text(0.01, place, f"{value_text('share', hidden)} smaller", ha="left", **_note(axes))


def _median(histogram: Histogram) -> float:
    half, run = sum(histogram.counts) / 2, 0.0
    for number, count in enumerate(histogram.counts):
        if run + count >= half and count:
            low, high = histogram.edges[number], histogram.edges[number + 1]
            return low + (high - low) * (half - run) / count
        run += count
    return math.nan
