"""A pretraining run that is killed again and again, without warning, ends with the weights of one left in peace.

python -m benchmarks.kill_resume --kills 20 --output benchmarks/results/kill_resume.json

Each time a fresh run of the command is started in a process of its own, killed (SIGKILL) after a random part of the
time that a whole run takes, and resumed to its end; then every weight is compared, bit for bit. They are forked
with everything imported, so that the moments fall into reading, tokenizing, training, checkpoints and saving.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_rows import conditions
from bsbr.cli import main as main_of_bsbr
from bsbr.files import write_json
from bsbr.report import pretraining as _imported_before_forking  # noqa: F401
from bsbr.training import pretrain as _imported_too  # noqa: F401

_TEXT = "".join(f"{i} bottles on the wall, {i} bottles; take one down, {i - 1} left.\n" for i in range(999, 0, -1))
_RECIPE = [
    "--attention", "bsbr:block_size=8,top_k=1,dense_below=0", "--layers", "2", "--heads", "2", "--hidden", "32",
    "--context", "64", "--vocab", "300", "--batch-tokens", "512", "--tokens", str(512 * 60), "--warmup-steps", "8",
    "--val-interval", "40", "--val-windows", "8", "--checkpoint-interval", "4", "--device", "cpu",
]  # fmt: skip
_RECORD = "training.json"


def main() -> None:
    """Kill and resume, and write one JSON file after each time."""
    options = _parser().parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "train.txt").write_text(_TEXT)
        (scratch / "val.txt").write_text(_TEXT[2000:9000])
        whole = []
        for number in range(2):  # the first is slower
            begun = time.monotonic()
            run(scratch, scratch / f"whole-{number}")
            whole.append(time.monotonic() - begun)
        wanted = digest(scratch / "whole-0")
        rows: list[dict[str, Any]] = []
        while sum(row["running"] for row in rows) < options.kills:
            rows.append(once(scratch, min(whole), chance, wanted))
            print(f"{len(rows)}: {rows[-1]}", flush=True)
            write_json(options.output, _content(options, rows, min(whole)))


def once(scratch: Path, seconds: float, chance: random.Random, wanted: str) -> dict[str, Any]:
    """Kill one run at a random moment, resume it until it ends, and compare."""
    folder = scratch / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    delay = chance.uniform(0, seconds)
    process = start(scratch, folder)
    time.sleep(delay)
    killed = os.waitpid(process, os.WNOHANG)[0] == 0
    if killed:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    checkpoints = folder / "checkpoints"
    steps = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
    if not (folder / _RECORD).exists():
        run(scratch, folder)
    return {
        "killed_after_s": round(delay, 3), "running": killed, "files": found, "checkpoints": steps,
        "identical": digest(folder) == wanted,
    }  # fmt: skip


def start(scratch: Path, folder: Path) -> int:
    """Start or go on with a run, in a process of its own that has everything imported; a folder is gone on with."""
    command = [
        "pretrain", "--text", str(scratch / "train.txt"), "--val", str(scratch / "val.txt"), "--output", str(folder),
        "--resume", *_RECIPE,
    ]  # fmt: skip
    number = os.fork()
    if number:
        return number
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os._exit(main_of_bsbr(command))


def run(scratch: Path, folder: Path) -> None:
    """Run to the end."""
    _, status = os.waitpid(start(scratch, folder), 0)
    if status:
        raise RuntimeError(f"the run ended with status {status}")


def digest(folder: Path) -> str:
    """SHA-256 of the model's weights file."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _content(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.kill_resume", "version": 1},
        "protocol": {
            "moment": f"uniform over the {seconds:.1f} s of a whole run of the command, from the fork to the exit",
            "kill": "SIGKILL",
            "identical": "model.safetensors has the SHA-256 of the run that was not killed",
        },
        "recipe": _RECIPE,
        "identical": sum(row["identical"] for row in rows), "of": len(rows),
        "killed_while_running": sum(row["running"] for row in rows), "rows": rows,
        **conditions(sys.argv, torch.device("cpu")),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of runs that had not ended by themselves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    return parser


if __name__ == "__main__":
    main()
