"""A result file runs again from what it says, and a digit that differs is told; --deterministic does what it says."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bsbr import BSBRConfig
from bsbr.cli import main
from bsbr.cli.deterministic import deterministic
from bsbr.cli.replay import replay
from bsbr.errors import UserError
from bsbr.evaluation.results import content_digest
from bsbr.ops.attention import resolve_backend


def content(value: float = 0.5, seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    rows = [
        {"metric": "kl", "variant": "converted", "slice": {"bucket": "all"}, "value": value},
        {"metric": "time_s", "variant": "converted", "slice": {}, "value": seconds, "volatile": True},
    ]
    command = ["evaluate", "embedded", "--output", "results", "--top-k", "2", "--resume", "--output=x"]
    made: dict[str, Any] = {"status": "complete", "command": command, "rows": rows, "code": {"torch": "1"}}
    made |= {"machine": {"threads": 1}, "kl_all": value} | changes
    return made | {"digest": content_digest(made), "run": {"seconds": seconds}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "agreement_rates.json").write_text(json.dumps(content()))
    return tmp_path / "agreement_rates.json"


def run_again(made: dict[str, Any], asked: list[list[str]]) -> Any:
    def evaluate(words: list[str]) -> None:
        asked.append(words)
        (Path(words[-1]) / "agreement_rates.json").write_text(json.dumps(made))

    return evaluate


def test_equal_digits_are_told_and_times_left_out(file: Path, capsys: pytest.CaptureFixture) -> None:
    asked: list[list[str]] = []
    again = content(seconds=7.0, code={"torch": "2"}, machine={"threads": 2}, command=["evaluate"])
    assert replay(str(file), run_again(again, asked)) == 0
    assert asked[0][:-2] == ["embedded", "--top-k", "2"]
    assert asked[0][-2] == "--output"
    said = capsys.readouterr().out
    assert "0 differ" in said
    assert "torch 1 then, 2 now" in said


@pytest.mark.parametrize("other", [content(0.5000000001), content(extra=1), content(kl_all=0.25)])
def test_a_digit_that_differs_ends_in_exit_code_1(
    file: Path, other: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    assert replay(str(file), run_again(other, [])) == 1
    assert "0 differ" not in capsys.readouterr().out


def test_an_altered_unfinished_or_foreign_file_is_refused(file: Path, tmp_path: Path) -> None:
    altered = content()
    altered["rows"][0]["value"] = 0.25
    for made, match in (
        (altered, "digest does not match"),
        (content(status="partial"), "not finished"),
        (content(command=["benchmark"]), "its command is not"),
        ({"rows": []}, "is no result file"),
    ):
        file.write_text(json.dumps(made))
        with pytest.raises(UserError, match=match):
            replay(str(file), run_again(content(), []))
    with pytest.raises(UserError, match="cannot be read"):
        replay(str(tmp_path), run_again(content(), []))


def test_replay_takes_no_other_options(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--replay", str(file), "--top-k", "3"]) == 2
    assert "Leave all others out" in capsys.readouterr().err
    file.write_text(json.dumps(content(command=["evaluate", "--nonsense", "1"])))
    assert main(["evaluate", "--replay", str(file)]) == 2
    assert "the version of bsbr that made the file" in capsys.readouterr().err


def test_committed_results_are_unaltered() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "embedded"
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert len(found) >= 5
    assert all(made["digest"] == content_digest(made) for made in found)


def test_deterministic_is_for_the_time_of_the_command() -> None:
    x = torch.zeros(1, 9, 2, 8, requires_grad=True)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings(), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        with pytest.raises(ValueError, match="add gradients in no fixed order"):
            resolve_backend("triton", x, x, x, BSBRConfig())
    assert not torch.are_deterministic_algorithms_enabled()
