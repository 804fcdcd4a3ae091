"""Foreign text in a report, on a terminal and in a log stays text."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bsbr.cli import main
from bsbr.cli.streaming import TerminalStreamer
from bsbr.evaluation.progress import EvaluationProgress
from bsbr.evaluation.table import summary_tables
from bsbr.report import load
from bsbr.report.markdown import summary_markdown
from bsbr.terminal import harmless, one_line
from bsbr.training.progress import TrainingProgress
from tests.security.payloads import FIELDS, PAYLOADS, Elements, folder_with, page_with

OBEYED = {chr(code) for code in (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0))} | set(
    "\u202e\u2066\u200b\u2028"
)
"""What a terminal would obey, or would turn the reading direction."""


@pytest.mark.parametrize("field", FIELDS)
def test_payloads_change_no_element(field: str, tmp_path: Path) -> None:
    """The elements and attributes are those of a report with plain words there; `tests.long.browser` takes them all."""
    plain = Elements(page_with(tmp_path / "plain", field, "plain words")).found
    for number, payload in enumerate(PAYLOADS[FIELDS.index(field) % 4 :: 4]):
        page = page_with(tmp_path / str(number), field, payload)
        assert Elements(page).found == plain, payload
        page.encode("utf-8")
        assert not set(page) & OBEYED, payload
    assert len(PAYLOADS) == 30


def test_the_comparison_sees_an_element() -> None:
    assert Elements("<p>a</p>").found != Elements("<p>a<b></b></p>").found
    assert Elements("<p>a</p>").found != Elements("<p onload=x>a</p>").found


@pytest.mark.parametrize("payload", PAYLOADS[::3], ids=range(0, len(PAYLOADS), 3))
def test_payloads_stay_text_in_markdown(payload: str, tmp_path: Path) -> None:
    for field in ("model", "note"):
        summary = summary_markdown(load(folder_with(tmp_path / field, field, payload)))
        assert "<" not in summary.split("Run again:")[0]
        assert not set(summary) & OBEYED


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_payload_reaches_a_terminal(payload: str, capsys: pytest.CaptureFixture) -> None:
    """Model text, progress, tables, errors and warnings, as a terminal and as a file would get them."""
    console = Console(file=io.StringIO(), force_terminal=True, width=500, color_system=None)
    with EvaluationProgress(1, console) as progress:
        progress.say(payload)
        progress.stage(payload, payload)
    for table in summary_tables({"quality": {payload: {payload: {"kl": 0.5}}}, "speedup": {payload: {128: 1.0}}}):
        Console(file=console.file, width=500, color_system=None).print(table)
    TrainingProgress(None).say(payload)
    TrainingProgress(console).say(payload)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: payload)
    TerminalStreamer(tokenizer).on_finalized_text(payload, stream_end=True)
    assert main(["report", f"/none/{payload.replace(chr(0), '')}"]) == 2
    shown = capsys.readouterr()
    own = {"\x1b", "\r"}  # rich moves its own bar with these
    for text in (shown.out, shown.err):
        assert not set(text) & OBEYED
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set(drawn) & (OBEYED - own)
    assert "\x1b]0;" not in drawn
    assert "\x1b[2J\x1b]" not in drawn
    assert not set(harmless(payload)) & OBEYED
    assert "\n" not in one_line(payload)


def test_a_warning_is_one_harmless_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr("bsbr.cli.report.run", lambda args: warnings.warn("two\nlines \x1b[31m", stacklevel=1))
    assert main(["report", "x"]) == 0
    assert capsys.readouterr().err == "bsbr: warning: two lines \\x1b[31m\n"


def test_output_names_with_controls_are_shown_harmlessly(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a\x1b[31m\u202eb", "note", "plain")
    assert main(["report", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "\\x1b[31m" in shown.out
    assert not set(shown.out + shown.err) & OBEYED
    assert os.listdir(folder)
