"""Linear attention in chunks is the weighted mean that defines it, in every dtype, however small the weights."""

import pytest
import torch
import torch.nn.functional as F

from bsbr.peers import linear_attention
from tests.peers.cases import draw


def defined(q, k, v, q_start=0):
    """Every weight written out, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    weights = torch.einsum("bihd,bjhd->bhij", F.elu(q) + 1, F.elu(k) + 1).tril(q_start)
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_it_is_its_definition(tokens):
    q, k, v = (x.double() for x in draw(tokens))
    assert torch.allclose(linear_attention(q, k, v), defined(q, k, v), rtol=0, atol=1e-12)
    start = tokens // 3
    actual = linear_attention(q[:, start:], k, v, q_start=start)
    assert torch.allclose(actual, defined(q[:, start:], k, v, start), rtol=0, atol=1e-12)


def test_gradients_are_those_of_its_definition():
    inputs = [x.double().requires_grad_() for x in draw(70, width=3)]
    weight = torch.randn(2, 70, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((linear_attention(*inputs) * weight).sum(), inputs)
    expected = torch.autograd.grad((defined(*inputs) * weight).sum(), inputs)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(actual, expected, strict=True))


def test_bfloat16_loses_no_more_than_its_own_digits():
    """Sums over 1,000 tokens are not made in bfloat16: what is lost is the rounding of the result."""
    q, k, v = (x.bfloat16() for x in draw(1000))
    actual = linear_attention(q, k, v)
    assert actual.dtype == torch.bfloat16
    assert ((actual - defined(q, k, v)).abs() <= 2**-8 * defined(q, k, v).abs() + 1e-6).all()


def test_very_negative_features_are_no_division_by_zero():
    """Below 0 the feature is the exponential, to its last digits; elu(x) + 1 in float32 is 0 below -17."""
    q, k, v = draw(70)
    assert torch.isfinite(linear_attention(q - 300, k - 300, v)).all()
    q, k = (x.double() - 30 for x in (q, k))
    weights = torch.einsum("bihd,bjhd->bhij", q.exp(), k.exp().repeat_interleave(2, 2)).tril()
    values = v.double().repeat_interleave(2, 2)
    expected = torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), values)
    assert torch.allclose(linear_attention(q.float(), k.float(), v), expected.float(), atol=1e-4)


def test_it_compiles_as_one_graph():
    compiled = torch.compile(linear_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*draw(70)), linear_attention(*draw(70)))
