"""What a run can be made of: architectures, attentions, tasks, passes, stages, processes. Kills do not matter."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bsbr.data.tasks import TaskConfig
from bsbr.errors import UserError
from bsbr.training.batches import Stages, TaskBatches
from bsbr.training.build import build_model, parse_attention
from bsbr.training.pretrain import PretrainConfig, run_pretrain
from tests.training.runs import TEXT, TINY, run, weights

SPARSE = "bsbr:block_size=4,top_k=1"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt_neox"])
def test_any_architecture_trains_sparse_and_opens_again(
    architecture: str, texts: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    record = run(texts, tmp_path / "out", architecture=architecture, attention=parse_attention(SPARSE))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.config.model_type == f"bsbr-{architecture}"
    assert model.config.bsbr["top_k"] == 1
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert record["recipe"]["attention"]["block_size"] == 4


@pytest.mark.parametrize("attention", ["full", "window:window=6", "linear", "gated_delta", SPARSE])
def test_a_resumed_run_of_any_attention_has_the_weights_of_a_whole_one(
    attention: str, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsbr.training.trainer import Trainer

    options = {"architecture": "llama", "kv_heads": 1, "attention": parse_attention(attention)}
    whole = run(texts, tmp_path / "whole", **options)
    step = Trainer._one_step

    def killed(self: Trainer, batch: Any) -> torch.Tensor:
        if self.step == 8:
            raise SystemExit
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", killed)
        with pytest.raises(SystemExit):
            run(texts, tmp_path / "parts", **options)
    record = run(texts, tmp_path / "parts", resume=True, **options)
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "parts").items())
    assert record["history"] == whole["history"]


def test_a_kill_between_model_and_record_is_gone_on_with(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsbr.training import pretrain

    run(texts, tmp_path / "whole")

    def killed(path: Any, content: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_json", killed)
        with pytest.raises(SystemExit):
            run(texts, tmp_path / "parts")
    assert (tmp_path / "parts" / "model.safetensors").exists()
    run(texts, tmp_path / "parts", resume=True)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == expected
    assert not (tmp_path / "parts" / "checkpoints").exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads here as in the processes that are killed: sums of two threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_at_random_moments(texts: dict[str, Path], tmp_path: Path) -> None:
    """The long version is benchmarks/kill_resume.py."""
    run(texts, tmp_path / "whole", checkpoint_interval=1)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    folder, script = tmp_path / "parts", tmp_path / "kill.py"
    script.write_text(  # forks once it has imported everything, so that each child begins at once
        "import os, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.training.runs import run\n"
        "texts = {'text': Path(sys.argv[2]), 'val': Path(sys.argv[3])}\n"
        "for delay in sys.argv[5:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        run(texts, Path(sys.argv[4]), resume=True, checkpoint_interval=1)\n"
        "        os._exit(0)\n"
        "    time.sleep(float(delay))\n"
        "    os.kill(child, 9)\n"
        "    os.waitpid(child, 0)\n"
    )
    arguments = [Path(__file__).parents[2], texts["text"], texts["val"], folder, 0.1, 0.35, 0.8]
    subprocess.run([sys.executable, *map(str, (script, *arguments))], check=True, capture_output=True, timeout=120)
    if not (folder / "training.json").exists():
        run(texts, folder, resume=True, checkpoint_interval=1)
    assert (folder / "model.safetensors").read_bytes() == expected


def test_passes_change_nothing_but_rounding(texts: dict[str, Path], tmp_path: Path) -> None:
    one, four = (tmp_path / name for name in ("one", "four"))
    for folder, passes in ((one, 1), (four, 4)):
        run(texts, folder, accumulation=passes, optimizer="adamw", tokens=64 * 4)
    expected = weights(one)
    for name, tensor in weights(four).items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=1e-4, msg=name)
    with pytest.raises(ValueError, match="accumulation = 3: must be a divisor of the 4 windows"):
        PretrainConfig(**{**TINY, "accumulation": 3})


def test_documents_are_kept_apart_unless_joined(tmp_path: Path) -> None:
    text = "\n<|endoftext|>\n".join(TEXT[i : i + 60] for i in range(0, 3000, 60))
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = {"text": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
    nll = {}
    for documents in ("separate", "joined"):
        options = {"architecture": "llama", "attention": parse_attention(SPARSE), "documents": documents}
        nll[documents] = run(texts, tmp_path / documents, **options)["held_out"]["nll"]
    assert nll["separate"] != nll["joined"]


def test_a_curriculum_reads_short_windows_first() -> None:
    recipe = PretrainConfig(**{**TINY, "curriculum": ((4, 0.25), (8, 0.25))})
    stages = Stages(recipe, 12)
    assert [stages.at(step) for step in (0, 2, 3, 5, 6, 11)] == [
        (0, 4, 0), (0, 4, 2), (1, 8, 0), (1, 8, 2), (2, 16, 0), (2, 16, 5)
    ]  # fmt: skip
    task = TaskConfig(task="induction", length=16, vocab=32)
    batches = TaskBatches(task, recipe, 12, torch.device("cpu"))
    assert [batches.at(step).windows.shape for step in (0, 3, 6)] == [(16, 5), (8, 9), (4, 17)]
    assert torch.equal(batches.at(3).windows, batches.at(3).windows)
    assert not torch.equal(batches.at(3).windows, batches.at(4).windows)
    crowded = TaskBatches(TaskConfig(task="mqar", length=16, vocab=32, pairs=4), recipe, 12, torch.device("cpu"))
    assert [int(crowded.at(step).scored.sum(1)[0]) for step in (0, 3, 6)] == [1, 2, 4]  # type: ignore[union-attr]
    for wrong, said in (
        (((16, 0.5),), "stay below context"),
        (((4, 0.5), (8, 0.5)), "leave some to context"),
        (((5, 0.5),), "divide batch_tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            PretrainConfig(**{**TINY, "curriculum": wrong})
    with pytest.raises(ValueError, match="not with minutes"):
        PretrainConfig(**{**TINY, "curriculum": ((4, 0.5),), "tokens": None, "minutes": 1.0})


def test_a_task_is_learned_and_its_accuracy_recorded(tmp_path: Path) -> None:
    task = TaskConfig(task="selective_copy", length=16, vocab=16, pairs=2).to_dict()
    changes = {"task": task, "layers": 2, "hidden": 32, "lr": 1e-2, "batch_tokens": 512, "tokens": 512 * 120}
    config = PretrainConfig(**{**TINY, **changes, "val_interval": 60, "val_windows": 32, "checkpoint_interval": 60})
    record = run_pretrain(config, output=tmp_path, device="cpu", console=Console(file=io.StringIO()))
    found = record["held_out"]
    assert found["accuracy"]["value"] > 2 * found["chance"]
    assert found["accuracy"]["n"] == 2 * found["examples"]
    assert record["text"]["task"]["task"] == "selective_copy"
    assert {"accuracy", "held_out_nll", "step"} <= set(record["history"][-1])
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 16


def test_a_configuration_file_is_an_architecture(texts: dict[str, Path], tmp_path: Path) -> None:
    values = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
              "intermediate_size": 16, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "shape.json").write_text(json.dumps(values))
    model = build_model(PretrainConfig(**{**TINY, "architecture": str(tmp_path / "shape.json")}), 50)
    assert (model.config.hidden_size, model.config.vocab_size) == (24, 50)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "lamma"}, "no causal language model of transformers, and no JSON file"),
        ({"architecture": "bloom"}, "cannot be"),
        ({"architecture": "none.json"}, "no such file"),
        ({"kv_heads": 1}, "gpt2 has no key heads apart"),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(PretrainConfig(**{**TINY, **changes}), 50)


def test_attentions_that_are_none_say_so() -> None:
    for text, said in (
        ("sparse", "attention 'sparse' is not known"),
        ("bsbr:top_k", "is no key=value"),
        ("bsbr:topk=3", "unknown BSBR setting 'topk'"),
        ("full:block_size=3", "no settings"),
    ):
        with pytest.raises(UserError, match=said):
            parse_attention(text)
    assert parse_attention("full") is None


def test_sources_that_do_not_fit_are_refused(texts: dict[str, Path], tmp_path: Path) -> None:
    task = TaskConfig(task="induction", length=16, vocab=32).to_dict()
    with pytest.raises(UserError, match="leave text, val, tokenizer and samples out"):
        run(texts, tmp_path / "a", task=task)
    with pytest.raises(UserError, match="give text and val, or a task"):
        run_pretrain(PretrainConfig(**TINY), output=tmp_path / "b", device="cpu")


def test_two_processes_train_the_weights_of_one(texts: dict[str, Path], tmp_path: Path) -> None:
    """AdamW: Muon rounds to bfloat16 inside, which turns the last digits of a gradient into the first of a step."""
    options = f"architecture='llama', kv_heads=1, attention=parse_attention({SPARSE!r}), optimizer='adamw'"
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\nfrom bsbr.training.build import parse_attention\n"
        "from tests.training.runs import run\n"
        f"texts = {{'text': Path({str(texts['text'])!r}), 'val': Path({str(texts['val'])!r})}}\n"
        f"run(texts, Path({str(tmp_path / 'two')!r}), {options})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one = run(texts, tmp_path / "one", architecture="llama", kv_heads=1, attention=parse_attention(SPARSE),
               optimizer="adamw")  # fmt: skip
    record = json.loads((tmp_path / "two" / "training.json").read_text())
    assert record["processes"] == 2
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=1e-4, msg=name)
    assert record["held_out"]["nll"] == pytest.approx(one["held_out"]["nll"], rel=1e-4)
    for ours, theirs in zip(record["history"], one["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
