"""Perplexity, distributions of similarity, and agreement, per variant."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bsbr.report.cells import evidence, place_text
from bsbr.report.metrics import capital
from bsbr.report.names import AGREEMENT, PERPLEXITY
from bsbr.report.plots.axes import tick_text
from bsbr.report.plots.style import INK, MUTED, colour, errors, frame, label, new_figure, printable, styled
from bsbr.report.results import Results, Row, preference
from bsbr.report.wording import value_text

_NEAR = 1.6
"""Ratios up to this share the linear part of the axis; what is worse goes to the logarithmic part."""

_AGREEMENT = ("top1_agreement", "teacher_in_topk@5", "overlap@5", "any_overlap@5")
_AGREEMENT_TITLES = (
    "same next token\n(strict top-1)",
    "original's choice\nin top-5",
    "overlap@5\n(shared of five)",
    "any overlap@5\n(legacy, loosest)",
)


@styled
def perplexity_comparison(results: Results) -> Figure | None:
    """Draw the perplexity of each variant as a multiple of the original's, one panel per text.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without ratios.
    """
    panels = _ratio_panels(results)
    if not panels:
        return None
    heights = [len(rows) + 0.9 for rows in panels.values()]
    height = 2.1 + 0.33 * sum(heights) + 0.5 * (len(panels) - 1)
    figure = new_figure(9.4, height)
    drawn = [row for rows in panels.values() for row in rows]
    far = [row for row in drawn if row.value > _NEAR]
    axis = "; grey: logarithmic. " if far else ". "
    subtitle = printable(f"Same tokens for all; lower is better{axis}{evidence(drawn)}")
    frame(figure, results, (PERPLEXITY,), "Perplexity against the original", subtitle)
    near_high = max([max(row.value, row.ci_high or 0) for row in drawn if row.value <= _NEAR], default=1.1)
    widths = (2.7, 1) if far else (1,)
    grid = figure.add_gridspec(len(panels), len(widths), width_ratios=widths, height_ratios=heights, wspace=0.05)
    grid.update(left=1.5 / 9.4, right=1 - 0.35 / 9.4, top=1 - 1.2 / height, bottom=0.98 / height, hspace=0.42)
    for number, (place, rows) in enumerate(panels.items()):
        axes = [figure.add_subplot(grid[number, column]) for column in range(len(widths))]
        base = results.best(PERPLEXITY, "perplexity", "original", dict(rows[0].slice))
        title = printable(place) + (f" (original: {value_text('plain', base.value)})" if base and base.value else "")
        axes[0].set_title(title)
        _near_axis(axes[0], min(near_high, 2 * _NEAR))
        if far:
            _far_axis(axes[1], [row.value for row in far])
        for position, row in enumerate(rows):
            far_away = row.value > _NEAR
            _ratio(axes[1 if far_away else 0], results, row, position, far_away)
        for one in axes:
            one.set_ylim(len(rows) - 0.4, -0.6)
            one.set_yticks(range(len(rows)), [label(row.variant) for row in rows] if one is axes[0] else [])
            one.grid(axis="y", visible=False)
        if number == len(panels) - 1:
            axes[0].set_xlabel("perplexity / perplexity of the original")
    return figure


def _ratio_panels(results: Results) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    rows = [row for row in results.rows(PERPLEXITY, "ppl_ratio") if row.value > 0]
    for text in sorted({str(row.slice.get("text") or "") for row in rows}, key=lambda name: (name != "wikitext", name)):
        mine = [row for row in rows if str(row.slice.get("text") or "") == text]
        first = min(mine, key=preference)
        chosen = {row.variant: row for row in mine if dict(row.slice) == dict(first.slice)}
        order = [name for name in results.variants(PERPLEXITY, "ppl_ratio") if name in chosen]
        panels[place_text(first.slice)] = [chosen[name] for name in order]
    return dict(list(panels.items())[:3])


def _near_axis(axes: Axes, high: float) -> None:
    axes.axvline(1, color=colour("original"), linewidth=1.6, zorder=1)
    span = max(high - 1, 0.02)
    axes.set_xlim(1 - 0.1 * span, 1 + 1.42 * span)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    decimals = 3 if span < 0.1 else 2
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"\N{MULTIPLICATION SIGN}{value:.{decimals}f}"))


def _far_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(values) / 3, max(max(values) * 3, 100 * min(values))
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"\N{MULTIPLICATION SIGN}{tick_text('plain', value)}")
    )
    axes.set_facecolor("#f6f7f9")
    axes.spines["left"].set_visible(False)
    slash: dict[str, Any] = {
        "marker": [(-1, -1.6), (1, 1.6)],
        "markersize": 9,
        "linestyle": "none",
        "color": MUTED,
        "clip_on": False,
    }
    axes.plot([0], [0], transform=axes.transAxes, **slash)
    axes.plot([-0.035], [0], transform=axes.transAxes, **slash)


def _ratio(axes: Axes, results: Results, row: Row, position: int, far: bool) -> None:
    axes.errorbar(
        [row.value],
        [position],
        xerr=errors([row]),
        fmt="o",
        markersize=7,
        color=colour(row.variant),
        elinewidth=2,
        capsize=3,
        zorder=3,
    )
    if not far:
        axes.plot(
            [1, row.value],
            [position, position],
            color=colour(row.variant),
            linewidth=1.2,
            alpha=0.45,
            zorder=2,
        )
    absolute = results.best(PERPLEXITY, "perplexity", row.variant, dict(row.slice))
    words = value_text("ratio", row.value)
    if absolute:
        words += f"  ({value_text('plain', absolute.value)})"
    low, high = axes.get_xlim()
    leftward = far and row.value > math.sqrt(low * high)
    edge = row.ci_low if leftward else row.ci_high
    axes.annotate(
        words,
        (row.value if edge is None else min(max(edge, low), high), position),
        xytext=(-8 if leftward else 8, 0),
        ha="right" if leftward else "left",
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
        zorder=4,
        annotation_clip=False,
    )


@styled
def agreement_rates(results: Results) -> Figure | None:
    """Draw strict and loose agreement on the next token, grouped by definition.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without agreement rates.
    """
    rows = [row for name in _AGREEMENT for row in results.rows(AGREEMENT, name)]
    if not rows:
        return None
    first = min((row for row in rows if row.variant == "converted"), key=preference, default=min(rows, key=preference))
    place = dict(first.slice)
    chosen = {(row.metric, row.variant): row for row in rows if dict(row.slice) == place}
    variants = [name for name in results.variants(AGREEMENT) if any(name == kind for _, kind in chosen)]
    figure = new_figure(10.8, 5.4)
    where = capital(place_text(place)) or "All scored positions"
    subtitle = printable(f"{where}. Higher is better. {evidence(chosen.values())}")
    frame(figure, results, (AGREEMENT,), "Agreement with the original on the next token", subtitle)
    axes = figure.add_axes((0.72 / 10.8, 0.88 / 5.4, 1 - 0.9 / 10.8, 1 - 2.0 / 5.4))
    bar = 0.84 / max(len(variants), 1)
    for group, name in enumerate(_AGREEMENT):
        for number, variant in enumerate(variants):
            _bar(
                axes,
                chosen.get((name, variant)),
                group + (number - (len(variants) - 1) / 2) * bar,
                bar,
                variant,
            )
    axes.axvspan(2.5, 3.5, color="#f2f4f7", zorder=0)
    axes.set_xlim(-0.5, 3.5)
    axes.set_ylim(0, 123)
    axes.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_xticks(range(4), _AGREEMENT_TITLES)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    handles = [Patch(color=colour(name), label=label(name)) for name in variants]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(variants),
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
    )
    return figure


def _bar(axes: Axes, row: Row | None, x: float, width: float, variant: str) -> None:
    if row is None:
        axes.text(x, 1.5, "not measured", rotation=90, ha="center", va="bottom", fontsize=7, color=MUTED)
        return
    height = 100 * row.value
    hatch = "///" if row.metric.startswith("any_overlap") else None
    look: dict[str, Any] = {
        "color": colour(variant),
        "hatch": hatch,
        "edgecolor": "white",
        "linewidth": 0,
        "zorder": 2,
    }
    axes.bar([x], [height], width * 0.9, **look)
    # A t interval over few documents can pass 100 %: the whisker ends there, the table holds the ends.
    below, above = (ends[0] for ends in errors([row], 100))
    above = min(above, max(100 - height, 0))
    axes.errorbar([x], [height], yerr=[[below], [above]], color=INK, elinewidth=1.1, capsize=2, zorder=3)
    words = value_text("share", row.value)
    axes.text(x, height + above + 1.5, words, rotation=90, ha="center", va="bottom", fontsize=7.8, color=INK)
