"""Memory is asked for before it is taken, and an error of it says what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bsbr import memory
from bsbr.cli import main
from bsbr.errors import ResourceError
from bsbr.hf.loading import load_model
from bsbr.hf.positions import extend_positions
from bsbr.memory import available_bytes, require_memory
from bsbr.training.recipe import PretrainConfig
from tests.long import tiny


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("given"))


def test_what_is_there_is_no_more_than_the_machine_has() -> None:
    found = available_bytes()
    assert found is not None
    assert 0 < found < 1 << 50
    require_memory(1, "work", "")
    with pytest.raises(ResourceError, match=r"work: needs at least 1,152,921\.5 TB of memory, .* free\. Lower it"):
        require_memory(1 << 60, "work", "Lower it")


def test_a_container_and_an_address_space_limit_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("memory.max", "1000\n"), ("memory.current", "900\n"), ("memory.stat", "inactive_file 50\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert available_bytes() == 150
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() != 150


def test_work_that_cannot_fit_is_refused_before_it_allocates(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = load_model(given / "model")
    with pytest.raises(ResourceError, match=r"positions for 1099511627776 tokens: .* Use a smaller --max-length"):
        extend_positions(model, 1 << 40)
    text = str(given / "text.txt")
    train = ["pretrain", "--text", text, "--val", text, "--output", str(tmp_path / "out"), "--tokens", "2048"]
    assert main([*train, "--hidden", "4000000", "--device", "cpu"]) == 3
    assert "Lower --hidden, --layers or --batch-tokens" in capsys.readouterr().err
    assert main(["benchmark", "--output", str(tmp_path / "b"), "--lengths", "9999999999"]) == 3
    assert "Lower --lengths" in capsys.readouterr().err
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert main(["convert", str(given / "model"), str(tmp_path / "c"), "--calibrate", "none"]) == 3
    assert "Use --dtype bfloat16 or a smaller model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "llama", "kv_heads": 1}, {"attention": {"mixer": "gated_delta"}}]
)
def test_the_estimate_of_training_is_the_model_itself_and_what_a_pass_keeps(changes: dict[str, Any]) -> None:
    from bsbr.training.build import build_model, least_bytes

    sizes = {"layers": 2, "heads": 2, "hidden": 32, "context": 64, "tokens": 1, **changes}
    config = PretrainConfig(batch_tokens=64, **sizes)
    parameters = sum(p.numel() for p in build_model(config, 257).parameters())
    kept = 4 * 20 * 64 * 2 * 32
    assert least_bytes(config) == 12 * parameters + kept
    assert least_bytes(PretrainConfig(batch_tokens=64, optimizer="adamw", **sizes)) == 16 * parameters + kept
    halved = PretrainConfig(batch_tokens=256, accumulation=4, **sizes)
    assert least_bytes(halved) == least_bytes(config)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (
            ["evaluate", "{model}", "--calibrate", "none", "--output", "{out}"],
            "Lower --lengths, --window or --documents",
        ),
        (["convert", "{model}", "{out}"], "Use --calibrate none"),
        (["generate", "{model}", "--prompt", "word1"], "Give less text"),
        (["finetune", "{model}", "{out}", "--text", "embedded"], "Lower --length or --batch-windows"),
    ],
)
def test_running_out_says_which_option_to_change(
    error: Exception, words: list[str], advice: str, given: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("bsbr.cli.models.load_model", fail)
    places = {"model": given / "model", "out": tmp_path / "out"}
    assert main([word.format(**places) for word in words]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"bsbr: error: out of memory. {advice}")
    assert said.count("\n") == 1
