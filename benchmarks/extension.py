"""Longer texts than a model was trained on: loss by position, for each way of scaling rotary positions.

python -m benchmarks.extension DATA --model full=DIR --model bsbr=DIR --output benchmarks/results/extension.json

DATA is what `benchmarks.from_scratch prepare` wrote, DIR models that its `run --keep` saved, trained at 4,096 tokens.
A model whose name is `full` is also measured converted to BSBR, uncalibrated.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.from_scratch import load_corpus
from benchmarks.training_rows import conditions
from bsbr import BSBRConfig, convert
from bsbr.files import write_json
from bsbr.hf import extend_positions, load_model
from bsbr.training.language_model import token_nll

METHODS = ("none", "linear", "dynamic", "yarn")
_CONVERTED = BSBRConfig(block_size=64, top_k=8, dense_below=0)


@torch.no_grad()
def main() -> None:
    """Measure every model with every method at every length, and write one JSON file after each."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    stream = load_corpus(Path(options.data), device).held_out
    rows: list[dict[str, Any]] = []
    for given in options.model:
        name, _, folder = given.partition("=")
        stock = load_model(folder, dtype="float32", device=str(device))
        variants = {name: lambda model: model}
        if name == "full":
            variants["full, converted"] = lambda model: convert(model, _CONVERTED)
        for length in options.lengths:
            for method in METHODS:
                if method != "none" and length <= options.trained:
                    continue
                model = stock
                if method != "none":
                    model = extend_positions(stock, length, method, trained_length=options.trained)
                for variant, change in variants.items():
                    row = {"model": variant, "method": method, "length": length}
                    rows.append(row | measure(change(model).eval(), stream, length, options.windows))
                    print(row, rows[-1]["nll"], flush=True)
                    write_json(options.output, _content(options, rows, device))


def measure(model: Any, stream: torch.Tensor, length: int, most: int) -> dict[str, Any]:
    """Mean loss over windows, whole and by octave of position."""
    count = min(most, (len(stream) - 1) // length)
    step = (len(stream) - 1 - length) // max(1, count - 1) if count > 1 else 0
    losses = torch.zeros(length, dtype=torch.float64)
    with torch.autocast(stream.device.type, torch.bfloat16, enabled=stream.device.type == "cuda"):
        for i in range(count):
            window = stream[i * step : i * step + length + 1].long()[None]
            losses += token_nll(model, window)[0].double().cpu() / count
    edges = [0, 1024]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1]))
    by_position = [{"first": a, "last": b - 1, "nll": losses[a:b].mean().item()} for a, b in itertools.pairwise(edges)]
    return {"nll": losses.mean().item(), "windows": count, "by_position": by_position}


def _content(options: argparse.Namespace, rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.extension", "version": 1},
        "protocol": {
            "text": "windows spread evenly over the held-out stream, in which books follow each other",
            "method": "positions as trained, or scaled from the trained length to the window's; no training after it",
            "converted": _CONVERTED.to_dict(),
        },
        "trained": options.trained, "rows": rows, **conditions(sys.argv, device),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--trained", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True)
    return parser


if __name__ == "__main__":
    main()
