"""How near a whole converted model comes to one without attention, where the original takes too long to wait for.

python -m benchmarks.floor --lengths 32768
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.evaluation.speed import SpeedSettings, prefill_call, speedup_estimate, time_calls, time_estimate
from bsbr.files import write_json
from bsbr.hf.convert import convert
from bsbr.peers import ValueOnlyConfig


def main() -> None:
    """Time both at each length, and write one JSON file."""
    options = _parser().parse_args()
    config = BSBRConfig(top_k=options.top_k, dense_below=options.dense_below)
    settings = SpeedSettings(rounds=options.rounds, warmup=1, least_rounds=options.rounds)
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(n_positions=max(options.lengths))).eval()
    models = {"converted": convert(original, config), "value_only": convert(original, ValueOnlyConfig())}
    rows = []
    for length in options.lengths:
        ids = torch.randint(original.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
        calls = {name: prefill_call(model, ids, last_logits_only=True) for name, model in models.items()}
        samples = time_calls(calls, settings)
        ratio = speedup_estimate(samples["converted"], samples["value_only"])
        times = {name: time_estimate(found) for name, found in samples.items()}
        rows.append(
            {
                "length": length,
                "time_s": {
                    name: {"median": x.value, "q20": x.low, "q80": x.high, "n": x.n} for name, x in times.items()
                },
                "over_floor": {"median": ratio.value, "q20": ratio.low, "q80": ratio.high, "n": ratio.n},
            }
        )
        Console().print(
            f"{length} tokens: converted {times['converted'].value:.1f} s, without attention "
            f"{times['value_only'].value:.1f} s, {ratio.value:.3f} times the floor"
        )
        write_json(
            options.output,
            {
                "schema": {"name": "bsbr.benchmarks.floor", "version": 1},
                "command": [without_folders(word) for word in sys.argv],
                "code": code_versions(),
                "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
                "model": "GPT-2's shape (124 M), random weights, logits of the last position",
                "config": config.to_dict(),
                "protocol": "one warm-up each, then rounds A B B A; medians; the ratio is paired within rounds",
                "rows": rows,
            },
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(32768,), help="tokens")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--dense-below", type=int, default=BSBRConfig.dense_below, help="positions below it are exact")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/floor_cpu.json"))
    return parser


if __name__ == "__main__":
    main()
