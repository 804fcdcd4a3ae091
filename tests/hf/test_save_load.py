"""What save_pretrained writes, AutoModelForCausalLM reads back to the bit; damage is never silent."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bsbr import BSBRConfig, convert, revert
from bsbr.errors import UserError
from bsbr.hf import attention_modules, load_model
from bsbr.peers import AdditiveConfig, ValueOnlyConfig

SPARSE = BSBRConfig(block_size=8, retrieval_block_size=4, top_k=3, dense_below=10)


@pytest.mark.parametrize("config", [SPARSE, AdditiveConfig(block_size=8, compression=2, seed=3), ValueOnlyConfig()])
def test_round_trip_is_exact(family, config, tiny, tokens, logits, tmp_path):
    converted = convert(tiny(family), config)
    for number, module in enumerate(attention_modules(converted)):
        for parameter in getattr(module, "bsbr", torch.nn.Module()).parameters():
            parameter.data.normal_(1, 0.1, generator=torch.Generator().manual_seed(number))
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted)
    assert loaded.config.bsbr == converted.config.bsbr
    expected = converted.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    ids = tokens(1, 50)
    assert torch.equal(logits(loaded, ids), logits(converted, ids))
    assert torch.equal(logits(revert(loaded), ids), logits(tiny(family), ids))


def test_numbers_of_blocks_per_head_are_saved_and_kept(tiny, tokens, logits, tmp_path):
    rows = ((0, 3), None)
    converted = convert(tiny("llama"), replace(SPARSE, top_k_per_head=rows))
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.bsbr["top_k_per_head"] == rows
    ids = tokens(1, 50)
    assert torch.equal(logits(loaded, ids), logits(converted, ids))
    assert not torch.equal(logits(loaded, ids), logits(convert(tiny("llama"), SPARSE), ids))
    longer = convert(loaded, replace(SPARSE, dense_below=20))  # differs in dense_below alone
    assert longer.config.bsbr["top_k_per_head"] == rows
    assert convert(loaded, replace(SPARSE, top_k=2)).config.bsbr["top_k_per_head"] is None


def test_a_second_generation_is_the_same(tiny, tokens, logits, tmp_path):
    converted = convert(tiny("gpt_neox"), SPARSE)
    converted.save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    ids = tokens(1, 50)
    assert torch.equal(logits(load_model(tmp_path / "two"), ids), logits(converted, ids))
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("one", "two")]
    assert configs[0] == configs[1]


def test_calibration_stays_float32_in_a_bfloat16_model(tiny, tmp_path):
    converted = convert(tiny("llama"), SPARSE)
    for module in attention_modules(converted):
        module.bsbr.calibration.data.fill_(1.001)
    half = converted.to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    for model in (half, AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path, "bfloat16")):
        assert model.dtype == torch.bfloat16
        for module in attention_modules(model):
            assert module.bsbr.calibration.dtype == torch.float32
            assert (module.bsbr.calibration == 1.001).all()


def test_a_new_model_from_its_config_is_uncalibrated(tiny):
    config = convert(tiny("llama"), SPARSE).config
    state = torch.get_rng_state()
    model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers[1].self_attn.bsbr.calibration[3].tolist() == [0, 1, 1, 1, 1]
    torch.set_rng_state(state)


def test_additive_projections_come_from_their_seed_alone(tiny):
    state = torch.get_rng_state()
    one, two, other = (convert(tiny("llama"), AdditiveConfig(seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (model.model.layers[0].self_attn.bsbr.r_weight for model in (one, two, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, one.model.layers[1].self_attn.bsbr.r_weight)
    assert 0.9 * 32**-0.5 < first.abs().max() <= 32**-0.5


def test_a_stock_folder_loads_into_the_converted_class_uncalibrated(tiny, tokens, logits, tmp_path):
    model, ids = tiny("gpt_neox"), tokens(1, 40)
    model.save_pretrained(tmp_path)
    kind = type(convert(model, SPARSE))
    for config, mixer in ((SPARSE, "bsbr"), (AdditiveConfig(block_size=8), "additive")):
        converted = convert(model, config)
        path = tmp_path / mixer
        converted.save_pretrained(path)
        model.save_pretrained(tmp_path / "stock")
        (path / "model.safetensors").write_bytes((tmp_path / "stock" / "model.safetensors").read_bytes())
        (path / "manifest.json").unlink()  # weights that were replaced on purpose
        assert torch.equal(logits(kind.from_pretrained(path), ids), logits(converted, ids))


def test_missing_weights_are_refused(tiny, tmp_path):
    convert(tiny("llama"), SPARSE).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "manifest.json").unlink()
    ours = "model.layers.1.self_attn.bsbr.calibration"
    for name in ("model.layers.0.mlp.up_proj.weight", ours):
        save_file(
            {key: x for key, x in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(UserError, match=f"1 weights are missing, first {name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(UserError, match=name):
            load_model(tmp_path)


def test_pickling(tiny, tokens, logits):
    converted, ids = convert(tiny("gpt2"), SPARSE), tokens(1, 40)
    assert torch.equal(logits(pickle.loads(pickle.dumps(converted)), ids), logits(converted, ids))


_LOAD = "print(type(AutoModelForCausalLM.from_pretrained({path!r})).__name__)\n"
_BSBR_FIRST = """
import sys, bsbr
assert not {{"torch", "transformers", "matplotlib"}} & set(sys.modules)
from transformers import AutoModelForCausalLM
"""
_BSBR_LAST = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise SystemExit("loaded without bsbr")
import bsbr
"""


_TRUSTED = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "bsbr" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)
model.save_pretrained({path!r} + "/again")
print(type(AutoModelForCausalLM.from_pretrained({path!r} + "/again")).__name__)
"""


def test_a_folder_that_is_trusted_loads_where_bsbr_was_not_imported(tiny, tokens, logits, tmp_path):
    """Three generations, the same bits; a folder is not trusted by itself, nor is its module read by `load_model`."""
    converted, ids = convert(tiny("gpt_neox"), SPARSE), tokens(1, 40)
    converted.save_pretrained(tmp_path)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _TRUSTED.format(path=str(tmp_path))],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == "BSBRGPTNeoXForCausalLM", done.stderr
    again = load_model(tmp_path / "again")
    assert torch.equal(logits(again, ids), logits(converted, ids))
    written = (tmp_path / "again" / "bsbr_hub.py").read_text()
    assert written == (tmp_path / "bsbr_hub.py").read_text()
    assert sorted(file.name for file in (tmp_path / "again").glob("*.py")) == ["bsbr_hub.py"]
    (tmp_path / "bsbr_hub.py").write_text("raise SystemExit('code of the folder ran')")
    assert torch.equal(logits(load_model(tmp_path), ids), logits(converted, ids))
    assert "auto_map" not in revert(again).config.to_dict()


def test_without_bsbr_loading_fails_loudly_and_with_it_works_in_any_order(tiny, tmp_path):
    """A converted model must never load as a dense one; `import bsbr` alone is enough, and light."""
    convert(tiny("gpt2"), SPARSE).save_pretrained(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", (start + _LOAD).format(path=str(tmp_path))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for start in (_BSBR_FIRST, _BSBR_LAST)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "BSBRGPT2LMHeadModel", err
