"""The attention alone against PyTorch's causal attention: time, peak memory, and first whether it is right.

python benchmarks/attention.py --lengths 512 1024 2048 4096 8192 16384 32768
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bsbr.config import BSBRConfig
from bsbr.evaluation.progress import EvaluationProgress
from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.evaluation.speed import (
    SpeedSettings,
    memory_method,
    peak_bytes,
    speedup_estimate,
    time_calls,
    time_estimate,
)
from bsbr.evaluation.statistics import Estimate
from bsbr.files import write_json
from bsbr.ops import bsbr_attention, reference_attention, resolve_backend
from bsbr.ops.schedule import dense_until

HEADS, WIDTH = 12, 64
"""Shape of GPT-2 small."""

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PASSES = ("forward", "forward+backward")
CONTENDERS = ("sdpa", "bsbr")
TOLERANCE = 1e-4
"""Largest difference from the float64 reference that is still right for float32."""


def main() -> None:
    """Check, time and weigh every length, and write one JSON file."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=options.dense_below)
    settings = SpeedSettings(rounds=options.rounds, budget_s=options.budget)
    console = Console()
    rows: list[dict[str, Any]] = []
    with EvaluationProgress(sum(options.lengths) * len(options.passes), console) as progress:
        for length in options.lengths:
            tensors = draw(length)
            error = largest_error(tensors, config)
            if error > TOLERANCE:
                raise SystemExit(f"T = {length}: {error:.2g} away from the float64 reference, not timed")
            for name in options.passes:
                progress.stage(name, f"T = {length}")
                progress.check()
                calls = {contender: make_call(contender, name, tensors, config) for contender in CONTENDERS}
                samples = time_calls(calls, settings)
                peaks = {contender: measure_peak(contender, name, length, config) for contender in CONTENDERS}
                shown = {contender: _as_dict(time_estimate(samples[contender])) for contender in CONTENDERS}
                rows.append(
                    {
                        "length": length,
                        "pass": name,
                        "density": density(length, config),
                        "max_error": error,
                        "time_s": shown,
                        "speedup": _as_dict(speedup_estimate(samples["sdpa"], samples["bsbr"])),
                        "samples_s": samples,
                        "peak_bytes": peaks,
                        "tensor_bytes": 4 * tensors[0].nbytes,
                    }
                )
                progress.advance(length)
    write_json(options.output, _header(config, settings) | {"rows": rows})
    console.print(_table(rows))


def draw(length: int) -> list[Tensor]:
    """Random q, k, v and gradient of o, [1, T, heads, width] in the memory layout that PyTorch's attention likes."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).transpose(1, 2) for _ in range(4)]


def make_call(contender: str, name: str, tensors: list[Tensor], config: BSBRConfig) -> Callable[[], object]:
    """A call without arguments that does one pass of one contender."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if contender == "bsbr":
            o = bsbr_attention(q, k, v, config)
            assert isinstance(o, Tensor)
            return o
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(*tensors[:3])

    leaves = [x.detach().requires_grad_() for x in tensors[:3]]

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, tensors[3])

    return forward if name == "forward" else forward_backward


def largest_error(tensors: list[Tensor], config: BSBRConfig, samples: int = 4, rows: int = 4) -> float:
    """Largest difference from the float64 reference, at some rows of some prefixes."""
    q, k, v = tensors[:3]
    with torch.no_grad():
        actual = bsbr_attention(q, k, v, config)
        assert isinstance(actual, Tensor)
        worst = 0.0
        for sample in range(1, samples + 1):
            stop = k.shape[1] * sample // samples
            own = slice(stop - rows, stop)
            expected = reference_attention(q[:, own], k[:, :stop], v[:, :stop], config, q_start=stop - rows)[0]
            worst = max(worst, (actual[:, own] - expected).abs().max().item())
    return worst


def measure_peak(contender: str, name: str, length: int, config: BSBRConfig) -> int | None:
    """Peak memory of one pass in a process of its own, above its tensors."""
    arguments = (contender, name, length, config, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_own_peak, arguments)


def _own_peak(contender: str, name: str, length: int, config: BSBRConfig, threads: int) -> int | None:
    torch.set_num_threads(threads)
    make_call(contender, name, draw(min(length, 1024)), config)()  # libraries take their buffers at the first call
    return peak_bytes(make_call(contender, name, draw(length), config))


def density(length: int, config: BSBRConfig) -> float:
    """Share of the causal (query, key) pairs that are read exactly."""
    position = torch.arange(length)
    sparse = position % config.block_size + 1 + config.top_k * config.unit
    read = torch.where(position < dense_until(config), position + 1, sparse)
    return (read.sum() / (position + 1).sum()).item()


def _as_dict(estimate: Estimate) -> dict[str, Any]:
    return {"median": estimate.value, "q20": estimate.low, "q80": estimate.high, "n": estimate.n}


def _header(config: BSBRConfig, settings: SpeedSettings) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.attention", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
        "backend": resolve_backend("auto", *draw(1)[:3], config)[0],
        "config": config.to_dict(),
        "protocol": {
            "shape": ["1", "T", str(HEADS), str(WIDTH)],
            "input": "normal, seeded with T",
            "order": "interleaved: sdpa bsbr bsbr sdpa in every round",
            "rounds": settings.rounds,
            "least_rounds": settings.least_rounds,
            "budget_s": settings.budget_s,
            "time": "median and 20, 80 % quantiles of samples; speedup paired within rounds",
            "memory": memory_method(),
            "tensor_bytes": "q, k, v and o of float32",
            "correct": f"within {TOLERANCE} of the float64 reference at rows of four prefixes, before timing",
        },
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Causal attention, seconds (median), times as fast, peak memory above the inputs")
    for heading in ("T", "pass", "SDPA s", "BSBR s", "speed-up (20-80 %)", "density", "SDPA MB", "BSBR MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        peaks = ["-" if row["peak_bytes"][c] is None else f"{row['peak_bytes'][c] / 1e6:.0f}" for c in CONTENDERS]
        times = [f"{row['time_s'][c]['median']:.4f}" for c in CONTENDERS]
        ratio = row["speedup"]
        shown = f"{ratio['median']:.2f} ({ratio['q20']:.2f}-{ratio['q80']:.2f})"
        table.add_row(str(row["length"]), row["pass"], *times, shown, f"{row['density']:.3f}", *peaks)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens, each at least 16")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="what is timed")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--dense-below", type=int, default=0, help="positions below it are exact")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's number")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds a length and pass may take, at least 3 rounds"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention_cpu.json"))
    return parser


if __name__ == "__main__":
    main()
