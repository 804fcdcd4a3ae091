"""The look all plots share: colours and marks per variant, titles, captions, labels beside lines."""

import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bsbr.report.facts import settings_text
from bsbr.report.names import VARIANTS, variant
from bsbr.report.results import Results, Row

INK, MUTED, GRID = "#22272e", "#667085", "#e4e7ec"
DPI = 140

COLOURS: dict[str, str] = {
    "original": "#3a3f47",
    "converted": "#0072b2",
    "converted_sparse": "#56b4e9",
    "uncalibrated": "#56b4e9",
    "moba": "#e69f00",
    "local": "#cc79a7",
    "states": "#009e73",
    "additive": "#d55e00",
    "window": "#cc79a7",
    "oracle": "#009e73",
    "random": "#8c6d31",
    "value_only": "#98a2b3",
}
"""Okabe and Ito's colours: told apart with any common colour vision, and in grey by lightness and mark."""

_MARKS: dict[str, str] = {
    "original": "o",
    "converted": "s",
    "converted_sparse": "D",
    "uncalibrated": "D",
    "moba": "^",
    "local": "v",
    "states": "P",
    "additive": "X",
    "window": "v",
    "oracle": "P",
    "random": "X",
    "value_only": ".",
}
_DASHES: dict[str, Any] = {"converted_sparse": (0, (4, 2)), "value_only": (0, (1.2, 1.6))}
_SPARE_COLOURS = ("#7a5195", "#8c6d31", "#1b7837", "#aa3377")

RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#98a2b3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#475467",
    "ytick.color": "#475467",
    "xtick.major.size": 3.5,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(draw: Callable[[Results], Figure | None]) -> Callable[[Results], bytes | None]:
    """Run a drawing function in the shared style and return the PNG it makes.

    Args:
        draw: makes a figure, or None where there is nothing to draw.
    Returns:
        A function that gives the PNG, or None; matplotlib's global settings stay as they are.
    """

    @wraps(draw)
    def drawn(results: Results) -> bytes | None:
        with matplotlib.rc_context(RC):
            figure = draw(results)
            if figure is None:
                return None
            FigureCanvasAgg(figure)
            image = BytesIO()
            figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
            return image.getvalue()

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure with a canvas of its own, so that no global state is touched.

    Args:
        width, height: in inches.
    Returns:
        The figure.
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def frame(figure: Figure, results: Results, sections: Sequence[str], title: str, subtitle: str) -> None:
    """Write title and subtitle above the axes and the conditions below, at fixed distances from the edges.

    Args:
        figure: the figure.
        results: a results folder.
        sections: result files the plot draws from; the conditions of the first one present are written.
        title, subtitle: what the plot shows, and how to read it.
    """
    width, height = figure.get_size_inches()
    left = 0.18 / width
    figure.text(left, 1 - 0.16 / height, title, fontsize=13, fontweight="bold", va="top")
    words = "\n".join(textwrap.wrap(subtitle, int(width * 14))[:2])
    figure.text(left, 1 - 0.44 / height, words, fontsize=9, color=MUTED, va="top", linespacing=1.35)
    settings = next((settings_text(results.sections[name]) for name in sections if name in results.sections), "")
    lines = textwrap.wrap(printable(settings), int(width * 19))[:2]
    figure.text(left, 0.10 / height, "\n".join(lines), fontsize=7, color=MUTED, va="bottom", linespacing=1.4)


def printable(text: str) -> str:
    """Replace characters that the plot's font may lack.

    Args:
        text: foreign text.
    Returns:
        Text of Latin-1 characters, "?" for the others, at most 300 characters.
    """
    return text.encode("latin-1", "replace").decode("latin-1")[:300]


def colour(name: str) -> str:
    """Return the colour of a variant, the same in every plot.

    Args:
        name: the variant; unknown ones get a spare colour by name.
    Returns:
        A hex colour.
    """
    return COLOURS.get(name) or _SPARE_COLOURS[sum(name.encode()) % len(_SPARE_COLOURS)]


def line_style(name: str) -> dict[str, Any]:
    """Return the line of a variant: colour, mark and dashes.

    Args:
        name: the variant.
    Returns:
        Arguments of `Axes.plot`.
    """
    front = {"converted": 5, "original": 4}.get(name, 3)
    style = {
        "color": colour(name),
        "marker": _MARKS.get(name, "h"),
        "linestyle": _DASHES.get(name, "-"),
        "zorder": front,
    }
    edge = {"markeredgewidth": 0.0} if name == "value_only" else {"markeredgecolor": "white", "markeredgewidth": 0.8}
    return style | edge


def label(name: str) -> str:
    """Return the short label of a variant for a plot.

    Args:
        name: the variant.
    Returns:
        At most 24 printable characters.
    """
    return variant(name).short if name in VARIANTS else printable(name)[:24]


def errors(rows: Sequence[Row], factor: float = 1.0) -> list[list[float]]:
    """Return the lengths of error bars below and above the values; 0 where a row has no interval.

    Args:
        rows: measured rows.
        factor: the values are drawn times this.
    Returns:
        Two lists, as `Axes.errorbar` takes them.
    """
    below, above = [], []
    for row in rows:
        value = row.value
        below.append(max(value - row.ci_low, 0) * factor if row.ci_low is not None else 0.0)
        above.append(max(row.ci_high - value, 0) * factor if row.ci_high is not None else 0.0)
    return [below, above]
