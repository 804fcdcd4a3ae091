"""How fast training steps are: BSBR against full attention at a long context, and the trainer's share of the peak.

python -m benchmarks.training_speed --parts steps mfu public --public nanoGPT \
    --output benchmarks/results/training_speed.json

`steps`: the 28 M Llama shape, one window a step, compiled, forward, backward and optimizer; full attention with every
kernel of PyTorch's scaled dot product attention that runs, the fastest counts. `mfu`: GPT-2 of 124 M at 1,024 tokens,
compiled, on random tokens, with Muon and AdamW and with AdamW alone. `public`: bench.py of a checkout of nanoGPT,
the same model, tokens and optimizer (AdamW), in a process of its own.
"""

import argparse
import contextlib
import hashlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.from_scratch import ATTENTIONS
from benchmarks.training_rows import conditions
from bsbr.files import write_json
from bsbr.training.batches import Batch
from bsbr.training.build import build_model, parse_attention
from bsbr.training.flops import peak_flops, training_flops_per_token
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.trainer import Trainer

_SHAPE = Path(__file__).parent / "configs" / "llama_28m.json"
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Fixed:
    """Batches that are one batch of random tokens, made on the device before anything is timed."""

    train_tokens = None

    def __init__(self, windows: int, length: int, vocab: int, device: torch.device) -> None:
        self.record: dict[str, Any] = {}
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(vocab, (windows, length + 1), generator=generator, device=device)
        self._batch = Batch(ids, None, None)

    def at(self, step: int) -> Batch:
        """Return it."""
        return self._batch

    def measure(self, model: Any, *, whole: bool) -> dict[str, Any]:
        """Refuse: nothing is held out."""
        raise NotImplementedError


def main() -> None:
    """Measure the parts, and write one JSON file after each."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    found: dict[str, Any] = {}
    for part in options.parts:
        found[part] = {"steps": steps, "mfu": mfu, "public": public}[part](options, device)
        content = {
            "schema": {"name": "bsbr.benchmarks.training_speed", "version": 1},
            "protocol": {
                "time": "whole steps between two synchronisations, wall clock, after warm-up; median of the repeats",
                "mfu": "operations of PaLM's appendix B (6 for each weight, attention as if it read every window "
                "whole) over the vendor's dense bfloat16 peak",
            },
            **conditions(sys.argv, device),
            **found,
        }
        write_json(options.output, content)
        print(part, found[part], flush=True)


def steps(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of every attention at every length."""
    rows = []
    for length in options.lengths:
        for name in options.attention:
            kernels: dict[str, Any] = KERNELS if name == "full" and device.type == "cuda" else {"": None}
            for kernel, backend in kernels.items():
                row: dict[str, Any] = {"attention": name, "kernel": kernel, "length": length}
                try:
                    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                        row |= _step_time(name, length, options, device)
                except (RuntimeError, NotImplementedError) as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                rows.append(row)
                print(row, flush=True)
    return {"rows": rows, "speedup": _speedups(rows)}


def _speedups(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times faster than the fastest full attention of the same length."""
    done = [row for row in rows if "median_s" in row]
    full: dict[int, float] = {}
    for row in done:
        if row["attention"] == "full":
            full[row["length"]] = min(row["median_s"], full.get(row["length"], float("inf")))
    return {
        f"{row['attention']} @ {row['length']}": full[row["length"]] / row["median_s"]
        for row in done
        if row["attention"] != "full" and row["length"] in full
    }


def _step_time(name: str, length: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    recipe = PretrainConfig(
        architecture=str(_SHAPE), attention=parse_attention(ATTENTIONS[name]), context=length, batch_tokens=length,
        tokens=1 << 30, compile=options.compile, match_parameters=True,
    )  # fmt: skip
    torch.compiler.reset()  # what was compiled for another kernel would be taken again
    trainer = _trainer(recipe, Fixed(1, length, 8192, device), 8192, device)
    return _times(trainer, length, options)


def mfu(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of the dense GPT-2, and set them against the peak."""
    return {"rows": [_mfu(optimizer, options, device) for optimizer in ("muon", "adamw")]}


def _mfu(optimizer: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    windows, passes = options.windows, options.passes
    recipe = PretrainConfig(
        architecture="gpt2", layers=12, heads=12, hidden=768, context=1024, vocab=50304, optimizer=optimizer,
        batch_tokens=1024 * windows * passes, accumulation=passes, tokens=1 << 40, compile=options.compile,
    )  # fmt: skip
    trainer = _trainer(recipe, Fixed(windows * passes, 1024, 50304, device), 50304, device)
    begun = time.monotonic()
    found = _times(trainer, recipe.batch_tokens, options)
    flops, peak = training_flops_per_token(trainer.model, 1024, full_attention=True), peak_flops(device)
    found |= {
        "optimizer": optimizer, "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_token": flops, "peak": peak, "windows_a_pass": windows, "passes_a_step": passes,
        "with_compilation_s": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    return found | ({} if peak is None else {"mfu": found["tokens_per_s"] * flops / peak})


def public(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time nanoGPT's own benchmark: mean of its 20 iterations, each of which it waits for; median of several runs."""
    folder, command = Path(options.public), ["bench.py", "--real_data=False", f"--batch_size={options.windows}"]
    seconds = []
    for _ in range(options.public_runs):
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=True)
        seconds.append(float(re.findall(r"time per iteration: ([0-9.]+)ms", done.stdout)[-1]) / 1e3)
    median = statistics.median(seconds)
    return {
        "program": "nanoGPT", "command": command, "time_per_iteration_s": median, "runs": seconds,
        "tokens_per_s": 1024 * options.windows / median,
        "sha256": {x: hashlib.sha256((folder / x).read_bytes()).hexdigest() for x in ("bench.py", "model.py")},
    }  # fmt: skip


def _trainer(recipe: PretrainConfig, batches: Fixed, vocab: int, device: torch.device) -> Trainer:
    model = build_model(recipe, vocab).to(device)
    folder = Path(tempfile.gettempdir()) / "never-written"
    return Trainer(config=recipe, model=model, batches=batches, folder=folder, progress=TrainingProgress())


def _times(trainer: Trainer, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    def synchronize() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    for _ in range(options.warmup):
        trainer._one_step(trainer.batches.at(0))
    seconds = []
    for _ in range(options.repeats):
        synchronize()
        begun = time.perf_counter()
        for _ in range(options.steps):
            trainer._one_step(trainer.batches.at(0))
        synchronize()
        seconds.append((time.perf_counter() - begun) / options.steps)
    median = statistics.median(seconds)
    return {
        "median_s": median, "least_s": min(seconds), "most_s": max(seconds), "repeats": len(seconds),
        "tokens_per_s": tokens / median,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["steps", "mfu", "public"], default=["steps", "mfu"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full", "bsbr"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--windows", type=int, default=32, help="windows of a pass of GPT-2")
    parser.add_argument("--passes", type=int, default=1, help="passes of a step of GPT-2")
    parser.add_argument("--public", metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--public-runs", type=int, default=1)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps of a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True)
    return parser


if __name__ == "__main__":
    main()
