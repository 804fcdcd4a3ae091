"""`run_pretrain` end to end on a tiny text: it learns, resumes exactly, and refuses what it cannot use."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bsbr.errors import UserError
from bsbr.training import pretrain
from bsbr.training.pretrain import PretrainConfig, run_pretrain
from bsbr.training.trainer import Trainer
from tests.training.runs import TINY, run, weights


def test_the_loss_falls_and_the_folder_opens_as_any_other(texts: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = run(texts, tmp_path / "out", tokens=64 * 150, lr=1e-2, muon_lr=1e-2)
    assert record["held_out"]["nll"] < record["history"][0]["held_out_nll"] - 1.0
    assert record == json.loads((tmp_path / "out" / "training.json").read_text())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= names
    assert "checkpoints" not in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = tokenizer("<|endoftext|>99 bottles on the wall", return_tensors="pt").input_ids
    assert model.float()(ids, labels=ids).loss.item() < 4.0


def test_it_trains_where_gradients_are_off(texts: dict[str, Path], tmp_path: Path) -> None:
    with torch.no_grad():  # an interrupted command can have left them so
        record = run(texts, tmp_path / "out")
        assert not torch.is_grad_enabled()
    assert record["history"][-1]["held_out_nll"] < record["history"][0]["held_out_nll"]


def test_an_interrupted_run_resumes_to_the_sameweights(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(texts, tmp_path / "whole")
    step = Trainer._one_step

    def interrupted(self: Trainer, starts: torch.Tensor) -> torch.Tensor:
        if self.step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, starts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(texts, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / "step-00000013").is_dir()
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    record = run(texts, tmp_path / "parts", resume=True)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())
    for key in ("held_out", "history", "text", "tokens_seen"):
        assert record[key] == whole[key], key


def test_a_killed_run_resumes_from_the_last_whole_checkpoint(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(texts, tmp_path / "whole")
    step = Trainer._one_step

    def killed(self: Trainer, starts: torch.Tensor) -> torch.Tensor:
        if self.step == 14:
            raise SystemExit
        return step(self, starts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", killed)
        with pytest.raises(SystemExit):
            run(texts, tmp_path / "parts")
    newest = tmp_path / "parts" / "checkpoints" / "step-00000010" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-00000010.*optimizer\.safetensors"):
        run(texts, tmp_path / "parts", resume=True)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())


def test_resuming_another_recipe_or_a_finished_run_is_refused(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", lambda self, loss: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(texts, tmp_path / "out")
    with pytest.raises(UserError, match=r"recipe lr is 0\.5, the checkpoint has 0\.005"):
        run(texts, tmp_path / "out", resume=True, lr=0.5)
    with pytest.raises(UserError, match="unfinished run"):
        run(texts, tmp_path / "out")
    run(texts, tmp_path / "out", resume=True)
    with pytest.raises(UserError, match="already holds a model"):
        run(texts, tmp_path / "out", resume=True)


def test_ctrl_c_at_the_very_end_leaves_no_checkpoints(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the record is written the run has ended."""
    remove = pretrain._remove_checkpoints

    def interrupted(output: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        remove(output)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_remove_checkpoints", interrupted)
        run(texts, tmp_path / "out")
    assert (tmp_path / "out" / "training.json").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_time_budget_ends_the_run_and_its_decay(texts: dict[str, Path], tmp_path: Path) -> None:
    record = run(texts, tmp_path / "out", tokens=None, minutes=0.03)
    assert record["steps"] > 1
    assert 1.0 < record["training_s"] < 5.0


def test_a_loss_that_is_not_finite_stops_therun(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Trainer, last: int) -> float:
        self.step = last  # or a trainer that does not stop would never end
        return float("nan")

    monkeypatch.setattr(Trainer, "_steps", lost)
    with pytest.raises(UserError, match="the loss is nan"):
        run(texts, tmp_path / "out")


def test_gradients_are_clipped(texts: dict[str, Path], tmp_path: Path) -> None:
    """At each step, over all parameters together; without clipping they are larger here."""
    norms: dict[float, list[float]] = {}

    def seen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms[clip].append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    hook = register_optimizer_step_pre_hook(seen)
    for clip in (0.01, 1e9):
        norms[clip] = []
        run(texts, tmp_path / f"{clip}", clip=clip, tokens=64 * 4, optimizer="adamw")
    hook.remove()
    assert max(norms[0.01]) <= 0.01 * (1 + 1e-4)
    assert min(norms[1e9]) > 0.1


def test_bfloat16_trains_too(texts: dict[str, Path], tmp_path: Path) -> None:
    record = run(texts, tmp_path / "out", precision="bfloat16")
    assert record["precision"] == "bfloat16"
    assert record["held_out"]["nll"] < record["history"][0]["held_out_nll"]


def test_a_given_tokenizer_is_used(texts: dict[str, Path], tmp_path: Path) -> None:
    first = run(texts, tmp_path / "first", tokens=64)
    quiet = Console(file=io.StringIO())
    config = PretrainConfig(**{**TINY, "tokens": 64, "vocab": 300})
    second = run_pretrain(
        config, **texts, output=tmp_path / "second", tokenizer=tmp_path / "first", device="cpu", console=quiet
    )
    assert second["text"]["tokenizer_sha256"] == first["text"]["tokenizer_sha256"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 0}, "layers = 0: must be at least 1"),
        ({"heads": 3}, "a divisor of hidden = 16"),
        ({"batch_tokens": 65}, "a multiple of context = 16"),
        ({"vocab": 256}, "at least 257"),
        ({"tokens": None}, "either tokens or minutes"),
        ({"minutes": 1.0}, "either tokens or minutes"),
        ({"lr": float("nan")}, "lr = nan: must be finite"),
        ({"precision": "int8"}, "one of auto, bfloat16, float32"),
    ],
)
def test_an_impossible_recipe_says_what_was_wanted(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainConfig(**{**TINY, **changes})


def test_unusable_inputs_are_one_line_errors(texts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one window needs 4097"):
        run(texts, tmp_path / "a", context=4096, batch_tokens=4096)
    with pytest.raises(UserError, match="no such file"):
        run({**texts, "val": tmp_path / "none"}, tmp_path / "b")
    with pytest.raises(UserError, match="is a file"):
        run(texts, texts["text"])
    quiet = Console(file=io.StringIO())
    with pytest.raises(UserError, match="not known"):
        run_pretrain(PretrainConfig(**TINY), **texts, output=tmp_path / "c", device="abacus", console=quiet)
