"""Whatever is asked of the command line that cannot be done: one line, exit code 2, nothing left behind."""

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from bsbr.cli import COMMANDS, main
from tests.long.tiny import make
from tests.security.bad_calls import calls, fill
from tests.security.places import make_bad

CALLS = calls()


class Answer(NamedTuple):
    """What a call was answered with."""

    code: object
    said: str
    seconds: float
    left: list[str]


def ask(call: tuple[str, ...], places: dict[str, Path], own: Path) -> Answer:
    """Make a bad call in this process."""
    own.mkdir()
    before, errors, started = os.getcwd(), io.StringIO(), time.perf_counter()
    os.chdir(own)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code: object = main(fill(call, {**places, "out": own / "out"}))
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
    left = [str(path.relative_to(own)) for path in own.rglob("*") if path != own / "out"]
    return Answer(code, errors.getvalue(), time.perf_counter() - started, left)


def fault(answer: Answer) -> str:
    """What is wrong with an answer; "" for nothing."""
    lines = answer.said.splitlines()
    problems = {
        f"exit code {answer.code}": answer.code != 2,
        f"{len(lines)} lines": len(lines) != 1,
        "no error line": not answer.said.startswith("bsbr: error: "),
        "too long": len(answer.said) > 440,
        "traceback": "Traceback" in answer.said,
        "unexpected": "unexpected" in answer.said,
        "control characters": any(not c.isprintable() for c in answer.said.rstrip("\n")),
        f"left behind {answer.left}": bool(answer.left),
    }
    return ", ".join(name for name, wrong in problems.items() if wrong)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> dict[str, Path]:
    given = make(tmp_path_factory.mktemp("given"))
    monkeypatch_module.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here = make_bad(tmp_path_factory.mktemp("bad"), given / "model")
    return {"model": given / "model", "converted": given / "converted", "text": given / "text.txt", "here": here}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_there_are_enough():
    assert len(CALLS) >= 300
    assert len(set(CALLS)) == len(CALLS)


@pytest.mark.parametrize("part", range(4))
def test_bad_calls_are_answered_in_one_line(part: int, places: dict[str, Path], tmp_path: Path) -> None:
    """A part of them all; `python -m tests.long.bad_input` makes every one."""
    faults = {}
    for number in range(part, len(CALLS), 32):
        answer = ask(CALLS[number], places, tmp_path / str(number))
        if found := fault(answer):
            faults[CALLS[number]] = (found, answer.said[-600:])
    assert not faults


def test_bad_calls_of_a_process_of_their_own(tmp_path: Path) -> None:
    for words in (["evaluate", "--block-size", "a"], ["nothing"], ["generate", "--prompt", "x"]):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "bsbr.cli", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert time.perf_counter() - started < 10  # a second on an idle machine; this one may be shared


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"import sys; from bsbr.cli import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
