"""The chunked form of Gated DeltaNet is its recurrence, and the layer is causal and stable."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from bsbr.peers import GatedDeltaConfig, Shape, gated_delta_attention, gated_delta_layer, gated_delta_weights
from bsbr.peers import gated_delta as module
from tests.peers.cases import draw

SHAPE = Shape(hidden_size=10, heads=4, key_heads=2, width=6)


def inputs(tokens, dtype=torch.float64, width=6):
    """Unit keys, decays from none to strong, and strengths from 0 to 1."""
    q, k, v = (x.to(dtype) for x in draw(tokens, width=width))
    generator = torch.Generator().manual_seed(1)
    log_decay = -(torch.rand(2, tokens, 2, generator=generator).to(dtype) ** 4) * 3
    beta = torch.rand(2, tokens, 2, generator=generator).to(dtype)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_decay, beta


def recurrence(q, k, v, log_decay, beta):
    """One token after the other, as the paper has it: S = S (a (I - b k k^T)) + b v k^T, with S^T here."""
    q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
    k, v, log_decay, beta = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v, log_decay, beta))
    state, outputs = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        b, a = beta[:, t, :, None, None], log_decay[:, t, :, None, None].exp()
        outer = k[:, t, :, :, None] * k[:, t, :, None, :]
        state = a * (state - b * outer @ state) + b * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128, 129, 330])
def test_chunks_are_the_recurrence(tokens):
    given = inputs(tokens)
    assert torch.allclose(gated_delta_attention(*given), recurrence(*given), rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_recurrence():
    given = [x.requires_grad_() for x in inputs(150, width=3)]
    weight = torch.randn(2, 150, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad((gated_delta_attention(*given) * weight).sum(), given)
    expected = torch.autograd.grad((recurrence(*given) * weight).sum(), given)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-11) for pair in zip(actual, expected, strict=True))


def test_the_benchmark_computes_what_the_layers_of_qwen_3_5_do():
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    from benchmarks.from_scratch import gated_delta_rule

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, 3, 16, generator=generator).requires_grad_() for _ in range(3))
    given = {
        "g": -torch.rand(2, 150, 3, generator=generator), "beta": torch.rand(2, 150, 3, generator=generator),
        "initial_state": None, "output_final_state": False, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    theirs = modeling.torch_chunk_gated_delta_rule(q, k, v, **given)[0]
    ours = gated_delta_rule(gated_delta_attention)(q, k, v, **given)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    found, expected = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_it_is_stable_over_many_tokens_without_decay():
    """The same few keys written again and again with full strength: nothing grows, and float32 loses little."""
    q, k, v, log_decay, beta = inputs(3000, torch.float32)
    k = k[:, torch.arange(3000) % 5]
    given = q, k, v, torch.zeros_like(log_decay), torch.ones_like(beta)
    assert (gated_delta_attention(*given) - recurrence(*given)).abs().max() < 1e-4


def test_a_strong_decay_forgets_without_overflow():
    q, k, v, log_decay, beta = inputs(200, torch.float32)
    given = [x.requires_grad_() for x in (q, k, v, log_decay - 50, beta)]
    o = gated_delta_attention(*given)
    own = (q * k.repeat_interleave(2, 2)).sum(-1, keepdim=True) * (beta[..., None] * v).repeat_interleave(2, 2)
    assert torch.allclose(o, own, atol=1e-6)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(o.sum(), given))


def layer_inputs(tokens, dtype=torch.float32):
    weights = gated_delta_weights(SHAPE, torch.Generator().manual_seed(0))
    hidden = torch.randn(2, tokens, 10, generator=torch.Generator().manual_seed(3))
    return [*(x.to(dtype) for x in draw(tokens)), hidden.to(dtype)], weights


def test_the_layer_is_its_parts_written_out():
    (q, k, v, hidden), weights = layer_inputs(70, torch.float64)
    wide = {name: x.double() for name, x in weights.items()}

    def convolved(x, taps):
        channels = x.flatten(2).mT
        mixed = F.conv1d(F.pad(channels, (3, 0)), taps.flatten(0, 1)[:, None], groups=channels.shape[1])
        return F.silu(mixed).mT.unflatten(2, x.shape[2:])

    q, k, v = (convolved(x, wide[f"conv_{name}"]) for name, x in (("q", q), ("k", k), ("v", v)))
    log_decay = -wide["rate"].exp() * F.softplus(hidden @ wide["decay"].T + wide["step"])
    beta = (hidden @ wide["beta"].T).sigmoid()
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    o = recurrence(q, k, v, log_decay, beta)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * wide["norm"]
    expected = o * F.silu(hidden @ wide["gate"].T).unflatten(2, o.shape[2:])
    actual = gated_delta_layer(*(x.double() for x in draw(70)), hidden, weights)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-6)  # the weights are float32


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_the_layer_is_causal_to_the_bit(tokens):
    given, weights = layer_inputs(tokens)
    before = gated_delta_layer(*given, weights)
    for position in range(0, tokens, 3):
        for index in range(4):
            changed = [x.clone() for x in given]
            changed[index][:, position] += 1
            moved = (gated_delta_layer(*changed, weights) != before).flatten(2).any(-1).any(0)
            assert not moved[:position].any()
            assert moved[position]


def test_bfloat16_is_near_float32():
    given, weights = layer_inputs(500)
    exact = gated_delta_layer(*given, weights)
    near = gated_delta_layer(*(x.bfloat16() for x in given), weights)
    assert near.dtype == torch.bfloat16
    assert (near - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_first_values_follow_mamba():
    weights = gated_delta_weights(Shape(16, 64, 64, 4), torch.Generator().manual_seed(0))
    step = F.softplus(weights["step"])
    assert 0.001 < step.min() < 0.002
    assert 0.05 < step.max() < 0.1
    assert weights["rate"].exp().min() >= 1
    assert weights["rate"].exp().max() <= 16


def test_kernels_get_what_they_ask_for(monkeypatch):
    """flash-linear-attention's function, played by its documented meaning: as many key as query heads, log decay."""
    given, weights = layer_inputs(70)
    expected = gated_delta_layer(*given, weights)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale):
        assert q.shape == k.shape == v.shape
        assert q.shape[:3] == g.shape == beta.shape
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert g.dtype == torch.float32
        return recurrence(q, k, v, g, beta).float() * scale, None

    fake = types.ModuleType("fla.ops.gated_delta_rule")
    fake.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", fake)
    module._fla_kernel.cache_clear()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    actual = gated_delta_layer(*given, weights)
    module._fla_kernel.cache_clear()
    assert (actual - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


def test_it_compiles_as_one_graph_with_its_gradients():
    """From heads before tokens, as a model has them, which decides in which order gradients lie in memory."""
    given, weights = layer_inputs(5)
    leaves = [x.transpose(1, 2).contiguous() if x.dim() == 4 else x for x in given]

    def layer(*leaves):
        return gated_delta_layer(*(x.transpose(1, 2) if x.dim() == 4 else x for x in leaves), weights)

    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        tensors = [x.clone().requires_grad_() for x in leaves]
        o = run(*tensors)
        found.append([o, *torch.autograd.grad(o.square().sum(), tensors)])
    assert all(torch.allclose(*pair, rtol=0, atol=1e-5) for pair in zip(*found, strict=True))


def test_settings():
    assert GatedDeltaConfig.from_dict(GatedDeltaConfig(seed=4).to_dict()).seed == 4
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        GatedDeltaConfig(seed=-1)
