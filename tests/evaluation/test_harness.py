"""lm-evaluation-harness on a converted model, offline, with a task of its own."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bsbr import BSBRConfig, convert
from bsbr.data.tokenizer import train_tokenizer
from bsbr.errors import UserError

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 6
TASK = """
task: tiny_books
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
SETTINGS = {"block_size": 8, "top_k": 1, "dense_below": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny stock model, the same converted, their tokenizer, and a task."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    stock = LlamaForCausalLM(config)
    for name, model in (("stock", stock), ("converted", convert(stock, BSBRConfig(**SETTINGS)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": TEXT[i : i + 300]}) + "\n" for i in range(3)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny.yaml").write_text(TASK.replace("FILE", str(folder / "test.jsonl")))
    return folder


@pytest.fixture
def evaluate(folder, monkeypatch, tmp_path):
    """Bits per byte of a model."""
    harness = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(model, **arguments):
        found = harness.simple_evaluate(
            model=model, tasks=["tiny_books"], bootstrap_iters=0, task_manager=manager, device="cpu", **arguments
        )
        return found["results"]["tiny_books"]["bits_per_byte,none"]

    return run


def test_every_way_to_a_converted_model_gives_the_same_figure(folder, evaluate):
    from lm_eval.models.huggingface import HFLM

    from bsbr.evaluation.harness import BSBRLM
    from bsbr.hf import load_model, load_tokenizer

    assert BSBRLM.__name__ == "BSBRLM"  # registers "bsbr"
    stock, converted = str(folder / "stock"), str(folder / "converted")
    in_memory = evaluate(HFLM(pretrained=load_model(converted), tokenizer=load_tokenizer(converted), batch_size=2))
    assert evaluate("bsbr", model_args={"pretrained": converted}) == pytest.approx(in_memory, abs=1e-5)
    assert evaluate("bsbr", model_args={"pretrained": stock, **SETTINGS}) == pytest.approx(in_memory, abs=1e-5)
    assert evaluate("hf", model_args={"pretrained": stock}) != pytest.approx(in_memory, abs=1e-3)


def test_a_stock_model_without_settings_is_refused(folder, evaluate):
    import bsbr.evaluation.harness  # noqa: F401  registers "bsbr"

    with pytest.raises(UserError, match="is not converted"):
        evaluate("bsbr", model_args={"pretrained": str(folder / "stock")})
