"""A run that is killed at any moment goes on to the result of an unbroken one.

python -m tests.long.kills
"""

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.reliability import record

from bsbr.evaluation.provenance import cpu_name
from tests.long.forks import run
from tests.long.tiny import Command, commands, make, outcome

FORCED = 0.2
"""Share of the kills that strike inside a write: before the n-th fsync or rename."""


def strike(name: str, command: Command, expected: dict[str, Any], draw: random.Random, place: Path) -> dict[str, Any]:
    """Kill one run, go on with it, and compare.

    Args:
        name: of the work.
        command: the work.
        expected: outcome of an unbroken run, with "seconds" and "writes" of it under "_".
        draw: chooses the moment.
        place: an empty folder.
    Returns:
        How it went; "fault" is empty where the result is the unbroken run's.
    """
    output, log = place / "out", place / "log"
    size = expected["_"]
    where: dict[str, Any] = (
        {"kill_at_write": draw.randint(1, size["writes"])}
        if draw.random() < FORCED
        else {"kill_after": draw.uniform(0, size["seconds"])}
    )
    killed = run(lambda: command(output, False), log, **where)
    again = run(lambda: command(output, True), log) if killed.code != 0 else killed
    fault = ""
    if again.code:
        fault = f"going on ended with {again.code}: {again.said.strip().splitlines()[-1:]}"
    elif (found := outcome(output)) != {k: v for k, v in expected.items() if k != "_"}:
        keys = found.keys() | expected.keys() - {"_"}
        fault = f"differs: {sorted(key for key in keys if found.get(key) != expected.get(key))}"
    litter = [path.name for path in (*place.iterdir(), *output.iterdir()) if path.name.startswith(".")]
    if litter and not fault:
        fault = f"left behind: {litter}"
    shutil.rmtree(place)
    return {"work": name, "where": where, "killed": killed.code == -9, "fault": fault}


def unbroken(command: Command, place: Path) -> dict[str, Any]:
    """The outcome of a run that nobody kills, and how long and in how many writes it comes."""
    ended = run(lambda: command(place / "out", False), place.parent / "log")
    if ended.code:
        raise SystemExit(f"an unbroken run failed: {ended.said}")
    writes = place / "writes"

    def count() -> None:
        import os

        calls = 0
        for name in ("fsync", "replace", "rename"):
            real = getattr(os, name)

            def call(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                return real(*args, **kwargs)

            setattr(os, name, call)
        command(place / "again", False)
        writes.write_text(str(calls))

    run(count, place.parent / "log")
    expected = outcome(place / "out")
    if expected != outcome(place / "again"):
        raise SystemExit("two unbroken runs differ: nothing can be compared with them")
    return expected | {"_": {"seconds": ended.seconds, "writes": int(writes.read_text())}}


def main() -> int:
    """Kill, resume, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind of work")
    parser.add_argument("--minutes", type=float, default=600.0, help="no kill is begun after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of work")
    parser.add_argument("--dry", action="store_true", help="write no result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        place, own = make(Path(folder) / "given"), Path(folder) / "own"
        work = {name: command for name, command in commands(place).items() if args.only in (None, name)}
        expected = {}
        for name, command in work.items():
            own.mkdir()
            expected[name] = unbroken(command, own)
            shutil.rmtree(own)
        for number in range(args.kills):
            for name, command in work.items():
                if time.monotonic() - started > 60 * args.minutes:
                    continue
                own.mkdir()
                rows.append(strike(name, command, expected[name], random.Random(f"{args.seed} {name} {number}"), own))
                if rows[-1]["fault"]:
                    print(f"{name} {number}, {rows[-1]['where']}: {rows[-1]['fault']}", flush=True)
            print(f"{len(rows)} kills", flush=True)
    failures = sum(bool(row["fault"]) for row in rows)
    if args.dry:
        return int(bool(failures))
    counts = {name: sum(row["work"] == name for row in rows) for name in work}
    struck = {name: sum(row["killed"] for row in rows if row["work"] == name) for name in work}
    record(
        "kills",
        section="Persistence",
        claim="A run that is killed (SIGKILL) at a random moment and gone on with ends in the result "
        "of an unbroken run, "
        "bit for bit, and leaves no temporary file.",
        cases=len(rows),
        failures=failures,
        measured="; ".join(f"{name}: {counts[name]} kills, {n} before its end" for name, n in struck.items()),
        mended=[
            "A fine-tuning run killed while it wrote a checkpoint went on from the half-written one, or failed: only "
            "checkpoints with a manifest count now.",
            "A run of `bsbr finetune` or `bsbr pretrain` killed while it saved its model could neither be resumed nor "
            "started anew in its folder.",
            "A fine-tuning stage that had ended was trained one step more when the run went on after "
            "a kill in a later stage, "
            "as transformers' Trainer does where the last step is not the end of an epoch.",
            "Temporary files of killed runs stayed for ever: the next run in the folder removes them.",
        ],
        not_covered=[
            "A kill while `--overwrite` or a second save moves the files of a model to their places: old and new files "
            "may then lie side by side, which the manifest tells at the next load; the save has to be run again.",
            "Loss of power: files and folders are flushed in the order that survives it, but no "
            "machine was switched off.",
            "Runs on several processes or a GPU.",
        ],
        command=f"python -m tests.long.kills --kills {args.kills} --seed {args.seed} --minutes {args.minutes:g}",
        conditions=f"CPU ({cpu_name()}); a model of two layers and 16 channels; a fifth of the kills "
        f"strike just before a "
        "random fsync or rename, the others at a random time",
        seed=args.seed,
        seconds=time.monotonic() - started,
        details={"struck before the end": struck},
    )  # fmt: skip
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
