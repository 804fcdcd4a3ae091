"""Fine-tuning brings a converted model nearer to its original, resumes exactly, and leaves what it is given alone."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bsbr import BSBRConfig, convert
from bsbr.data.tokenizer import train_tokenizer
from bsbr.errors import UserError
from bsbr.hf.modeling import attention_modules
from bsbr.training.distill import distillation_loss, transfer_loss
from bsbr.training.finetune import finetune
from bsbr.training.finetune_recipe import FinetuneConfig

WORDS = [f"word{i % 37} and {i % 11} more of {i % 5};" for i in range(3000)]
TEXT = "\n<|endoftext|>\n".join(" ".join(WORDS[i : i + 500]) for i in range(0, 3000, 500))
SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def original(family: str = "gpt2"):
    torch.manual_seed(0)
    if family == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, bos_token_id=0, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=300, n_positions=64))
    for parameter in model.parameters():
        parameter.data *= 4  # random weights attend to everything alike: sharpen
    return model.eval()


def recipe(**settings) -> FinetuneConfig:
    defaults = {
        "length": 64,
        "batch_windows": 2,
        "accumulation": 2,
        "distill_tokens": 64 * 4 * 6,
        "lr": 5e-4,
        "eval_windows": 2,
    }
    return FinetuneConfig(**(defaults | {"precision": "float32", "eval_interval": 3, "save_interval": 2} | settings))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("scope", ["calibration", "lora", "attention", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_brings_the_model_nearer_and_moves_what_it_should(family, scope, tokenizer, tmp_path):
    if scope == "lora":
        pytest.importorskip("peft", reason="scope lora needs peft")
    dense = original(family)
    model = convert(dense, SPARSE)
    before = weights(model)
    config = recipe(scope=scope, scalar_lr=1e-2, transfer_tokens=64 * 4 * 4 if scope == "attention" else 0)
    trained, record = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path)
    assert record["after"]["converted"]["kl"] < record["before"]["converted"]["kl"]
    assert json.loads((tmp_path / "finetune.json").read_text())["after"] == record["after"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model given moved"
    assert set(trained.state_dict()) == set(before), "wrappers are left behind"
    moved = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    inside = {name for name in before if ".attn." in name or ".self_attn." in name}
    scalars = {name for name in before if name.endswith(".calibration")}
    assert scalars <= moved
    assert moved - scalars == set() if scope == "calibration" else moved > scalars
    if scope != "all":
        assert moved <= inside
    assert {row["stage"] for row in record["history"]} == {name for name, n in config.tokens.items() if n}
    if scope == "calibration":
        assert record["after"]["dense"]["kl"] == pytest.approx(0, abs=1e-9)


def test_half_precision_is_refused_without_a_gpu(tokenizer, tmp_path):
    config = recipe(precision="float16")
    with pytest.raises(UserError, match="float16 needs a GPU"):
        finetune(convert(original(), SPARSE), config, text=TEXT, tokenizer=tokenizer, output=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 trains on a GPU")
def test_half_precision_brings_the_model_nearer(tokenizer, tmp_path):
    model, config = convert(original("llama"), SPARSE).cuda(), recipe(scope="all", precision="float16")
    _, record = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path)
    assert record["after"]["converted"]["kl"] < record["before"]["converted"]["kl"]


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(tokenizer, tmp_path, monkeypatch):
    model, config = convert(original(), SPARSE), recipe(transfer_tokens=64 * 4 * 3)
    whole, record = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path / "whole")

    steps = itertools.count()

    def interrupt(trainer, args, state, control, **kwargs):
        if next(steps) == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("bsbr.training.finetune_trainer._Watch.on_step_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path / "broken")
    with pytest.raises(UserError, match="--resume"):
        finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path / "broken")
    resumed, again = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path / "broken", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert again["history"] == record["history"]


def test_going_on_with_a_finished_run_trains_nothing_more(tokenizer, tmp_path):
    model, config = convert(original(), SPARSE), recipe(transfer_tokens=64 * 4 * 2, distill_tokens=64 * 4 * 3)
    with torch.no_grad():  # an interrupted command can have left it so
        whole, record = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints" / "1-distill" / "checkpoint-3").iterdir()}
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin"))]
    assert {"manifest.json", "optimizer.safetensors", "optimizer.json", "rng_state_0.json"} <= names
    again, same = finetune(model, config, text=TEXT, tokenizer=tokenizer, output=tmp_path, resume=True)
    assert same["history"] == record["history"]
    assert all(torch.equal(again.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_distillation_loss_is_the_divergence():
    own, taught = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    p, q = taught.softmax(-1), own.softmax(-1)
    loss = distillation_loss(own, taught)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    loss.backward()
    torch.testing.assert_close(own.grad, (q - p).detach() / 10)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transfer_is_zero_where_attention_is_exact_and_local_where_not(family, tokenizer):
    dense, ids = original(family), torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    exact = convert(dense, BSBRConfig(dense_below=0, block_size=8, top_k=8))
    assert transfer_loss(exact, dense, {"input_ids": ids}).item() < 1e-9
    sparse = convert(dense, SPARSE)
    loss = transfer_loss(sparse, dense, {"input_ids": ids})
    assert loss.item() > 1e-6
    loss.backward()
    inside = {id(p) for module in attention_modules(sparse) for p in module.parameters()}
    assert all((p.grad is None or not p.grad.any()) for p in sparse.parameters() if id(p) not in inside)
    assert any(p.grad.any() for p in sparse.parameters() if id(p) in inside and p.grad is not None)


def test_bad_input_is_one_sentence(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="scope = 'most': must be one of"):
        recipe(scope="most")
    with pytest.raises(ValueError, match="nothing to train"):
        recipe(distill_tokens=0)
    with pytest.raises(UserError, match="bsbr convert"):
        finetune(original(), recipe(), text=TEXT, tokenizer=tokenizer, output=tmp_path)
    with pytest.raises(UserError, match="one window needs 64"):
        finetune(convert(original(), SPARSE), recipe(), text="short", tokenizer=tokenizer, output=tmp_path)


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_finetune import SPARSE, TEXT, convert, finetune, original, recipe, train_tokenizer
torch.set_num_threads(1)
trained, _ = finetune(
    convert(original(), SPARSE), recipe(batch_windows=1), text=TEXT,
    tokenizer=train_tokenizer([TEXT], 300), output=sys.argv[2],
)
torch.save(trained.state_dict(), f"{sys.argv[2]}/trained.pt")
"""


def launch_two(script: Path, *arguments: object) -> None:
    """Run a script in two processes that know of each other."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*launch, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_train_as_one(tmp_path, tokenizer):
    script, output = tmp_path / "train.py", tmp_path / "two"
    script.write_text(TWO_PROCESSES)
    launch_two(script, Path(__file__).parent, output)
    together = torch.load(output / "trained.pt")
    one, _ = finetune(convert(original(), SPARSE), recipe(), text=TEXT, tokenizer=tokenizer, output=tmp_path / "one")
    for name, value in one.state_dict().items():
        # AdamW divides by the size of the gradient: where that is rounding noise, so is the step
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5, msg=name)


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_finetune import SPARSE, convert, distillation_loss, original
torch.set_num_threads(1)
dist.init_process_group("gloo")
dense = original("llama")
model = convert(dense, SPARSE).train()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
own = ids.chunk(2)[dist.get_rank()]
distillation_loss(model(own).logits, dense(own).logits.detach()).backward()
gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
if dist.get_rank() == 0:
    torch.save(gradients, sys.argv[2])
dist.destroy_process_group()
"""


def test_weights_sharded_over_two_processes_give_the_gradients_of_one(tmp_path):
    """FSDP2, as `accelerate launch` sets it up on GPUs; it does not on CPUs, so the model is sharded by hand."""
    script, output = tmp_path / "train.py", tmp_path / "two.pt"
    script.write_text(SHARDED)
    launch_two(script, Path(__file__).parent, output)
    shared = torch.load(output)
    dense = original("llama")
    model = convert(dense, SPARSE).train()
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    distillation_loss(model(ids).logits, dense(ids).logits.detach()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert shared.keys() == gradients.keys()
    assert any(name.endswith(".calibration") and gradient.any() for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
