"""How fast training steps are: BSBR against full attention at a long context, and the trainer's share of the peak.

python -m benchmarks.training_speed run rows --parts steps mfu public --public nanoGPT
python -m benchmarks.training_speed gather rows benchmarks/results/training_speed.json

`steps`: the 28 M Llama shape, one window a step, compiled, forward, backward and optimizer; full attention with every
kernel of PyTorch's scaled dot product attention that runs, the fastest counts. `mfu`: GPT-2 of 124 M at 1,024 tokens,
compiled, on random tokens, with Muon and AdamW and with AdamW alone. `public`: bench.py of a checkout of nanoGPT,
the same model, tokens and optimizer (AdamW), in a process of its own. A row that is there is not measured again. All
commands with the same `--turn FILE` may compile side by side: they are timed one after the other.
"""

import argparse
import contextlib
import fcntl
import hashlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.from_scratch import ATTENTIONS
from benchmarks.training_rows import add_parts, conditions, read_rows, write_row
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
    """Run or gather."""
    options = _parser().parse_args()
    options.act(options)


def run(options: argparse.Namespace) -> None:
    """Measure what is asked for, and write a row after each."""
    device = torch.device(options.device)
    for name, measure in _plan(options, device).items():
        target = Path(options.rows) / f"{name}.json"
        if target.exists():
            continue
        torch.compiler.reset()  # what was compiled for another kernel would be taken again
        try:
            write_row(target, {**measure(), **conditions(sys.argv, device)})
        except Exception:  # a kernel that cannot run must not cost the others
            traceback.print_exc()


def _plan(options: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by the names of the rows."""
    plan: dict[str, Callable[[], dict[str, Any]]] = {}
    for length in options.lengths if "steps" in options.parts else ():
        for name in options.attention:
            for kernel in options.kernels if name == "full" and device.type == "cuda" else ("",):
                plan[f"steps-{name}-{kernel}-{length}"] = partial(_step, name, kernel, length, options, device)
    for optimizer in options.optimizers if "mfu" in options.parts else ():
        plan[f"mfu-{optimizer}"] = partial(_mfu, optimizer, options, device)
    if "public" in options.parts:
        plan["public"] = partial(_public, options)
    return plan


def gather(options: argparse.Namespace) -> None:
    """Join the rows."""
    rows = read_rows(options.rows)
    shared = {key: rows[0][key] for key in ("code", "machine", "command")}
    parts = {part: [row for row in rows if row["part"] == part] for part in ("steps", "mfu", "public")}
    content = {
        "schema": {"name": "bsbr.benchmarks.training_speed", "version": 2},
        "protocol": {
            "time": "whole steps between two synchronisations, wall clock, after warm-up; median of the repeats",
            "mfu": "operations of PaLM's appendix B (6 for each weight, attention as if it read every window "
            "whole) over the vendor's dense bfloat16 peak",
            "public": "mean of the program's 20 iterations, each of which it waits for; median of the runs",
        },
        **shared, "steps": {"rows": parts["steps"], "speedup": _speedups(parts["steps"])}, "mfu": parts["mfu"],
        "public": parts["public"],
    }  # fmt: skip
    write_json(options.output, content)
    print(content["steps"]["speedup"], *({"mfu": row.get("mfu"), "s": row["median_s"]} for row in parts["mfu"]))


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


def _step(name: str, kernel: str, length: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of an attention at a length."""
    recipe = PretrainConfig(
        architecture=str(_SHAPE), attention=parse_attention(ATTENTIONS[name]), context=length, batch_tokens=length,
        tokens=1 << 30, compile=options.compile, match_parameters=True,
    )  # fmt: skip
    with sdpa_kernel(KERNELS[kernel]) if kernel else contextlib.nullcontext():
        trainer = _trainer(recipe, Fixed(1, length, 8192, device), 8192, device)
        found = _times(trainer, length, options)
    return {
        "part": "steps",
        "attention": name,
        "kernel": kernel,
        "length": length,
        "compiled": options.compile,
        **found,
    }


def _mfu(optimizer: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time steps of the dense GPT-2, and set them against the peak."""
    windows, passes = options.windows, options.passes
    recipe = PretrainConfig(
        architecture="gpt2", layers=12, heads=12, hidden=768, context=1024, vocab=50304, optimizer=optimizer,
        batch_tokens=1024 * windows * passes, accumulation=passes, tokens=1 << 40, compile=options.compile,
    )  # fmt: skip
    trainer = _trainer(recipe, Fixed(windows * passes, 1024, 50304, device), 50304, device)
    found = _times(trainer, recipe.batch_tokens, options)
    flops, peak = training_flops_per_token(trainer.model, 1024, full_attention=True), peak_flops(device)
    found |= {
        "part": "mfu", "optimizer": optimizer, "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_token": flops, "peak": peak, "windows_a_pass": windows, "passes_a_step": passes,
    }  # fmt: skip
    return found | ({} if peak is None else {"mfu": found["tokens_per_s"] * flops / peak})


def _public(options: argparse.Namespace) -> dict[str, Any]:
    """Time nanoGPT's own benchmark, after a run that fills the compiler's cache."""
    folder, command = Path(options.public), ["bench.py", "--real_data=False", f"--batch_size={options.windows}"]
    words, seconds = [sys.executable, *command], []
    subprocess.run(words, cwd=folder, capture_output=True, check=True)
    with _turn(options):
        for _ in range(options.public_runs):
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            seconds.append(float(re.findall(r"time per iteration: ([0-9.]+)ms", done.stdout)[-1]) / 1e3)
    median = statistics.median(seconds)
    return {
        "part": "public", "program": "nanoGPT", "arguments": command, "median_s": median, "runs_s": seconds,
        "tokens_per_s": 1024 * options.windows / median,
        "sha256": {x: hashlib.sha256((folder / x).read_bytes()).hexdigest() for x in ("bench.py", "model.py")},
    }  # fmt: skip


@contextlib.contextmanager
def _turn(options: argparse.Namespace) -> Iterator[None]:
    """Wait until no other command with the same file is timing."""
    if options.turn is None:
        yield
        return
    with open(options.turn, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    synchronize()
    seconds = []
    with _turn(options):
        trainer._one_step(trainer.batches.at(0))
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
    _, part = add_parts(parser, run, gather)
    part.add_argument("rows")
    part.add_argument("--parts", nargs="+", choices=["steps", "mfu", "public"], default=["steps", "mfu"])
    part.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full", "bsbr"])
    part.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="of full attention")
    part.add_argument("--lengths", type=int, nargs="+", default=[32768])
    part.add_argument("--optimizers", nargs="+", choices=["muon", "adamw"], default=["muon", "adamw"])
    part.add_argument("--windows", type=int, default=32, help="windows of a pass of GPT-2")
    part.add_argument("--passes", type=int, default=1, help="passes of a step of GPT-2")
    part.add_argument("--public", metavar="DIR", help="a checkout of nanoGPT")
    part.add_argument("--public-runs", type=int, default=1)
    part.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    part.add_argument("--warmup", type=int, default=3)
    part.add_argument("--steps", type=int, default=10, help="steps of a repeat")
    part.add_argument("--repeats", type=int, default=5)
    part.add_argument("--turn", metavar="FILE", help="time only while this file is locked")
    return parser


if __name__ == "__main__":
    main()
