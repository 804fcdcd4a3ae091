"""Ctrl-C: the first lets the step finish, the second stops at once, and the handler is put back."""

import io
import os
import signal

import pytest
from rich.console import Console

from bsbr.evaluation.progress import EvaluationProgress


def test_first_interrupt_waits_for_the_step_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    console = Console(file=io.StringIO())
    with EvaluationProgress(10, console) as progress:
        progress.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "again to stop at once" in console.file.getvalue()


def test_stages_are_lines_where_no_bar_can_be_drawn() -> None:
    console = Console(file=io.StringIO())
    with EvaluationProgress(2, console) as progress:
        for part, detail in (("wikitext", "original"), ("wikitext", "converted"), ("speed", "128 tokens")):
            progress.stage(part, detail)
            progress.advance(1)
    assert console.file.getvalue().count("Measuring wikitext (0 % done)\n") == 1
    assert console.file.getvalue().count("Measuring speed (100 % done)\n") == 1


def test_steps_of_a_long_stage_are_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 10.0, 45.0, 60.0))
    monkeypatch.setattr("bsbr.evaluation.progress.time.monotonic", lambda: next(clock))
    console = Console(file=io.StringIO())
    progress = EvaluationProgress(4, console)
    for detail in ("first", "second", "third", "fourth"):
        progress.stage("16384 tokens", detail)
    assert console.file.getvalue() == "Measuring 16384 tokens (0 % done)\n  third (0 % done)\n"


def test_without_a_console_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with EvaluationProgress(1, None) as progress:
        progress.stage("speed", "128 tokens")
        progress.say("a line")
        progress.advance(1)
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
