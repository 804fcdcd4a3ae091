"""Axes and labels that plots share: lengths, logarithmic values, labels beside line ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bsbr.report.definitions import Kind
from bsbr.report.wording import count_text, value_text


def length_axis(axes: Axes, lengths: Sequence[float]) -> None:
    """Make x a logarithmic axis of sequence lengths, ticks at the lengths measured.

    Args:
        axes: the axes.
        lengths: the lengths measured.
    """
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlim(ticks[0] / 1.18, ticks[-1] * 1.18)
    axes.set_xlabel("sequence length, tokens")


def short_count(value: float) -> str:
    """Write a length for a tick: 512, 1k, 32k.

    Args:
        value: the length.
    Returns:
        The text.
    """
    thousands = value / 1024
    return f"{thousands:g}k" if value >= 1024 and thousands == int(thousands) else count_text(value)


def log_ticks(axes: Axes, kind: Kind) -> None:
    """Make y a logarithmic axis with ticks at 1, 2 and 5 (1 alone over many decades), in words.

    Args:
        axes: the axes, with its limits set.
        kind: how values are written, as in `names.Kind`.
    """
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 4:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    else:
        steps = (1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 1e4 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=30))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(kind, value)))


def tick_text(kind: Kind, value: float) -> str:
    """Write a value on an axis: no trailing zeros.

    Args:
        kind: how values are written.
        value: the value.
    Returns:
        For instance "20 ms" or "50k".
    """
    if kind == "seconds":
        factor, unit = (1, "s") if value >= 0.9995 else (1e3, "ms") if value >= 0.9995e-3 else (1e6, "\N{MICRO SIGN}s")
        return f"{value * factor:.3g} {unit}"
    if kind == "speedup":
        return f"{value:.3g}\N{MULTIPLICATION SIGN}"
    if kind == "plain":
        return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"
    return value_text(kind, value)


@dataclass(frozen=True)
class Label:
    """A text beside the end of a line."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, labels: Iterable[Label], gap: float = 12.5) -> None:
    """Write labels to the right of line ends, moved apart where they would meet.

    Args:
        axes: the axes, with scales and limits set.
        labels: what to write and where, in data units.
        gap: least distance of two labels, in points.
    """
    figure = axes.get_figure()
    assert figure is not None
    points = 72 / figure.dpi
    placed = []
    for item in sorted(labels, key=lambda item: item.y):
        x, y = axes.transData.transform((item.x, item.y)) * points
        placed.append([x, y, y, item])
    for _ in range(100):
        for low, high in pairwise(placed):
            short = gap - (high[1] - low[1])
            if short > 1e-6:
                low[1] -= short / 2
                high[1] += short / 2
    for _, wanted, y, item in placed:
        axes.annotate(
            item.text,
            (item.x, item.y),
            xytext=(9, wanted - y),
            textcoords="offset points",
            va="center",
            color=item.colour,
            fontsize=9,
            fontweight="bold" if item.text.startswith(("converted", "original")) else "normal",
            annotation_clip=False,
        )
