"""Fitted growth of time with length: curves t = a + b n^k, and the slopes between neighbouring lengths."""

import itertools
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsbr.report.facts import is_extrapolated
from bsbr.report.metrics import metric
from bsbr.report.names import EXPONENTS, SPEED
from bsbr.report.plots.axes import length_axis, log_ticks
from bsbr.report.plots.speed import by_regime, curves, regime_title
from bsbr.report.plots.style import INK, MUTED, colour, errors, frame, label, line_style, new_figure, styled
from bsbr.report.results import Results, Row
from bsbr.report.wording import count_text, interval_text, value_text


@styled
def scaling_exponents(results: Results) -> Figure | None:
    """Draw measured times with their fits, the crossover, and local slopes below.

    Args:
        results: a results folder.
    Returns:
        The figure, or None without fitted exponents or times.
    """
    regimes = by_regime(results, SPEED, "time_s")
    fitted = {str(row.slice.get("regime") or "") for row in results.rows(EXPONENTS, "exponent")}
    regime = next((name for name in regimes if name in fitted), None)
    if regime is None:
        return None
    lines = curves(regimes[regime])
    lengths = sorted({row.slice["length"] for line in lines.values() for row in line})
    figure = new_figure(8.8, 7.4)
    frame(
        figure,
        results,
        (EXPONENTS, SPEED),
        "How time grows with length",
        "Points: medians with 20 to 80 % quantiles. Curves: fit t = a + b n^k over the lengths they span.",
    )
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.3, 1))
    figure.subplots_adjust(left=0.095, right=0.97, top=0.865, bottom=0.125, hspace=0.16)
    upper.set_title(regime_title(regime, regimes[regime]))
    length_axis(upper, lengths)
    upper.set_xlabel("")
    for name, line in lines.items():
        _points(upper, name, line)
        _fit(upper, lower, results, regime, name, line)
        _slopes(lower, name, line)
    log_ticks(upper, "seconds")
    upper.set_ylabel("time of one forward pass")
    _crossover(upper, results, regime, lengths)
    upper.legend(loc="upper left", fontsize=8.2, handlelength=2.4, labelspacing=0.5)
    lower.set_ylabel("slope between\nneighbouring lengths")
    lower.set_xlabel("sequence length, tokens")
    for level, words in ((1, "linear"), (2, "quadratic")):
        lower.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        lower.annotate(
            words,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            fontsize=7.5,
            color=MUTED,
            ha="right",
            va="bottom",
        )
    low, high = lower.get_ylim()
    lower.set_ylim(min(low, 0), max(high, 2.25))
    return figure


def _points(axes: Axes, name: str, line: Sequence[Row]) -> None:
    style = line_style(name) | {"linestyle": "none"}
    lengths, times = [row.slice["length"] for row in line], [row.value for row in line]
    axes.errorbar(lengths, times, yerr=errors(line), elinewidth=1.4, capsize=2.5, **style)


def _fit(upper: Axes, lower: Axes, results: Results, regime: str, name: str, line: Sequence[Row]) -> None:
    rows = {
        row.metric: row for row in results.rows(EXPONENTS, None, name) if str(row.slice.get("regime") or "") == regime
    }
    k, a, b = (rows.get(key) for key in ("exponent", "constant_s", "coefficient"))
    style = line_style(name)
    if k is None:
        upper.plot([], [], **style, label=f"{label(name)}: not fitted")
        return
    text = f"{label(name)}: k = {_with_interval(k)}"
    if "loglog_slope" in rows:
        text += f"; straight line (legacy) {_with_interval(rows['loglog_slope'])}"
    upper.plot([], [], **style, label=text)
    if a is None or b is None:
        return
    start, end = (k.slice.get(key) for key in ("fit_from", "fit_to"))
    start = start if isinstance(start, int | float) and start > 0 else line[0].slice["length"]
    end = end if isinstance(end, int | float) and end > 0 else line[-1].slice["length"]
    lengths = [start * (end / start) ** (step / 120) for step in range(121)]
    grown = [b.value * length**k.value for length in lengths]
    quiet = {"color": colour(name), "linestyle": style["linestyle"], "marker": ""}
    upper.plot(lengths, [a.value + part for part in grown], linewidth=1.7, zorder=style["zorder"] - 1, **quiet)
    slopes = [k.value * part / (a.value + part) if a.value + part > 0 else math.nan for part in grown]
    lower.plot(lengths, slopes, linewidth=1.5, zorder=style["zorder"] - 1, **quiet)


def _slopes(axes: Axes, name: str, line: Sequence[Row]) -> None:
    middles, slopes = [], []
    for first, second in itertools.pairwise(line):
        lengths = first.slice["length"], second.slice["length"]
        if lengths[1] > lengths[0]:
            middles.append(math.sqrt(lengths[0] * lengths[1]))
            slopes.append(math.log(second.value / first.value) / math.log(lengths[1] / lengths[0]))
    axes.plot(middles, slopes, **(line_style(name) | {"linestyle": "none"}))


def _with_interval(row: Row) -> str:
    kind = metric(row.metric).kind
    value = row.value
    return f"{value_text(kind, value)} {interval_text(kind, value, row.ci_low, row.ci_high)}".strip()


def _crossover(axes: Axes, results: Results, regime: str, lengths: list[int | float]) -> None:
    """Mark where the converted model's curve meets the original's."""
    rows = results.rows(EXPONENTS, "crossover_length", "converted")
    row = next((row for row in rows if str(row.slice.get("regime") or "") == regime), None)
    if row is None:
        return
    limits, shade = axes.get_xlim(), colour(row.variant)
    value = min(max(row.value, limits[0]), limits[1])
    if value == row.value:
        axes.axvline(value, color=shade, linewidth=1.3, linestyle=(0, (4, 3)), zorder=1, ymax=0.68)
    if row.ci_low is not None and row.ci_high is not None:
        span = max(row.ci_low, limits[0]), min(row.ci_high, limits[1])
        if span[0] < span[1]:
            axes.axvspan(*span, color=shade, alpha=0.10, zorder=0, ymax=0.68, linewidth=0)
    interval = interval_text("length", row.value, row.ci_low, row.ci_high)
    words = f"crossover of {label(row.variant)}\n{count_text(row.value)} tokens {interval}".rstrip()
    words += "\nextrapolated: outside the lengths measured" if is_extrapolated(row, lengths) else ""
    left = math.log(value / limits[0]) < 0.6 * math.log(limits[1] / limits[0])
    axes.annotate(
        words,
        (value, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(6 if left else -6, 0),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=8.2,
        color=INK,
    )
    axes.set_xlim(*limits)
