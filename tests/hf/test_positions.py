"""More positions than a model was trained with, and the answer to too many tokens."""

import copy

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.errors import UserError
from bsbr.hf import check_length, extend_positions, load_model, max_positions

SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)


@pytest.mark.parametrize(("family", "path", "offset"), [
    ("gpt2", "transformer.wpe", 0), ("opt", "model.decoder.embed_positions", 2), ("gpt_bigcode", "transformer.wpe", 0),
])  # fmt: skip
def test_learned_positions_are_stretched(family, path, offset, tiny, tokens, logits, tmp_path):
    model = copy.deepcopy(tiny(family))
    old = model.get_submodule(path).weight.detach().clone()
    long = convert(model, SPARSE, max_length=1023)
    new = long.get_submodule(path).weight
    assert len(new) == 1023 + offset
    assert max_positions(long) == 1023
    assert max_positions(model) == 512
    assert torch.equal(new[: offset + 1], old[: offset + 1])
    assert torch.allclose(new[offset::2], old[offset:], atol=1e-5)  # 1023 = 2 * 512 - 1: every second is a known one
    assert torch.allclose(new[offset + 1], (old[offset] + old[offset + 1]) / 2, atol=1e-5)
    assert torch.equal(model.get_submodule(path).weight, old)
    ids = tokens(1, 1023)
    long.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path), ids), logits(long, ids))


def test_tiling_keeps_the_known_positions(tiny, tokens, logits):
    model = tiny("gpt2")
    long, ids = extend_positions(model, 1300, "tile"), tokens(1, 512)
    assert torch.equal(logits(long, ids), logits(model, ids))
    assert torch.equal(long.transformer.wpe.weight[1024:], model.transformer.wpe.weight[: 1300 - 1024])


def test_enough_positions_stay(tiny):
    model = tiny("gpt2")
    assert torch.equal(extend_positions(model, 512).transformer.wpe.weight, model.transformer.wpe.weight)
    assert extend_positions(model, 100).config.n_positions == 512


def test_rotary_models_only_raise_their_maximum(tiny):
    model = tiny("llama")
    with pytest.warns(UserWarning, match="beyond 512"):
        long = convert(model, SPARSE, max_length=600)
    assert (long.config.max_position_embeddings, model.config.max_position_embeddings) == (600, 512)
    assert max_positions(model) is None
    check_length(model, 10**6)


def test_what_cannot_be_extended(tiny):
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    with pytest.raises(UserError, match=r"already scales its positions \(yarn\)"):
        extend_positions(tiny("llama", rope_parameters=scaled), 1024)
    with pytest.raises(UserError, match="max_length must be an integer >= 1, got 0"):
        extend_positions(tiny("gpt2"), 0)
    with pytest.raises(UserError, match="method must be one of interpolate, tile"):
        extend_positions(tiny("gpt2"), 1024, "repeat")
    with pytest.raises(UserError, match='"yarn" is for rotary positions'):
        extend_positions(tiny("gpt2"), 1024, "yarn")


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn"])
def test_rotary_positions_are_scaled_as_transformers_scales_them(method, tiny, tokens, logits, tmp_path):
    model, ids = tiny("llama"), tokens(1, 1024)
    long = extend_positions(model, 1024, method, trained_length=256)
    factor = 1.0 if method == "dynamic" else 4.0
    scaled = {"rope_type": method, "factor": factor, "original_max_position_embeddings": 256}
    theta = model.config.rope_parameters["rope_theta"]
    maximum = 256 if method == "dynamic" else 1024
    direct = tiny("llama", rope_parameters={**scaled, "rope_theta": theta}, max_position_embeddings=maximum)
    direct = copy.deepcopy(direct)
    direct.load_state_dict(model.state_dict())
    assert torch.equal(logits(long, ids), logits(direct, ids))
    assert not torch.equal(logits(long, ids), logits(model, ids))
    if method == "linear":
        angles = [x.model.rotary_emb(torch.zeros(1), torch.tensor([[p]]))[0] for x, p in ((model, 5), (long, 20))]
        assert torch.allclose(*angles)
    sparse = convert(long, BSBRConfig(dense_below=0, block_size=64, top_k=20))
    assert torch.allclose(logits(sparse, ids), logits(long, ids), atol=1e-4)
    sparse.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path), ids), logits(sparse, ids))
    assert model.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_too_many_tokens_are_refused_in_one_line(family, tiny, tokens, logits):
    converted = convert(tiny(family), SPARSE)
    with pytest.raises(UserError, match="513 tokens are beyond the model's 512 positions"):
        logits(converted, tokens(1, 513))
    with pytest.raises(UserError, match="513 tokens are beyond"):
        converted.generate(tokens(1, 511), max_new_tokens=3, do_sample=False, eos_token_id=None)
    with pytest.raises(UserError, match="length 513 is beyond the model's 512 positions"):
        check_length(tiny(family), 513)
    check_length(converted, 512)


def test_packed_documents_may_be_longer_together(tiny, tokens, logits):
    converted = convert(tiny("gpt2"), SPARSE)
    place = torch.cat([torch.arange(400), torch.arange(300)])[None]
    assert logits(converted, tokens(1, 700), position_ids=place, use_cache=False).shape[1] == 700
