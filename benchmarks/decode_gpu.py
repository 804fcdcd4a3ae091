"""Attention of one decoded token on a GPU against the fastest dense kernels, all under CUDA graphs.

A graph holds one step of several layers, each with a cache of its own, so that nothing is read from the GPU's cache.

python -m benchmarks.decode_gpu --batches 1 16
"""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_gpu import TOLERANCE, summary
from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, without_folders
from bsbr.files import write_json
from bsbr.ops import reference_attention
from bsbr.ops.block_cache import BlockCache

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
REPLAYS = 25


@torch.no_grad()
def main() -> None:
    """Check and time every batch size, and write one JSON file."""
    options = _parser().parse_args()
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=0)
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        # half a block further than the dense contenders have, so that the own block is half full
        length = options.length + config.block_size // 2
        layers = [Layer(seed, batch, length, options, config) for seed in range(max(2, options.layers // batch))]
        checked = check(layers[0], length, config)
        found: dict[str, Any] = {}
        refused: dict[str, str] = {}
        calls = contenders(options.length)
        for name, call in (
            (name, calls[name]) for name in (["bsbr", *options.contenders] if options.contenders else calls)
        ):
            try:
                found[name] = timed(call, layers)
            except Exception as error:
                if name == "bsbr":
                    raise
                refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                torch.cuda.synchronize()
        best = min((name for name in found if name != "bsbr"), key=lambda name: found[name]["median"])
        row = {
            "batch": batch,
            "length": options.length,
            "layers": len(layers),
            "checked": checked,
            "time_us": found,
            "best_baseline": best,
            "speedup": {name: found[name]["median"] / found["bsbr"]["median"] for name in found if name != "bsbr"},
            "finish_block_us": finish_block(layers[0], length, config),
            "refused": refused,
        }
        rows.append(row)
        print(batch, {name: round(x["median"], 1) for name, x in found.items()}, "best", best,
              round(row["speedup"][best], 2), checked, round(row["finish_block_us"]), refused, flush=True)  # fmt: skip
        del layers
        gc.collect()
        torch.cuda.empty_cache()
        write_json(options.output, _header(options, config) | {"rows": rows})


class Layer:
    """One layer's cache, the dense keys and values of the same length, and a new token."""

    def __init__(self, seed: int, batch: int, length: int, options: argparse.Namespace, config: BSBRConfig) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(tokens: int, heads: int) -> Tensor:
            shape = batch, tokens, heads, options.width
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        self.k, self.v = (
            torch.empty(batch, options.key_heads, length, options.width, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        for x in (self.k, self.v):
            x.normal_(generator=generator)
        self.cache = BlockCache(config)
        self.cache.fill(self.k.transpose(1, 2), self.v.transpose(1, 2))
        self.token = normal(1, options.heads), normal(1, options.key_heads), normal(1, options.key_heads)

    def step(self) -> Tensor:
        """Append the token and attend from it."""
        return self.cache.attend(*self.token, scale=self.token[0].shape[-1] ** -0.5)


def contenders(length: int) -> dict[str, Callable[[Layer], object]]:
    """What is timed, by name: "grouped" takes query heads as they are, "packed" as queries of their key head."""

    def sdpa(backend: SDPBackend, packed: bool) -> Callable[[Layer], object]:
        def attend(layer: Layer) -> Tensor:
            q, (k, v) = layer.token[0].transpose(1, 2), (x[:, :, :length] for x in (layer.k, layer.v))
            if packed:
                q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=not packed)

        return attend

    def products(layer: Layer) -> Tensor:
        k, v = (x[:, :, :length].flatten(0, 1) for x in (layer.k, layer.v))
        q = layer.token[0].reshape(k.shape[0], -1, k.shape[2])
        return torch.bmm(torch.bmm(q * k.shape[2] ** -0.5, k.mT).softmax(-1), v)

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(layer: Layer) -> object:
        k, v = (x[:, :, :length] for x in (layer.k, layer.v))
        return compiled(layer.token[0].transpose(1, 2), k, v, enable_gqa=True)

    calls: dict[str, Callable[[Layer], object]] = {"bsbr": Layer.step}
    for name, backend in BACKENDS.items():
        for packed in (False, True):
            calls[f"sdpa-{name}, {'packed' if packed else 'grouped'}"] = sdpa(backend, packed)
    return calls | {"products": products, "flex": flex}


def check(layer: Layer, length: int, config: BSBRConfig) -> dict[str, float]:
    """Compare the next token with the float64 reference, for two rows and two key heads; then take it away again."""
    o = layer.step()
    layer.cache.crop([length] * len(layer.k))
    q, new_k, new_v = layer.token
    group, worst = q.shape[2] // layer.k.shape[1], 0.0
    for row in {0, len(o) - 1}:
        for head in (0, layer.k.shape[1] - 1):
            heads = slice(head * group, (head + 1) * group)
            k, v = (
                torch.cat([old[row : row + 1, head, :, None], new[row : row + 1, :, head : head + 1]], 1)
                for old, new in ((layer.k, new_k), (layer.v, new_v))
            )
            own_q = q[row : row + 1, :, heads]
            expected, _, chosen = reference_attention(own_q, k, v, config, q_start=length)
            options = {"q_start": length, "block_indices": chosen}
            absolute = reference_attention(own_q, k, v.abs(), config, **options)[0].abs()
            worst = max(worst, ((o[row : row + 1, :, heads] - expected).abs() / absolute).max().item())
    if not worst <= TOLERANCE:
        raise SystemExit(f"{worst:.3g} away from the float64 reference, not timed")
    return {"max_error": worst}


def timed(call: Callable[[Layer], object], layers: list[Layer]) -> dict[str, Any]:
    """Microseconds a layer: a graph of all layers, replayed behind a pause so that launching is not timed."""
    for layer in layers:
        call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(layer) for layer in layers]
    samples = []
    for _ in range(REPLAYS + 3):
        torch.cuda._sleep(1_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / len(layers))
    del kept, graph
    return summary(samples[3:])


def finish_block(layer: Layer, length: int, config: BSBRConfig) -> float:
    """Microseconds for summarising a block that is full, once in `block_size` tokens, launching included."""
    layer.cache.crop([length] * len(layer.k))
    for _ in range(config.block_size - length % config.block_size - 1):
        layer.step()
    samples = []
    for _ in range(4):
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        before = layer.cache.lengths
        events[0].record()
        layer.cache.replayed()
        events[1].record()
        events[1].synchronize()
        samples.append(1e3 * events[0].elapsed_time(events[1]))
        layer.cache.crop(before)
    return sorted(samples[1:])[1]


def _header(options: argparse.Namespace, config: BSBRConfig) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.decode_gpu", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions(),
        "machine": {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "dtype": "bfloat16"},
        "config": config.to_dict(),
        "protocol": {
            "shape": [f"{options.heads}/{options.key_heads}", str(options.width)],
            "input": "normal",
            "bsbr": "append one token and attend from it, in a cache of length + block_size / 2 tokens",
            "dense": "attention of one token to ready keys and values, nothing appended",
            "time": "device time of a CUDA graph that holds one step of every layer, divided by the layers; median",
            "finish_block_us": "summarising a full block, once in block_size tokens and not in the step's time",
            "correct": f"the step of the first layer, two rows and two key heads, within {TOLERANCE} of the float64 "
            "reference, relative to the weighted mean of absolute values",
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=131072, help="tokens that dense attention reads")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--layers", type=int, default=8, help="at batch 1; fewer at larger ones, at least 2")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--contenders", nargs="+", default=(), help="bsbr and these; nothing means all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode_gpu.json"))
    return parser


if __name__ == "__main__":
    main()
