"""Converted models train: every mixer's parameters get gradients, with dropout, checkpointing and autocast."""

import copy

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.hf import attention_modules
from bsbr.hf.call import Call
from bsbr.hf.mixers import MIXERS, attend
from bsbr.peers import AdditiveConfig, make

SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)


def gradients(model, ids, **inputs):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_reach_the_calibration_and_the_weights(family, padded, tiny, tokens):
    converted, ids = copy.deepcopy(convert(tiny(family), SPARSE)).train(), tokens(2, 48)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 40:] = 0
    found = gradients(converted, ids, attention_mask=mask)
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        if name.endswith("calibration"):
            assert gradient.any(dim=0).all(), name


def test_gradients_reach_the_projections_of_the_additive_form(tiny, tokens):
    converted = copy.deepcopy(convert(tiny("llama"), AdditiveConfig(block_size=8, compression=2)))
    found = gradients(converted.train(), tokens(2, 48))
    ours = [name for name in found if ".bsbr." in name]
    assert len(ours) == 2 * 8
    assert all(found[name].any() for name in ours if name[-6:] != "h_bias")


@pytest.mark.parametrize("config", [SPARSE, AdditiveConfig(block_size=8)], ids=["bsbr", "additive"])
def test_gradient_checkpointing_changes_nothing(config, tiny, tokens):
    plain, ids = copy.deepcopy(convert(tiny("llama"), config)).train(), tokens(2, 40)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    expected, actual = gradients(plain, ids), gradients(checkpointed, ids)
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-6), name


def test_dropout_acts_in_training_only(tiny, tokens):
    converted, ids = copy.deepcopy(convert(tiny("gpt2", embd_pdrop=0, resid_pdrop=0), SPARSE)), tokens(1, 40)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        still = converted(ids).logits
        converted.train()
        torch.manual_seed(1)
        one, two = converted(ids).logits, converted(ids).logits
        torch.manual_seed(1)
        again = converted(ids).logits
    assert not torch.equal(one, two)
    assert torch.equal(one, again)
    assert not torch.equal(one, still)


def test_autocast_runs_with_float32_summaries(tiny, tokens):
    converted, ids = copy.deepcopy(convert(tiny("llama"), SPARSE)), tokens(2, 48)
    exact = converted(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        near = converted(ids, labels=ids)
    near.loss.backward()
    assert (near.logits.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    for module in attention_modules(converted):
        assert module.bsbr.calibration.grad.dtype == torch.float32
        assert module.bsbr.calibration.grad.any()


@pytest.mark.parametrize(("name", "settings"), [("bsbr", SPARSE), ("linear", make("linear", {}))])
def test_autocast_stays_out_of_the_attention(name, settings):
    q, k, v = torch.randn(3, 1, 48, 2, 16, generator=torch.Generator().manual_seed(0))
    call = Call(q, k, v, None, 0.25, 0, None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        under = attend(call, MIXERS[name], settings, None)
    low = call._replace(q=q.bfloat16(), k=k.bfloat16(), v=v.bfloat16())
    assert torch.equal(under, attend(low, MIXERS[name], settings, None))


def test_bfloat16(tiny, tokens, logits):
    converted, ids = convert(tiny("llama"), SPARSE), tokens(2, 48)
    exact, near = logits(converted, ids), logits(copy.deepcopy(converted).bfloat16(), ids)
    assert (near.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
