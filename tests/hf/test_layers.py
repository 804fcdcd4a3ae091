"""Some layers converted, the others as they were; what a layer adds to its scores is kept or refused."""

import copy
import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from bsbr import BSBRConfig, calibrate, convert, revert
from bsbr.errors import UserError
from bsbr.hf import BSBRCache, attention_modules
from bsbr.hf.cache import BSBRLayer
from bsbr.peers import AdditiveConfig, ValueOnlyConfig

SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)


def outputs_by_layer(model, ids, **inputs):
    """What each attention module gives."""
    kept = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _, __, output: kept.append(output[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, **inputs)
    for handle in handles:
        handle.remove()
    return kept


def test_a_layer_left_out_is_dense_and_one_converted_is_not(tiny, tokens):
    model, ids = tiny("llama", num_hidden_layers=3), tokens(2, 50)
    dense, converted = outputs_by_layer(model, ids), outputs_by_layer(convert(model, SPARSE, layers=[1]), ids)
    assert torch.equal(converted[0], dense[0])
    assert (converted[1] - dense[1]).abs().max() > 1e-3
    alone = convert(model, SPARSE)
    assert [hasattr(layer.self_attn, "bsbr") for layer in alone.model.layers] == [True] * 3
    some = convert(model, SPARSE, layers=(2, 1, 2))
    assert [hasattr(layer.self_attn, "bsbr") for layer in some.model.layers] == [False, True, True]
    assert [module.layer_idx for module in attention_modules(some)] == [1, 2]


@pytest.mark.parametrize("config", [SPARSE, AdditiveConfig(block_size=8), ValueOnlyConfig()], ids=lambda x: x.mixer)
def test_padded_and_packed_rows_reach_the_dense_layer_whole(config, tiny, tokens, logits):
    converted, ids = convert(tiny("llama", num_hidden_layers=3), config, layers=[1]), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[1, 50:] = 0
    together = logits(converted, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row in range(2):
        alone = logits(converted, ids[row, mask[row].bool()][None])[0]
        assert (together[row, mask[row].bool()] - alone).abs().max() <= 2e-5
    place = torch.cat([torch.arange(37), torch.arange(23)])[None]
    packed = logits(converted, ids[:1], position_ids=place, use_cache=False)
    assert (packed[0, 37:] - logits(converted, ids[:1, 37:])[0]).abs().max() <= 2e-5


def test_the_cache_has_summaries_for_converted_layers_alone(tiny, tokens, logits):
    converted, ids = convert(tiny("llama", num_hidden_layers=3), SPARSE, layers=[0, 2]), tokens(1, 60)
    cache = BSBRCache(converted.config)
    assert [isinstance(layer, BSBRLayer) for layer in cache.layers] == [True, False, True]
    parts = [logits(converted, part, past_key_values=cache, use_cache=True) for part in ids.split([17, 1, 30, 12], 1)]
    assert (torch.cat(parts, 1) - logits(converted, ids)).abs().max() <= 2e-5
    settings = {"max_new_tokens": 20, "eos_token_id": -1, "do_sample": False}  # older prompt lookup needs one
    for way in ({}, {"num_beams": 3}):
        expected = converted.generate(ids, use_cache=False, **settings, **way)
        assert torch.equal(converted.generate(ids, **settings, **way), expected)
    drafted = converted.generate(ids, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(drafted[:, :80], converted.generate(ids, use_cache=False, **settings))
    assert drafted.shape[1] == 80 or Version(transformers.__version__) < Version("5.17")  # it may write more


def test_the_choice_is_saved_kept_changed_and_reverted(tiny, tokens, logits, tmp_path):
    model, ids = tiny("llama", num_hidden_layers=3), tokens(1, 50)
    some = convert(model, SPARSE, layers=[2])
    some.model.layers[2].self_attn.bsbr.calibration.data.fill_(0.7)
    some.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(some, ids))
    assert loaded.config.bsbr_layers == [2]
    kept = convert(loaded, BSBRConfig(dense_below=16, block_size=8, top_k=1))
    assert (kept.model.layers[2].self_attn.bsbr.calibration == 0.7).all()
    assert [module.layer_idx for module in attention_modules(kept)] == [2]
    every = convert(loaded, SPARSE, layers=range(3))
    assert torch.equal(logits(every, ids), logits(convert(model, SPARSE), ids))
    assert "bsbr_layers" not in every.config.to_dict()
    back = revert(loaded)
    assert "bsbr_layers" not in back.config.to_dict()
    assert torch.equal(logits(back, ids), logits(model, ids))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"bsbr_layers": "2"}))
    with pytest.raises(UserError, match="list of layer numbers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [[], [2], [0, -1], [0.5], [True], ["0"]], ids=str)
def test_layers_that_do_not_exist_are_refused(layers, tiny):
    with pytest.raises(UserError, match=r"full-attention layers \[0, 1\]"):
        convert(tiny("llama"), SPARSE, layers=layers)


def test_a_sliding_layer_cannot_be_asked_for(tiny):
    with pytest.raises(UserError, match=r"full-attention layers \[1\], got 0"):
        convert(tiny("gemma3_text"), SPARSE, layers=[0])


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers before 5.18 gives a drafter's sliding window more keys than its mask has",
)
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_drafts_are_rolled_back_behind_a_sliding_window(family, tiny, tokens):
    """The drafter's own cache has sliding layers too, and is cut back when a draft is refused."""
    model, ids = tiny(family, tie_word_embeddings=False), tokens(1, 37)
    converted, drafter = convert(model, SPARSE), convert(model, BSBRConfig(dense_below=0, block_size=8, top_k=0))
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    expected = converted.generate(ids, use_cache=False, **settings)
    assert len(expected[0, 37:].unique()) > 4
    for draft in ({"assistant_model": drafter}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}):
        assert torch.equal(converted.generate(ids, **draft, **settings), expected)


def test_calibration_takes_the_converted_layers(tiny, tokens):
    converted = convert(tiny("llama", num_hidden_layers=3), SPARSE, layers=[1])
    calibrate(converted, tokens(2, 256), tokens=512, length=256, queries_per_head=16, steps=5)
    assert not torch.equal(converted.model.layers[1].self_attn.bsbr.calibration[:, 1:], torch.ones(4, 4))


def test_sinks_are_kept(tiny, tokens, logits):
    """In layers that convert, in sliding ones, with and without padding, and they matter."""
    model, ids = copy.deepcopy(tiny("gpt_oss")), tokens(2, 60)
    for layer, sinks in zip(model.model.layers, ([3.0, -1.0, 0.0, 5.0], [2.0, 0.0, -4.0, 4.0]), strict=True):
        layer.self_attn.sinks.data = torch.tensor(sinks)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    exact = convert(model, BSBRConfig(dense_below=0, block_size=8, top_k=99))
    for inputs in ({}, {"attention_mask": mask}):
        found, expected = (logits(x, ids, **inputs)[mask.bool()] for x in (exact, model))
        assert (found - expected).abs().max() <= 1e-4
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.sinks.data.sub_(9)
    assert (logits(other, ids) - logits(model, ids)).abs().max() > 1e-2


def test_sinks_learn_with_the_others(tiny, tokens):
    model, ids = copy.deepcopy(tiny("gpt_oss")), tokens(1, 60)
    gradients = []
    for one in (model, convert(model, BSBRConfig(dense_below=0, block_size=8, top_k=99))):
        one.zero_grad()
        one(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([layer.self_attn.sinks.grad.clone() for layer in one.model.layers])
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-8


def test_calibration_learns_from_a_model_with_its_sinks(tiny, tokens, logits):
    model, ids = copy.deepcopy(tiny("gpt_oss")), tokens(2, 256)
    seen = []
    model.model.layers[1].self_attn.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    logits(model, ids)
    calibrate(convert(model, SPARSE), ids, tokens=512, length=256, queries_per_head=16, steps=2)
    assert (seen[1][0] - seen[0][0]).abs().max() <= 1e-5  # of two windows one is held out


def test_what_changes_scores_otherwise_is_refused_in_one_sentence(tiny):
    with pytest.raises(UserError, match="attn_logit_softcapping=None") as refusal:
        convert(tiny("gemma2", attn_logit_softcapping=50.0), SPARSE)
    assert "\n" not in str(refusal.value)
    for config in (AdditiveConfig(block_size=8), ValueOnlyConfig()):
        with pytest.raises(UserError, match="attention sinks") as refusal:
            convert(tiny("gpt_oss"), config)
        assert "\n" not in str(refusal.value)
