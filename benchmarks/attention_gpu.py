"""The attention alone on a GPU against PyTorch's fastest kernels: time, peak memory, and first whether it is right.

python -m benchmarks.attention_gpu --lengths 4096 16384 65536 131072
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_peers import OTHERS, other_call, versions
from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, without_folders
from bsbr.files import write_json
from bsbr.ops import UNCALIBRATED, bsbr_attention, reference_attention
from bsbr.ops.schedule import dense_until

PEERS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
DROP = "far field dropped"
"""The same blocks retrieved, and nothing else of the past, as MoBA does; by the same kernels."""
FLEX = "flex"
"""FlexAttention with the blocks that bsbr chose as its mask, and nothing else of the past."""

TOLERANCE = 2.0**-6
"""Largest error at a checked row in units of the weighted mean of absolute values: two roundings to bfloat16."""

CACHE = 256 << 20
"""Bytes written before every timed call, more than the GPU's cache holds."""

_PAUSE = 20_000_000
"""Clock cycles the GPU sleeps before every timed call, so that all its kernels are queued: launching is not timed."""


def main() -> None:
    """Check, time and weigh every length, and write one JSON file."""
    options = _parser().parse_args()
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=options.dense_below)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        tensors = draw(length, options.heads, options.key_heads, options.width)
        checked = check(tensors, config) if length > dense_until(config) else None
        for name in options.passes:
            contenders = ["bsbr", *options.drop, *(peer for peer in options.peers if length <= options.longest_peer)]
            contenders += [FLEX] if length <= options.flex_until and name == "forward" else []
            contenders += options.others if name == "forward" else []
            row = {
                "length": length,
                "pass": name,
                "density": density(length, config),
                "checked": checked,
                "time_ms": {},
            }
            row["peak_bytes"] = {}
            for contender in contenders:
                call = make_call(contender, name, tensors, config)
                samples, peak = measure(
                    call, options.budget, warm=contender not in PEERS or length <= options.warm_until
                )
                row["time_ms"][contender] = summary(samples)
                row["peak_bytes"][contender] = peak
            ours = row["time_ms"]["bsbr"]["median"]
            row["speedup"] = {peer: row["time_ms"][peer]["median"] / ours for peer in contenders[1:]}
            rows.append(row)
            print(f"{length:8d} {name:17s}", *(f"{c} {row['time_ms'][c]['median']:.3f} ms" for c in contenders),
                  {k: round(x, 2) for k, x in row["speedup"].items()}, checked, flush=True)  # fmt: skip
            write_json(options.output, _header(options, config) | {"rows": rows, "exponents": exponents(rows)})


def draw(length: int, heads: int, key_heads: int, width: int) -> list[Tensor]:
    """Random q, k, v and gradient of o in bfloat16, [1, T, heads, width]: no locality, the worst case for gathering."""
    generator = torch.Generator("cuda").manual_seed(length)
    return [
        torch.randn(1, length, count, width, generator=generator, device="cuda", dtype=torch.bfloat16)
        for count in (heads, key_heads, key_heads, heads)
    ]


def make_call(contender: str, name: str, tensors: list[Tensor], config: BSBRConfig) -> Callable[[], object]:
    """A call without arguments that does one pass of one contender."""
    dropped = BSBRConfig.from_dict(config.to_dict() | {"far": "drop", "state": "none"})

    if contender == FLEX:
        return _flex_call(tensors, config)
    if contender in OTHERS:
        return torch.no_grad()(other_call(contender, tensors, config))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if contender in ("bsbr", DROP):
            o = bsbr_attention(q, k, v, config if contender == "bsbr" else dropped)
            assert isinstance(o, Tensor)
            return o
        with sdpa_kernel(PEERS[contender]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*tensors[:3])

    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, tensors[3])

    return forward if name == "forward" else forward_backward


def _flex_call(tensors: list[Tensor], config: BSBRConfig) -> Callable[[], object]:
    """The mask is made before the clock starts; a tile of it is skipped only if none of its queries reads the block."""
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    length, first = q.shape[2], dense_until(config)
    chosen = _choice(tensors, config)[1][0].long()
    reads = torch.zeros(q.shape[1], length, length // config.unit + 1, dtype=torch.bool, device="cuda")
    reads[:, :first] = True
    reads[:, first:].scatter_(2, chosen.transpose(0, 1), True)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (reads[h, i, j // config.unit] | (j // config.block_size == i // config.block_size))

    blocks = create_block_mask(mask, 1, q.shape[1], length, length, _compile=True)
    attend = torch.compile(flex_attention)
    return lambda: attend(q, k, v, block_mask=blocks, enable_gqa=True)


def _choice(tensors: list[Tensor], config: BSBRConfig) -> tuple[Tensor, Tensor]:
    """The output, and the blocks chosen for the sparse queries, [1, S, HQ, top_k]."""
    from bsbr.ops.triton.operator import triton_attention

    q, k, v = tensors[:3]
    calibration = torch.tensor(UNCALIBRATED, device="cuda").expand(q.shape[2], 5).contiguous()
    with torch.no_grad():
        o, _, chosen = triton_attention(q, k, v, config, scale=q.shape[3] ** -0.5, q_start=0, calibration=calibration)
    return o, chosen


def check(tensors: list[Tensor], config: BSBRConfig, rows: int = 8) -> dict[str, float]:
    """Compare the tensors that are timed with the float64 reference, at rows of two prefixes and two key heads."""
    q, k, v = tensors[:3]
    group = q.shape[2] // k.shape[2]
    o, chosen = _choice(tensors, config)
    first = max(0, dense_until(config))
    worst, same, count = 0.0, 0, 0
    for share in (0.4, 1.0):
        stop = max(first + rows, int(k.shape[1] * share))
        for head in (0, k.shape[2] - 1):
            own, heads = slice(stop - rows, stop), slice(head * group, (head + 1) * group)
            inputs = (q[:, own, heads], k[:, :stop, head : head + 1], v[:, :stop, head : head + 1])
            picked = chosen[:, stop - rows - first : stop - first, heads].long().sort(-1).values
            given = {"q_start": stop - rows, "block_indices": picked}
            expected = reference_attention(*inputs, config, **given)[0]
            # values weigh at most this much: the bound's unit
            absolute = reference_attention(inputs[0], inputs[1], inputs[2].abs(), config, **given)[0].abs()
            wanted = reference_attention(*inputs, config, q_start=stop - rows)[2]
            worst = max(worst, ((o[:, own, heads] - expected).abs() / absolute).max().item())
            same += int((wanted == picked).all(-1).sum())
            count += wanted[..., 0].numel()
    if not worst <= TOLERANCE:
        raise SystemExit(f"T = {k.shape[1]}: {worst:.3g} away from the float64 reference, not timed")
    return {"max_error": worst, "same_choice": same / count, "rows": count}


def measure(call: Callable[[], object], budget_s: float, warm: bool = True) -> tuple[list[float], int]:
    """Milliseconds of each call, between events, cache flushed; 20 calls or what the budget allows, at least 3."""
    if warm:
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    samples: list[float] = []
    flush = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    while len(samples) < 20 and (len(samples) < 3 or sum(samples) < 1e3 * budget_s):
        flush.zero_()
        torch.cuda._sleep(_PAUSE)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        samples.append(start.elapsed_time(end))
        if samples[0] > 1e3 * budget_s:
            break
    return samples, torch.cuda.max_memory_allocated() - before - CACHE


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, spread and number."""
    ordered = sorted(samples)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return {"median": statistics.median(ordered), "q20": low, "q80": high, "n": len(ordered)}


def density(length: int, config: BSBRConfig) -> float:
    """Share of the causal (query, key) pairs that are read exactly."""
    position = torch.arange(length, dtype=torch.float64)
    sparse = position % config.block_size + 1 + config.top_k * config.unit
    read = torch.where(position < dense_until(config), position + 1, sparse)
    return (read.sum() / (position + 1).sum()).item()


def exponents(rows: list[dict[str, Any]], first: int = 16384, last: int = 524288) -> dict[str, float]:
    """Slope of log time over log length from `first` to `last` tokens, least squares."""
    slopes = {}
    for name in {row["pass"] for row in rows}:
        for contender in ("bsbr", *PEERS):
            points = [
                (math.log(row["length"]), math.log(row["time_ms"][contender]["median"]))
                for row in rows
                if row["pass"] == name and first <= row["length"] <= last and contender in row["time_ms"]
            ]
            if len(points) > 1:
                slopes[f"{name}, {contender}"] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return slopes


def _header(options: argparse.Namespace, config: BSBRConfig) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.attention_gpu", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions() | versions(options.others),
        "machine": {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "dtype": "bfloat16"},
        "config": config.to_dict(),
        "protocol": {
            "shape": ["1", "T", f"{options.heads}/{options.key_heads}", str(options.width)],
            "input": "normal, seeded with T",
            "time": "device time between CUDA events, cache flushed, queued behind a pause so that launching does not "
            "count, median of 20 calls or of as many as the budget allows",
            "budget_s": options.budget,
            "memory": "peak of the allocator above the level before the calls: outputs, gradients and workspace",
            "correct": f"the tensors timed, at rows of two prefixes and two key heads, within {TOLERANCE} of the "
            "float64 reference given the same choice of blocks, relative to the weighted mean of absolute values",
        },
    }


def problem_parser(description: str) -> argparse.ArgumentParser:
    """Options that say which attention is measured: shapes, settings and passes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(4096, 16384, 65536, 131072), help="tokens")
    parser.add_argument("--passes", nargs="+", choices=("forward", "forward+backward"), default=("forward",))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dense-below", type=int, default=4096, help="positions below it are exact")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = problem_parser(__doc__)
    parser.add_argument("--drop", action="store_const", const=(DROP,), default=(), help="time MoBA's form too")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=[], help="other attentions, forward")
    parser.add_argument("--flex-until", type=int, default=0, help="FlexAttention is timed up to this length, forward")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--warm-until", type=int, default=1 << 19, help="beyond, a peer's first call is the timed one")
    parser.add_argument("--longest-peer", type=int, default=1 << 20, help="peers are timed up to this length")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for the calls of one contender")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention_gpu.json"))
    return parser


if __name__ == "__main__":
    main()
