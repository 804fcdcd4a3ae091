"""Quality of a fine-tuned model against the tokens it was trained on."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bsbr.report.plots.style import DPI, MUTED, RC, colour

_PANELS = (
    ("kl", "KL to the original (nats)"),
    ("top1_agreement", "top-1 agreement"),
    ("ppl_ratio", "perplexity ratio"),
)
_STAGES = {"transfer": "attention transfer", "distill": "distillation", "language": "language model"}


def draw_finetuning(record: Mapping[str, Any]) -> bytes:
    """Draw held-out KL, agreement and perplexity against tokens, stage after stage.

    Args:
        record: content of `finetune.json`.
    Returns:
        The plot, PNG.
    """
    points = _points(record)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        recipe, blue = record["recipe"], colour("converted")
        figure.suptitle(
            f"Fine-tuning ({recipe['scope']}): held-out windows of {recipe['length']} tokens", x=0.01, ha="left"
        )
        for axes, (metric, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            values = [row[f"held_out_{metric}"] for _, row in points]
            axes.plot([x for x, _ in points], values, marker="o", ms=3, color=blue, label="on the way (fewer windows)")
            for when, x in (("before", 0), ("after", points[-1][0])):
                found = record[when]["converted"]
                ends = [found.get(f"{metric}_{end}", found[metric]) for end in ("low", "high")]
                axes.vlines(x, *ends, color=blue, lw=2.5, alpha=0.4)
                axes.plot(x, found[metric], "D", ms=5, color=blue, mfc="white", label="before and after" if x else None)
            axes.set_title(title, loc="left", fontsize=9.5)
            axes.set_xlabel("tokens trained")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            for stage, end in _ends(record):
                axes.axvline(end, color=MUTED, lw=0.6, ls=":")
                axes.annotate(
                    _STAGES[stage], (end, 1), xycoords=("data", "axes fraction"), xytext=(-3, -3), rotation=90,
                    textcoords="offset points", ha="right", va="top", fontsize=7, color=MUTED,
                )  # fmt: skip
        figure.axes[0].legend(fontsize=7, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _ends(record: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Each stage that was run, and the tokens trained when it ended."""
    ends, total = [], 0
    for stage in _STAGES:
        tokens = [row["tokens"] for row in record["history"] if row["stage"] == stage]
        if tokens:
            total += max(tokens)
            ends.append((stage, total))
    return ends


def _points(record: Mapping[str, Any]) -> list[tuple[int, Mapping[str, float]]]:
    """Tokens trained so far, and the held-out figures then."""
    starts, total = {}, 0
    for stage, end in _ends(record):
        starts[stage], total = total, end
    return [(starts[row["stage"]] + row["tokens"], row) for row in record["history"]]
