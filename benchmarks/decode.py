"""One decoded token at GPT-2's shape: a BSBRCache against the dense model's DynamicCache and PyTorch's attention.

The caches are filled with random keys and values, since reading the tokens first would tell nothing about decoding.
First the attention of one layer alone, then the whole model of 12 layers with random weights and extended positions.

python -m benchmarks.decode --length 32704
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bsbr import BSBRConfig, convert
from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.evaluation.speed import SpeedSettings, speedup_estimate, time_calls, time_estimate
from bsbr.evaluation.statistics import Estimate
from bsbr.files import write_json
from bsbr.hf import BSBRCache
from bsbr.ops import reference_attention
from bsbr.ops.block_cache import BlockCache

LAYERS, HEADS, WIDTH = 12, 12, 64
"""Shape of GPT-2 small."""

CONTENDERS = ("dense", "sdpa", "bsbr")
"""DynamicCache and PyTorch's attention; the latter alone, as if appending were free (one layer only); a BSBRCache."""

PARTS = ("attention", "model")
TOLERANCE = 1e-4
"""Largest difference from the float64 reference that is still right for float32."""


@torch.no_grad()
def main() -> None:
    """Check, time both parts, and write one JSON file."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=0)
    settings = SpeedSettings(rounds=options.rounds, budget_s=options.budget)
    error = largest_error(options.length, config)
    if error > TOLERANCE:
        raise SystemExit(f"{error:.2g} away from the float64 reference, not timed")
    rows: list[dict[str, Any]] = []
    for part in options.parts:
        calls, sizes = (attention_calls if part == "attention" else model_calls)(options.length, config)
        samples = time_calls(calls, settings)
        rows.append(
            {
                "part": part,
                "length": options.length,
                "time_s": {name: _as_dict(time_estimate(samples[name])) for name in samples},
                "speedup": {
                    name: _as_dict(speedup_estimate(samples[name], samples["bsbr"]))
                    for name in samples
                    if name != "bsbr"
                },
                "cache_bytes": sizes,
                "samples_s": samples,
            }
        )
    write_json(options.output, _header(config, settings, error) | {"rows": rows})
    Console().print(_table(rows))


def draw(length: int, tokens: int = 1) -> list[Tensor]:
    """Random q, k, v of tokens that follow `length` others, [1, tokens, heads, width]."""
    generator = torch.Generator().manual_seed(length + tokens)
    return [torch.randn(1, HEADS, tokens, WIDTH, generator=generator).transpose(1, 2) for _ in range(3)]


def filled(length: int, config: BSBRConfig) -> tuple[BlockCache, Tensor, Tensor]:
    """A layer's cache of random keys and values, and these, [1, length, heads, width]."""
    _, k, v = draw(0, length)
    cache = BlockCache(config)
    cache.fill(k, v)
    return cache, k, v


def largest_error(length: int, config: BSBRConfig) -> float:
    """Largest difference of the next token's attention from the float64 reference."""
    cache, k, v = filled(length, config)
    q, new_k, new_v = draw(length)
    o = cache.attend(q, new_k, new_v, scale=WIDTH**-0.5)
    k, v = torch.cat([k, new_k], 1), torch.cat([v, new_v], 1)
    expected = reference_attention(q, k, v, config, q_start=length)[0]
    return (o - expected).abs().max().item()


def attention_calls(length: int, config: BSBRConfig) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Append one token and attend from it, in one layer; then take the token away again."""
    cache, k, v = filled(length, config)
    q, new_k, new_v = draw(length)
    stock = DynamicCache()
    stock.update(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), 0)
    by_head = [x.transpose(1, 2) for x in (q, new_k, new_v)]
    held = stock.layers[0].keys, stock.layers[0].values

    def dense() -> None:
        keys, values = stock.update(by_head[1], by_head[2], 0)
        scaled_dot_product_attention(by_head[0], keys, values)
        stock.crop(-1)

    def sdpa() -> None:
        scaled_dot_product_attention(by_head[0], held[0], held[1])

    def bsbr() -> None:
        cache.attend(q, new_k, new_v, scale=WIDTH**-0.5)
        cache.crop([length])

    calls = {"dense": dense, "sdpa": sdpa, "bsbr": bsbr}
    return calls, {"dense": k.nbytes + v.nbytes, "bsbr": sum(cache.num_bytes().values())}


def model_calls(length: int, config: BSBRConfig) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """One step of the whole model; the token is taken away again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = GPT2LMHeadModel(GPT2Config(n_positions=length + 1)).eval()
    converted, token = convert(original, config), torch.zeros(1, 1, dtype=torch.long)
    stock, ours = DynamicCache(config=original.config), BSBRCache(converted.config)
    for layer in range(LAYERS):
        _, k, v = draw(layer, length)
        ours.layers[layer].fill(k.transpose(1, 2), v.transpose(1, 2))  # type: ignore[union-attr]
        stock.update(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), layer)

    def step(model: Any, cache: Any) -> None:
        model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    sizes = {"dense": 2 * LAYERS * k.nbytes, "bsbr": sum(ours.num_bytes().values())}
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: step(original, stock),
        "bsbr": lambda: step(converted, ours),
    }
    return calls, sizes


def _as_dict(estimate: Estimate) -> dict[str, Any]:
    return {"median": estimate.value, "q20": estimate.low, "q80": estimate.high, "n": estimate.n}


def _header(config: BSBRConfig, settings: SpeedSettings, error: float) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.decode", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
        "config": config.to_dict(),
        "protocol": {
            "shape": [str(LAYERS), str(HEADS), str(WIDTH)],
            "input": "caches filled with normal keys and values, seeded; weights random",
            "step": "one token appended and attended from, then cropped away, all of it timed",
            "dense": "the original model or one layer of it: DynamicCache and scaled_dot_product_attention",
            "sdpa": "scaled_dot_product_attention on prepared tensors: what dense would take if appending were free",
            "order": "interleaved: in every round all in their order, then in reverse",
            "rounds": settings.rounds,
            "budget_s": settings.budget_s,
            "time": "median and 20, 80 % quantiles of samples; speedup paired within rounds",
            "max_error": error,
            "correct": f"the step of one layer within {TOLERANCE} of the float64 reference, before timing",
        },
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="One decoded token, milliseconds (median), how many times as fast, cache")
    for heading in (
        "part",
        "T",
        *(f"{name} ms" for name in CONTENDERS),
        "than dense",
        "than sdpa",
        "dense MB",
        "BSBR MB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        times, ratios = (
            [f"{factor * values[name]['median']:.2f}" if name in values else "-" for name in names]
            for factor, values, names in ((1e3, row["time_s"], CONTENDERS), (1, row["speedup"], CONTENDERS[:2]))
        )
        sizes = [f"{row['cache_bytes'][name] / 1e6:.0f}" for name in ("dense", "bsbr")]
        table.add_row(row["part"], str(row["length"]), *times, *ratios, *sizes)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=32704, help="tokens in the cache")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is timed")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's number")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a part may take, at least 3 rounds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode_cpu.json"))
    return parser


if __name__ == "__main__":
    main()
