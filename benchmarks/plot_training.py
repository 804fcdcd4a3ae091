"""Draw what models trained from scratch learned, from the committed result files.

python -m benchmarks.plot_training

Above: held-out loss on the way, and its difference from full attention of the same seed, on the way and by position.
Lines are means over seeds, bands a standard deviation each way. Below: accuracy on recall tasks by length; lines are
means, points are seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "full": "full", "bsbr": "BSBR", "window": "window of 576", "linear": "linear", "gated_delta": "Gated DeltaNet",
    "bsbr_units": "BSBR, units of 16",
}  # fmt: skip
_CONTROLS = {"random_blocks": ":", "retrieval_off": "--", "summaries_only": "-."}
_TASKS = ("passkey", "mqar", "needle_multikey")
_WIDEST = 0.25
"""Differences that are drawn, nats; a line that leaves this range says in the legend where it ends."""


def main() -> None:
    """Draw every plot into one file."""
    options = _parser().parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "bsbr"  # the same file from the same numbers
    figure, axes = plt.subplots(2, 3, figsize=(14, 9))
    models = json.loads((options.results / "from_scratch.json").read_text())["rows"]
    draw_losses(axes[0, 0], models)
    draw_differences(axes[0, 1], models, "million tokens", "history")
    draw_differences(axes[0, 2], models, "position", "nll_by_eighth")
    recall = json.loads((options.results / "recall.json").read_text())["rows"]
    for axis, task in zip(axes[1], _TASKS, strict=True):
        draw_recall(axis, [row for row in recall if row["task"] == task], task)
    for axis in axes[0]:
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes[1] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=-(-len(handles) // 2), fontsize=8)
    figure.savefig(options.output, metadata={"Date": None})


def draw_losses(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Held-out loss on the way, by attention."""
    for number, name in enumerate(NAMES):
        own = [row["history"] for row in rows if row["attention"] == name]
        if own:
            tokens = [h["tokens"] / 1e6 for h in own[0]]
            band(axis, tokens, np.array([[h["held_out_nll"] for h in x] for x in own]), NAMES[name], number)
    axis.set(title="held-out loss while training", xlabel="million tokens", ylabel="nats per token")


def draw_differences(axis: Axes, rows: list[dict[str, Any]], across: str, key: str) -> None:
    """Differences from full attention of the same seed, while training or by position."""

    def values(row: dict[str, Any]) -> np.ndarray:
        return np.array([h["held_out_nll"] for h in row[key]] if key == "history" else row[key])

    full = {row["seed"]: values(row) for row in rows if row["attention"] == "full"}
    for number, name in enumerate(NAMES):
        own = [row for row in rows if row["attention"] == name and row["seed"] in full]
        if own and name != "full":
            x = [h["tokens"] / 1e6 for h in own[0]["history"]] if key == "history" else np.arange(1, 9) * 512
            apart = np.array([values(row) - full[row["seed"]] for row in own])
            end = apart.mean(0)[-1]
            band(axis, x, apart, NAMES[name] + (f", ends at {end:+.2f}" if abs(end) > _WIDEST else ""), number)
    axis.axhline(0, color="grey", linewidth=1)
    axis.set(title="loss minus full attention's, same seed", xlabel=across, ylabel="nats per token")
    axis.set_ylim(-_WIDEST, _WIDEST)


def draw_recall(axis: Axes, rows: list[dict[str, Any]], task: str) -> None:
    """Accuracy by length, models and controls."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        for score in row["scores"]:
            own = found.setdefault((row["attention"], score["model"]), {})
            own.setdefault(score["length"], []).append(score["accuracy"]["value"])
    for (name, model), own in found.items():
        lengths, color = sorted(own), f"C{list(NAMES).index(name)}"
        label = NAMES[name] + ("" if model == "trained" else f", {model.replace('_', ' ')}")
        means = [float(np.mean(own[n])) for n in lengths]
        axis.plot(lengths, means, _CONTROLS.get(model, "-"), color=color, label=label)
        axis.plot([n for n in lengths for _ in own[n]], [x for n in lengths for x in own[n]], ".", color=color)
    steps = " or ".join(f"{n:,}" for n in sorted({row["steps"] for row in rows}))
    axis.axvline(4096, color="grey", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(title=f"{task.replace('_', ', ')}, {steps} steps at up to 4,096", xlabel="tokens", ylabel="accuracy")
    axis.set_ylim(-0.03, 1.03)


def band(axis: Axes, x: Any, values: np.ndarray, label: str, number: int) -> None:
    """Draw the mean of [seeds, points] and a band of a standard deviation each way, in the color of a number."""
    mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    axis.plot(x, mean, "o-", markersize=3, label=f"{label}, {len(values)} seeds", color=f"C{number}")
    axis.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, color=f"C{number}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.svg")
    return parser


if __name__ == "__main__":
    main()
