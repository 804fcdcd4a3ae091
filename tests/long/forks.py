"""Work in processes that can be killed at any moment, without paying for their imports each time."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

WRITES = ("fsync", "replace", "rename")
"""Calls of `os` at which a forced kill may strike: what a save is made of."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Exit code; minus the signal's number for one that was killed."""
    seconds: float
    """How long it ran."""
    said: str
    """What it wrote to standard error and output."""


def run(
    work: Callable[[], object], log: Path, *, kill_after: float | None = None, kill_at_write: int | None = None
) -> Ended:
    """Run a function in a forked process.

    Args:
        work: what to do; an integer it returns is the exit code.
        log: takes what the process writes.
        kill_after: seconds after which it gets SIGKILL.
        kill_at_write: SIGKILL just before the n-th call of `WRITES`, from 1.
    Returns:
        How it ended.
    """
    log.write_bytes(b"")
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be(work, log, kill_at_write)
    if kill_after is not None:
        while time.monotonic() - started < kill_after:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return _ended(status, started, log)
            time.sleep(min(0.002, kill_after))
        os.kill(child, signal.SIGKILL)
    return _ended(os.waitpid(child, 0)[1], started, log)


def _ended(status: int, started: float, log: Path) -> Ended:
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - started, log.read_text(errors="replace"))


def _be(work: Callable[[], object], log: Path, kill_at_write: int | None) -> None:
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if kill_at_write is not None:
            _strike_at(kill_at_write)
        found = work()
        code = found if isinstance(found, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _strike_at(number: int) -> None:
    calls = 0
    for name in WRITES:
        real = getattr(os, name)

        def call(*args: object, real: Callable = real, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)
