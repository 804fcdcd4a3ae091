"""Where the time of the attention goes on a GPU: each stage beside the least it could take (a roofline).

python -m benchmarks.stages_gpu --lengths 8192 32768 131072 --passes forward forward+backward
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention_gpu import CACHE, draw, make_call, problem_parser
from bsbr.config import BSBRConfig
from bsbr.evaluation.provenance import code_versions, without_folders
from bsbr.files import write_json
from bsbr.ops.schedule import dense_until

BANDWIDTH, RATE = 4.3e12, 790e12
"""Bytes a second of a large copy, operations a second of a large bfloat16 product, both measured on one H200."""

CALLS = 3

KERNELS = {
    "dense prefix": ("cudnn", "flash", "sm90_"),
    "summaries": ("_moments", "_running_mean"),
    "scores": ("_write_scores", "_write_scores_hopper"),
    "search": ("_choose", "_strike"),
    "far and local field": ("_attend_past",),
    "sort of pairs": ("_count", "_cut", "_place"),
    "retrieved field": ("_attend",),
    "merge": ("_merge",),
    "retrieved field, backward": ("_pairs_backward",),
    "far and local field, backward": ("_fields_backward",),
    "local keys, backward": ("_local_backward",),
    "far summaries, backward": ("_blocks_backward",),
    "states, backward": ("_states_backward", "_running_mean_backward"),
    "moments, backward": ("_moments_backward",),
    "sum of dq": ("_add",),
}
"""Stages, and the kernels of each; what none of them names is "the rest"."""


def main() -> None:
    """Profile every length, and write one JSON file."""
    options = _parser().parse_args()
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=options.dense_below)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        tensors = draw(length, options.heads, options.key_heads, options.width)
        for name in options.passes:
            times = stage_times(make_call("bsbr", name, tensors, config))
            least = work(length, options.heads, options.key_heads, options.width, config, name != "forward")
            for stage, found in times.items():
                gigabytes, teraflop = least.get(stage, (0.0, 0.0))
                floor = 1e3 * max(gigabytes * 1e9 / BANDWIDTH, teraflop * 1e12 / RATE)
                rows.append(
                    {"length": length, "pass": name, "stage": stage, "time_ms": found["ms"], "gigabytes": gigabytes,
                     "teraflop": teraflop, "floor_ms": floor, "reached": floor / found["ms"],
                     "kernels": found["kernels"]}
                )  # fmt: skip
            total = sum(found["ms"] for found in times.values())
            print(f"{length} {name}: {total:.3f} ms,", ", ".join(f"{k} {x['ms']:.3f}" for k, x in times.items()),
                  flush=True)  # fmt: skip
            write_json(options.output, _header(options, config) | {"rows": rows})


def stage_times(call: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Milliseconds of each stage in one call, the median of some, and the kernels it ran."""
    call()
    flush = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    samples: list[dict[str, dict[str, Any]]] = []
    for _ in range(CALLS):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        samples.append(by_stage(profiler))
    return {
        stage: {"ms": statistics.median(x[stage]["ms"] for x in samples if stage in x), "kernels": found["kernels"]}
        for stage, found in samples[-1].items()
    }


def by_stage(profiler: profile) -> dict[str, dict[str, Any]]:
    """Sum the device time of the kernels of each stage."""
    of_kernel = {kernel: stage for stage, kernels in KERNELS.items() for kernel in kernels}
    found: dict[str, dict[str, Any]] = {}
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CUDA or not event.self_device_time_total:
            continue
        stage = of_kernel.get(event.key)
        if stage is None:
            part = next((x for x in KERNELS["dense prefix"] if x in event.key), None)
            stage = "dense prefix" if part else "the rest"
        own = found.setdefault(stage, {"ms": 0.0, "kernels": {}})
        own["ms"] += event.self_device_time_total / 1e3
        own["kernels"][event.key[:60]] = event.count
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


def work(
    length: int, heads: int, key_heads: int, width: int, config: BSBRConfig, backward: bool
) -> dict[str, tuple[float, float]]:
    """What each stage must at least move (gigabytes) and compute (10^12 operations), intermediates of stages included.

    Every input and output of a stage passes through memory once, in the dtype it has there; masked halves of products
    are not counted. With the backward pass summaries and the sort are done twice, and the dense prefix both ways.
    """
    from bsbr.ops.triton.search import reads_peaks  # needs Triton

    dense, unit = min(length, dense_until(config)), config.unit
    position = torch.arange(dense, length, dtype=torch.float64)
    past = float((position // config.block_size * (config.block_size // unit)).sum()) * heads  # (query, block)
    queries = float(length - dense) * heads
    local = float((position % config.block_size + 1).sum()) * heads  # (query, key) of own blocks
    blocks = float((length - 1) // unit * key_heads)
    keys, pairs, row = float(length * key_heads), queries * config.top_k, 2.0 * width
    triangle = dense * dense / 2 * heads * width
    states = blocks * width * width
    often = 2 if backward else 1
    score = 2 + 4 / 64  # bytes of a block's score, with its share of the tile's best
    # a search reads every peak and 8 * top_k scores, or every best and 64 * top_k scores, and 8 * top_k of them again
    peak, read = (4 / 8, 8) if reads_peaks((length - 1) // unit) else (0, 72)
    least = {
        "dense prefix": (2 * often * dense * (heads + key_heads) * row, (14 if backward else 4) * triangle),
        "summaries": (often * (2 * keys * row + 3 * states * 2), often * 2 * keys * width * width),
        "scores": (queries * row + past * (score + peak), 4 * past * width),
        "search": (past * (peak or 4 / 64) + pairs * (2 * read + 4), 0.0),
        "far and local field": (
            2 * queries * row + past * score, 2 * past * width + 2 * queries * width * width + 4 * local * width,
        ),
        "sort of pairs": (often * pairs * 12, 0.0),
        "retrieved field": (2 * pairs * row, 4 * pairs * unit * width),
        "merge": ((pairs + 2 * queries) * row, 0.0),
        "retrieved field, backward": (3 * pairs * row, 10 * pairs * unit * width),
        "far and local field, backward": (
            3 * queries * row, 10 * past * width + 4 * queries * width * width + 6 * local * width,
        ),
        "local keys, backward": (2 * queries * row + 2 * keys * (row + 4 * width), 8 * local * width),
        "far summaries, backward": (2 * queries * row, 12 * past * width),
        "states, backward": (2 * queries * row + 3 * states * 2, 2 * queries * width * width),
        "moments, backward": (keys * (4 * row + 8 * width) + states * 2, 4 * keys * width * width),
        "sum of dq": ((pairs + 2 * queries) * row, 0.0),
    }  # fmt: skip
    return {stage: (moved / 1e9, done / 1e12) for stage, (moved, done) in least.items()}


def _header(options: argparse.Namespace, config: BSBRConfig) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.stages_gpu", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions(),
        "machine": {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "dtype": "bfloat16"},
        "config": config.to_dict(),
        "ceilings": {"bytes_per_second": BANDWIDTH, "operations_per_second": RATE},
        "protocol": {
            "shape": ["1", "T", f"{options.heads}/{options.key_heads}", str(options.width)],
            "input": "normal, seeded with T",
            "time": f"device time of each kernel as the profiler reports it, median of {CALLS} calls, cache flushed",
            "floor_ms": "the larger of bytes and operations over the ceilings",
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = problem_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stages_gpu.json"))
    return parser


if __name__ == "__main__":
    main()
