"""Losses of a pretraining run against the tokens it read."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bsbr.report.plots.style import DPI, MUTED, RC, colour


def draw_pretraining(record: Mapping[str, Any]) -> bytes:
    """Draw training and held-out loss, and accuracy where it was measured, against tokens.

    Args:
        record: content of `training.json`.
    Returns:
        The plot, PNG.
    """
    history = record["history"]
    tokens = [row["tokens"] for row in history]
    panels = [("loss (nats per token)", {"train_loss": "training", "held_out_nll": "held out"})]
    if any("accuracy" in row for row in history):
        panels.append(("accuracy", {"accuracy": "held out"}))
    colours = {"train_loss": MUTED, "held_out_nll": colour("converted"), "accuracy": colour("converted")}
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(5.2 * len(panels) + 1.5, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, label in curves.items():
                axes.plot(tokens, [row[name] for row in history], marker="o", ms=3, color=colours[name], label=label)
            axes.set_title(title, loc="left", fontsize=9.5)
            axes.set_xlabel("tokens trained")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.legend(fontsize=7, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
