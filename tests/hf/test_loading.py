"""Whatever is wrong with a model's folder is one line: what, expected, what to do."""

import json
from pathlib import Path

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.errors import UserError
from bsbr.hf import load_model, load_tokenizer


@pytest.fixture
def folder(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x is not None}))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def test_stock_and_converted_models_load(folder, tiny, tokens, logits):
    model, ids = tiny("gpt2"), tokens(1, 40)
    loaded = load_model(folder)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not loaded.training
    assert load_model(str(folder), "bfloat16").dtype == torch.bfloat16
    assert torch.equal(
        logits(convert(str(folder), BSBRConfig(dense_below=0, block_size=8, top_k=1)), ids),
        logits(convert(model, BSBRConfig(dense_below=0, block_size=8, top_k=1)), ids),
    )


def test_a_converted_model_of_a_family_that_was_not_registered_loads(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, Starcoder2Config

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Starcoder2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=None)
    convert(AutoModelForCausalLM.from_config(config), BSBRConfig(dense_below=0, block_size=8)).save_pretrained(tmp_path)
    assert load_model(tmp_path).config.model_type == "bsbr-starcoder2"


DAMAGE = {
    "no config": (lambda x: (x / "config.json").unlink(), "config.json missing"),
    "config cut short": (lambda x: cut(x / "config.json", 50), "config.json cannot be read"),
    "config not UTF-8": (lambda x: (x / "config.json").write_bytes(b"\xff\xfe{"), "config.json cannot be read"),
    "config not an object": (lambda x: (x / "config.json").write_text("[1]"), "must hold a JSON object"),
    "no type": (lambda x: edit(x, model_type=None), "names no model_type"),
    "unknown type": (lambda x: edit(x, model_type="gpt17"), "type gpt17 is not known to transformers"),
    "remote code": (
        lambda x: edit(x, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}), "code of its own",
    ),
    "not causal": (lambda x: edit(x, model_type="vit"), "type vit is not a causal language model"),
    "unconvertible": (lambda x: edit(x, model_type="bsbr-bloom"), "bloom cannot be converted"),
    "other sizes": (lambda x: edit(x, n_embd=36), "cannot be loaded"),
    "senseless sizes": (lambda x: edit(x, n_embd="many"), "cannot be loaded"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), "model.safetensors missing"),
    "pickled weights": (
        lambda x: (x / "model.safetensors").rename(x / "pytorch_model.bin"), "pickled weights, which can run code",
    ),
    "weights cut short": (lambda x: cut(x / "model.safetensors", 5000), "model.safetensors is damaged"),
    "empty weights": (lambda x: cut(x / "model.safetensors", 0), "model.safetensors is damaged"),
    "weights that are text": (
        lambda x: (x / "model.safetensors").write_text("<html>not found</html>"), "model.safetensors is damaged",
    ),
    "a shard missing": (
        lambda x: (x / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        ),
        "model-2.safetensors missing",
    ),
    "an index cut short": (
        lambda x: (x / "model.safetensors.index.json").write_text('{"weight_map"'), "index.json cannot be read",
    ),
    "an index without weights": (lambda x: (x / "model.safetensors.index.json").write_text("{}"), "missing"),
    "damaged settings": (
        lambda x: edit(x, model_type="bsbr-gpt2", bsbr={"mixer": "bsbr", "block_size": 0}), "block_size must be",
    ),
    "unknown mixer": (
        lambda x: edit(x, model_type="bsbr-gpt2", bsbr={"mixer": "magic"}), "unknown mixer 'magic'",
    ),
    "settings of the wrong kind": (
        lambda x: edit(x, model_type="bsbr-gpt2", bsbr={"top_k": [1]}), "settings are not valid",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage, folder):
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path, monkeypatch, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path / "absent", f"{tmp_path}/absent", "./absent", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            load_model(name)
    with pytest.raises(UserError, match="is a file"):
        load_model(folder / "config.json")
    with pytest.raises(UserError, match="neither a folder nor a name on the hub"):
        load_model("no spaces allowed")
    with pytest.raises(UserError, match=r"the hub cannot be reached: give a folder .* \"embedded\""):
        load_model("nobody-at-all/has-this-model")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        load_tokenizer("nobody-at-all/has-this-model")


def test_dtypes_and_devices(folder):
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        load_model(folder, "int8")
    for device in ("cuda:99", "quantum"):
        with pytest.raises(UserError, match=f"device {device} cannot be used"):
            load_model(folder, device=device)


def test_tokenizers(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="one").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("two")["input_ids"] == [1]
    cut(Path(tmp_path / "tokenizer.json"), 60)
    with pytest.raises(UserError, match="tokenizer that cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json missing"):
        load_tokenizer(tmp_path)
