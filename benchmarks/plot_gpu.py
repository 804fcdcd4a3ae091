"""Draw time and speed-up of the attention on a GPU, and its stages beside their floors, from committed result files.

python -m benchmarks.plot_gpu
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FILES = ("attention_gpu_million.json", "attention_gpu_long.json", "attention_gpu.json")
STAGES = "stages_gpu.json"
NAMES = {
    "bsbr": "BSBR",
    "far field dropped": "far field dropped, as in MoBA",
    "sdpa-cudnn": "cuDNN",
    "sdpa-flash": "FlashAttention-2",
}


def main() -> None:
    """Draw both plots into one file."""
    options = _parser().parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "bsbr"  # the same file from the same numbers
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharex=True)
    for column, name in enumerate(("forward", "forward+backward")):
        times = collect(options.results, name)
        exponents = load(options.results, FILES[1 if name == "forward" else 2])["exponents"]
        for number, contender in enumerate(NAMES):
            points = times.get(contender, {})
            lengths = sorted(points)
            exponent = exponents.get(f"{name}, {contender}")
            label = NAMES[contender] + (f", exponent {exponent:.2f}" if exponent else "")
            axes[0, column].loglog(lengths, [points[n] for n in lengths], "o-", color=f"C{number}", label=label)
            if contender.startswith("sdpa"):
                common = [n for n in lengths if n in times["bsbr"]]
                ratios = [points[n] / times["bsbr"][n] for n in common]
                axes[1, column].loglog(common, ratios, "o-", color=f"C{number}", label=f"against {NAMES[contender]}")
        axes[0, column].set(title=name, ylabel="milliseconds")
        axes[1, column].axhline(1, color="grey", linewidth=1)
        axes[1, column].set(xlabel="tokens", ylabel="times as fast")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.legend()
    figure.tight_layout()
    figure.savefig(options.output, metadata={"Date": None})
    if (options.results / STAGES).exists():
        draw_stages(load(options.results, STAGES), options.output.with_name("stages_gpu.svg"))


def draw_stages(document: dict[str, Any], output: Path) -> None:
    """Time of each stage of the longest text, beside the least its bytes and operations could take."""
    rows, ceilings = document["rows"], document["ceilings"]
    longest = max(row["length"] for row in rows)
    names = [name for name in ("forward", "forward+backward") if any(row["pass"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in rows if row["length"] == longest and row["pass"] == name and row["floor_ms"] > 0]
        own.sort(key=lambda row: row["time_ms"])
        places = range(len(own))
        axis.barh(places, [row["time_ms"] for row in own], color="lightsteelblue", label="measured")
        axis.barh(places, [row["floor_ms"] for row in own], height=0.4, color="darkslateblue", label="least")
        for place, row in zip(places, own, strict=True):
            moving = row["gigabytes"] * 1e9 / ceilings["bytes_per_second"]
            bound = "memory" if moving > row["teraflop"] * 1e12 / ceilings["operations_per_second"] else "products"
            axis.text(row["time_ms"], place, f"  {row['reached']:.0%} of {bound}", va="center", fontsize=8)
        axis.set_yticks(places, [row["stage"] for row in own])
        axis.set(title=f"{name}, {longest:,} tokens", xlabel="milliseconds")
        axis.set_xlim(0, 1.35 * own[-1]["time_ms"])
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


def load(folder: Path, file: str) -> dict[str, Any]:
    """One result file."""
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found


def collect(folder: Path, name: str) -> dict[str, dict[int, float]]:
    """Median milliseconds of one pass by contender and length; of a length in several files the last one's."""
    times: dict[str, dict[int, float]] = {}
    for file in FILES:
        for row in load(folder, file)["rows"]:
            if row["pass"] == name:
                for contender, found in row["time_ms"].items():
                    times.setdefault(contender, {})[row["length"]] = found["median"]
    return times


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention_gpu.svg")
    return parser


if __name__ == "__main__":
    main()
