"""Time, throughput and speed-up against sequence length."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsbr.report.names import SPEED, SPEED_VARIANTS
from bsbr.report.plots.axes import Label, label_ends, length_axis, log_ticks
from bsbr.report.plots.style import INK, colour, frame, label, line_style, new_figure, printable, styled
from bsbr.report.results import Results, Row
from bsbr.report.wording import count_text, value_text

_EVEN = 0.95, 1.05
"""Speed-ups in between are even: the line shows them, a number beside each would only hide it."""


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows of one regime by variant, sorted by length; the smallest batch where several were measured.

    Args:
        rows: rows of one metric and one regime.
    Returns:
        Rows by variant, in drawing order.
    """
    by_variant: dict[str, dict[float, Row]] = {}
    for row in sorted(rows, key=lambda row: -float(row.slice.get("batch") or 0)):
        by_variant.setdefault(row.variant, {})[row.slice["length"]] = row
    order = [*SPEED_VARIANTS, *sorted(set(by_variant) - set(SPEED_VARIANTS))]
    return {
        name: [by_variant[name][length] for length in sorted(by_variant[name])] for name in order if name in by_variant
    }


def by_regime(results: Results, section: str, name: str) -> dict[str, list[Row]]:
    """Return the drawable rows of a metric by regime, the fixed batch first.

    Args:
        results: a results folder.
        section, name: result file and metric.
    Returns:
        Rows with a numeric length and a value above 0.
    """
    regimes: dict[str, list[Row]] = {}
    for row in results.rows(section, name):
        if isinstance(row.slice.get("length"), int | float) and row.value > 0:
            regimes.setdefault(str(row.slice.get("regime") or ""), []).append(row)
    return dict(sorted(regimes.items())[:2])


def regime_title(regime: str, rows: Sequence[Row]) -> str:
    """Name a regime with its batch or its tokens per batch.

    Args:
        regime: the regime.
        rows: its rows.
    Returns:
        For instance "Fixed batch of 1".
    """
    batches = [row.slice["batch"] for row in rows if isinstance(row.slice.get("batch"), int)]
    if regime == "fixed_batch":
        return f"Fixed batch of {min(batches)}" if batches else "Fixed batch"
    if regime == "fixed_tokens":
        tokens = {row.slice["length"] * row.slice["batch"] for row in rows if isinstance(row.slice.get("batch"), int)}
        return f"{count_text(min(tokens))} tokens per batch" if len(tokens) == 1 else "Constant tokens per batch"
    return printable(regime) or "Speed"


def _panels(
    results: Results,
    name: str,
    title: str,
    subtitle: str,
    finish: Callable[[Axes, dict[str, list[Row]]], None],
) -> Figure | None:
    regimes = by_regime(results, SPEED, name)
    if not regimes:
        return None
    width = 8.8 if len(regimes) == 1 else 12.8
    figure = new_figure(width, 5.4)
    frame(figure, results, (SPEED,), title, subtitle)
    spans = [max(len({row.slice["length"] for row in rows}), 5) for rows in regimes.values()]
    grid = figure.add_gridspec(1, len(regimes), width_ratios=spans, wspace=0.52 if len(regimes) > 1 else 0)
    figure.subplots_adjust(left=0.95 / width, right=1 - 1.55 / width, top=1 - 1.05 / 5.4, bottom=0.98 / 5.4)
    for number, (regime, rows) in enumerate(regimes.items()):
        axes = figure.add_subplot(grid[number])
        axes.set_title(regime_title(regime, rows))
        lines = curves(rows)
        length_axis(axes, [row.slice["length"] for row in rows])
        for variant, line in lines.items():
            _draw_line(axes, variant, line)
        finish(axes, lines)
        ends = [Label(line[-1].slice["length"], line[-1].value, label(v), colour(v)) for v, line in lines.items()]
        if name == "speedup":
            words = [f"{end.text} {value_text('speedup', end.y)}" for end in ends]
            ends = [replace(end, text=text) for end, text in zip(ends, words, strict=True)]
            ends.append(Label(max(end.x for end in ends), 1, "original", colour("original")))
        label_ends(axes, ends)
    return figure


def _draw_line(axes: Axes, variant: str, line: Sequence[Row]) -> None:
    lengths = [row.slice["length"] for row in line]
    axes.plot(lengths, [row.value for row in line], **line_style(variant))
    bands = [
        (row.slice["length"], row.ci_low, row.ci_high)
        for row in line
        if row.ci_low is not None and row.ci_high is not None
    ]
    if bands:
        spans, lows, highs = zip(*bands, strict=True)
        axes.fill_between(spans, lows, highs, color=colour(variant), alpha=0.16, linewidth=0)


@styled
def inference_time(results: Results) -> Figure | None:
    """Draw time per forward pass against length, both axes logarithmic.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without times.
    """

    def finish(axes: Axes, lines: dict[str, list[Row]]) -> None:
        log_ticks(axes, "seconds")
        axes.set_ylabel("time of one forward pass")

    subtitle = "Median of interleaved repeats; band: 20 to 80 % quantiles. Both axes logarithmic; lower is better."
    return _panels(results, "time_s", "Inference time by sequence length", subtitle, finish)


@styled
def throughput(results: Results) -> Figure | None:
    """Draw tokens per second against length.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without throughputs.
    """

    def finish(axes: Axes, lines: dict[str, list[Row]]) -> None:
        log_ticks(axes, "plain")
        axes.set_ylabel("tokens per second")

    subtitle = "Tokens / median time; band: 20 to 80 % quantiles. Higher is better; linear cost is flat."
    return _panels(results, "tokens_per_s", "Throughput by sequence length", subtitle, finish)


@styled
def speedup(results: Results) -> Figure | None:
    """Draw the speed of each variant as a multiple of the original's.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without speed-ups.
    """

    def finish(axes: Axes, lines: dict[str, list[Row]]) -> None:
        rows = [row for line in lines.values() for row in line]
        values = [end for row in rows for end in (row.value, row.ci_low, row.ci_high) if end]
        axes.set_ylim(min(0.8, 0.9 * min(values)), max(1.3, 1.15 * max(values)))
        log_ticks(axes, "speedup")
        lengths = [row.slice["length"] for line in lines.values() for row in line]
        axes.plot([min(lengths), max(lengths)], [1, 1], color=colour("original"), linewidth=1.8, zorder=2)
        axes.set_ylabel("times the original's speed")
        for row in lines.get("converted", [])[:-1]:
            if not _EVEN[0] < row.value < _EVEN[1]:
                _mark(axes, row)

    subtitle = "Time of the original / time of the variant, timed in turn in one run. Higher is better."
    return _panels(results, "speedup", "Speed-up by sequence length", subtitle, finish)


def _mark(axes: Axes, row: Row) -> None:
    axes.annotate(
        value_text("speedup", row.value),
        (row.slice["length"], row.value),
        xytext=(3, -8),
        textcoords="offset points",
        ha="left",
        va="top",
        fontsize=8,
        color=INK,
        zorder=6,
    )
