"""A disk that fills up at any write costs nothing that was there before.

python -m tests.long.disk_full
"""

import builtins
import contextlib
import errno
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from benchmarks.reliability import record
from safetensors import SafetensorError

from bsbr.cli import main as bsbr
from bsbr.errors import ResourceError
from bsbr.evaluation.provenance import cpu_name, weights_digest
from bsbr.evaluation.records import RecordStore
from bsbr.files import write_atomic, write_json
from bsbr.hf.loading import load_model
from bsbr.training.checkpoint import load_checkpoint, save_checkpoint
from tests.long.tiny import ATTENTION, make

Work = Callable[[Path], object]
Look = Callable[[Path], object]


class Full:
    """Makes the n-th call that writes fail as a full disk does, and counts the calls."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def count(self) -> bool:
        """Whether this call is the one that fails."""
        self.calls += 1
        return self.calls == self.number

    @contextlib.contextmanager
    def everywhere(self) -> Iterator["Full"]:
        """Stand in for every call with which a file is opened for writing, written, flushed or renamed."""
        with contextlib.ExitStack() as stack:
            for module, name in (
                (os, "write"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "link"),
                (tempfile, "mkstemp"), (tempfile, "mkdtemp"),
            ):  # fmt: skip
                self._stand_in(stack, module, name, self._failing(getattr(module, name)))
            self._stand_in(stack, builtins, "open", self._opening(open))
            for module, name in ((safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file")):
                self._stand_in(stack, module, name, self._saving(getattr(module, name)))
            yield self

    def _stand_in(self, stack: contextlib.ExitStack, module: Any, name: str, call: Callable) -> None:
        stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, call)

    def _failing(self, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.count():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    def _opening(self, real: Callable) -> Callable:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self.count():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
            return real(file, mode, *args, **kwargs)

        return call

    def _saving(self, real: Callable) -> Callable:
        def call(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            if self.count():
                Path(filename).write_bytes(b"\0" * 100)  # what a full disk leaves of it
                code = errno.ENOSPC
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            return real(tensors, filename, *args, **kwargs)

        return call


def jobs(given: Path) -> dict[str, tuple[Work, Work, Look]]:
    """Work that writes: what comes before it, the work itself, and what shows the state of its folder.

    Args:
        given: from `tests.long.tiny.make`.
    Returns:
        Name to the three.
    """
    words = ["convert", str(given / "model")]
    tensors = {"weights": {"w": torch.arange(1000.0)}, "optimizer": {"m": torch.ones(10)}}

    def weights(place: Path) -> str:
        return weights_digest(load_model(place / "out").state_dict().items())

    def converted(width: str) -> Work:
        def work(place: Path) -> object:
            options = [*ATTENTION, "--calibrate", "none", "--overwrite"]
            return bsbr([*words, str(place / "out"), *options, "--top-k", width])

        return work

    def records(resume: bool) -> Work:
        def work(place: Path) -> None:
            with RecordStore(place / "records.jsonl", "protocol", resume=resume) as store:
                for index in range(3):
                    if (index + 3 * resume,) not in store:
                        store.append((index + 3 * resume,), {"value": index / 7})

        return work

    def kept(place: Path) -> list[bool]:
        with RecordStore(place / "records.jsonl", "protocol", resume=True) as store:
            return [(index,) in store for index in range(3)]

    def step(place: Path) -> Any:
        found = load_checkpoint(place)
        return found and (weights_digest(found.tensors["weights"].items()), sorted(found.state))

    return {
        "a JSON file": (
            lambda place: write_json(place / "a.json", {"old": 1}),
            lambda place: write_json(place / "a.json", {"new": [1.5] * 1000}),
            lambda place: (place / "a.json").read_text(),
        ),
        "bytes": (
            lambda place: write_atomic(place / "a.png", b"old"),
            lambda place: write_atomic(place / "a.png", b"new" * 10_000),
            lambda place: (place / "a.png").read_bytes(),
        ),
        "a training checkpoint": (
            lambda place: save_checkpoint(place, 1, tensors, {"old": 1}),
            lambda place: save_checkpoint(place, 2, tensors, {"new": 1}),
            step,
        ),
        "save_pretrained": (
            lambda place: load_model(given / "converted").save_pretrained(place / "out"),
            lambda place: _halved(load_model(given / "converted")).save_pretrained(place / "out"),
            weights,
        ),
        "bsbr convert": (converted("1"), converted("2"), lambda place: (weights(place), _settings(place))),
        "evaluation records": (records(False), records(True), kept),
    }


def _halved(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


def _settings(place: Path) -> str:
    return (place / "out" / "config.json").read_text()


def fill(before: Work, work: Work, look: Look, place: Path, *, every: int = 1) -> tuple[int, list[str]]:
    """Let the disk be full at the first write of some work, then at the second, until it comes to its end.

    Args:
        before: makes what is there before.
        work: the work.
        look: shows the state; raises where there is none that can be read.
        place: an empty folder.
        every: take only every so many-th write.
    Returns:
        How many writes there are, and what was wrong after some of them.
    """
    faults = []
    before(place)
    work(place)
    new = look(place)
    shutil.rmtree(place)
    for number in range(1, 1000, every):
        place.mkdir()
        before(place)
        old, names = look(place), _names(place)
        code: object = None
        with Full(number).everywhere() as full:
            try:
                code = work(place)
            except ResourceError as error:
                code = error.exit_code
                if "\n" in str(error):
                    faults.append(f"write {number}: more than one line")
        if full.calls < number:
            shutil.rmtree(place)
            return full.calls, faults
        if look(place) not in (old, new):  # the last flush may fail when all of the new is in its place
            faults.append(f"write {number}: neither what was there nor what was to come")
        if code not in (0, 3, None) and not isinstance(code, Path):
            faults.append(f"write {number}: exit code {code}")
        if litter := [name for name in _names(place) - names if "/." in f"/{name}"]:
            faults.append(f"write {number}: left behind {litter}")
        shutil.rmtree(place)
    raise AssertionError("the work never ends")


def _names(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def main() -> int:
    """Fill the disk at every write of every job and write the result."""
    started, counts, faults = time.monotonic(), {}, []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        given = make(Path(folder) / "given")
        for name, job in jobs(given).items():
            place = Path(folder) / "place"
            place.mkdir()
            counts[name], found = fill(*job, place)
            print(f"{name}: {counts[name]} writes, {len(found)} faults", *found, sep="\n  ", flush=True)
            faults += [f"{name}, {fault}" for fault in found]
    record(
        "disk_full",
        section="Persistence",
        claim="Wherever the disk fills up during a write, what was there before still loads, or the "
        "whole of the new; nothing "
        "half-written is left, "
        "and one line says so (exit code 3).",
        cases=sum(counts.values()),
        failures=len(faults),
        measured="; ".join(f"{name}: {count} writes" for name, count in counts.items()),
        mended=[
            "`save_pretrained` and `bsbr convert` with `--overwrite` wrote over the model that was there: a "
            "disk that filled up "
            "left half of each. They now fill a folder beside it and move its files when all are on the disk.",
            "A full disk in some writers ended with a traceback.",
        ],
        not_covered=[
            "Writers of other packages: logs of TensorBoard, adapters that peft saves in checkpoints "
            "on the way (those are "
            "told by the checkpoint's manifest).",
        ],
        command="python -m tests.long.disk_full",
        conditions=f"CPU ({cpu_name()}); ENOSPC raised by the n-th call that opens a file for "
        f"writing, writes, flushes, "
        "links, renames or makes a folder, for every n",
        seconds=time.monotonic() - started,
        details={"writes": counts, "faults": faults},
    )
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
