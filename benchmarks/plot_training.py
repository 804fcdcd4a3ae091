"""Draw what models trained from scratch learned, from the committed result files.

python -m benchmarks.plot_training

Above: held-out loss on the way, and the final one by position, both as the difference from full attention of the same
seed. Below: accuracy on recall tasks by length. Lines are means over seeds, bands a standard deviation each way.
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

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "full": "full", "bsbr": "BSBR", "window": "window of 576", "linear": "linear", "gated_delta": "Gated DeltaNet",
}  # fmt: skip
_TASKS = ("passkey", "mqar", "needle_multikey")


def main() -> None:
    """Draw every plot into one file."""
    options = _parser().parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "bsbr"  # the same file from the same numbers
    figure, axes = plt.subplots(2, 3, figsize=(14, 8))
    models = json.loads((options.results / "from_scratch.json").read_text())["rows"]
    draw_losses(axes[0, 0], models)
    draw_differences(axes[0, 1], models, "tokens", "history")
    draw_differences(axes[0, 2], models, "position", "nll_by_eighth")
    recall = json.loads((options.results / "recall.json").read_text())["rows"]
    for axis, task in zip(axes[1], _TASKS, strict=True):
        draw_recall(axis, [row for row in recall if row["task"] == task], task)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})


def draw_losses(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Held-out loss on the way, by attention."""
    for name in NAMES:
        own = [[h["held_out_nll"] for h in row["history"]] for row in rows if row["attention"] == name]
        if own:
            tokens = [h["tokens"] for h in next(row for row in rows if row["attention"] == name)["history"]]
            band(axis, tokens, np.array(own), NAMES[name])
    axis.set(title="held-out loss while training", xlabel="tokens", ylabel="nats per token", xscale="log", yscale="log")


def draw_differences(axis: Axes, rows: list[dict[str, Any]], across: str, key: str) -> None:
    """Differences from full attention of the same seed, while training or by position."""

    def values(row: dict[str, Any]) -> np.ndarray:
        return np.array([h["held_out_nll"] for h in row[key]] if key == "history" else row[key])

    full = {row["seed"]: values(row) for row in rows if row["attention"] == "full"}
    for name in list(NAMES)[1:]:
        own = [row for row in rows if row["attention"] == name and row["seed"] in full]
        if own:
            x = [h["tokens"] for h in own[0]["history"]] if key == "history" else np.arange(1, 9) * 512
            band(axis, x, np.array([values(row) - full[row["seed"]] for row in own]), NAMES[name])
    axis.axhline(0, color="grey", linewidth=1)
    axis.set(title=f"loss minus full attention's, by {across}", xlabel=across, ylabel="nats per token")
    axis.set_ylim(-0.05, 0.3)


def draw_recall(axis: Axes, rows: list[dict[str, Any]], task: str) -> None:
    """Accuracy by length, models and controls."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        for score in row["scores"]:
            who = NAMES.get(row["attention"], row["attention"])
            who += "" if score["model"] == "trained" else f", {score['model'].replace('_', ' ')}"
            found.setdefault(who, {}).setdefault(score["length"], []).append(score["accuracy"]["value"])
    for who, own in found.items():
        lengths = sorted(own)
        means = [float(np.mean(own[n])) for n in lengths]
        spread = [float(np.std(own[n], ddof=1)) if len(own[n]) > 1 else 0.0 for n in lengths]
        axis.errorbar(lengths, means, spread, fmt="o:" if "," in who else "o-", label=who, capsize=2)
    axis.axvline(4096, color="grey", linewidth=1)
    axis.set(title=f"{task.replace('_', ', ')}, trained up to 4,096", xlabel="tokens", ylabel="accuracy", xscale="log")
    axis.set_ylim(-0.03, 1.03)


def band(axis: Axes, x: Any, values: np.ndarray, label: str) -> None:
    """Draw the mean of [seeds, points] and a band of a standard deviation each way."""
    mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    (line,) = axis.plot(x, mean, "o-", markersize=3, label=f"{label}, {len(values)} seeds")
    axis.fill_between(x, mean - deviation, mean + deviation, alpha=0.2, color=line.get_color())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.svg")
    return parser


if __name__ == "__main__":
    main()
