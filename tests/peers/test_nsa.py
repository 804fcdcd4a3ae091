"""NSA's three branches are what they are said to be, and no token moves an earlier output."""

from dataclasses import replace

import pytest
import torch

from bsbr.peers import NSAConfig, Shape, nsa_attention, nsa_weights
from tests.peers.cases import draw

SETTINGS = NSAConfig(block_size=4, top_k=2, window=6)
SHAPE = Shape(hidden_size=10, heads=4, key_heads=2, width=6)


def inputs(tokens, dtype=torch.float64, settings=SETTINGS):
    """Pooling weights that are no plain mean."""
    generator = torch.Generator().manual_seed(3)
    weights = nsa_weights(settings, SHAPE, generator)
    for name in ("pool_k", "pool_v"):
        weights[name] = weights[name] * torch.rand(weights[name].shape, generator=generator)
    hidden = torch.randn(2, tokens, 10, generator=generator)
    return [*(x.to(dtype) for x in draw(tokens)), hidden.to(dtype)], {n: x.to(dtype) for n, x in weights.items()}


def defined(q, k, v, hidden, weights, settings):
    """Token by token and head by head, in float64."""
    size, scale = settings.block_size, q.shape[3] ** -0.5
    gates = (hidden @ weights["gate"].T).sigmoid().unflatten(2, (q.shape[2], 3))
    group = q.shape[2] // k.shape[2]
    o = torch.zeros_like(q)
    pool_k, pool_v = (weights[f"pool_{name}"] for name in "kv")

    def softmax_attention(query, keys, values):
        return (keys @ query * scale).softmax(0) @ values

    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            past = t // size
            for head in range(k.shape[2]):
                keys, values, queries = k[row, :, head], v[row, :, head], q[row, t, head * group : (head + 1) * group]
                blocks = (
                    keys[: past * size].unflatten(0, (past, size)),
                    values[: past * size].unflatten(0, (past, size)),
                )
                short = (blocks[0] * pool_k[head]).sum(1), (blocks[1] * pool_v[head]).sum(1)
                importance = (queries @ short[0].T * scale).softmax(1).sum(0)
                best = importance.argsort(descending=True)[: settings.top_k].tolist()
                read = [j for j in range(t + 1) if j // size in [*best, past]]
                latest = slice(max(0, t - settings.window + 1), t + 1)
                for i, query in enumerate(queries):
                    parts = [
                        softmax_attention(query, *short) if past else torch.zeros_like(query),
                        softmax_attention(query, keys[read], values[read]),
                        softmax_attention(query, keys[latest], values[latest]),
                    ]
                    gate = gates[row, t, head * group + i]
                    o[row, t, head * group + i] = sum(g * part for g, part in zip(gate, parts, strict=True))
    return o


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, top_k=9), replace(SETTINGS, window=99, block_size=3)])
@pytest.mark.parametrize("tokens", [1, 4, 5, 30])
def test_it_is_its_definition(settings, tokens):
    given, weights = inputs(tokens, settings=settings)
    actual = nsa_attention(*given, weights, settings)
    assert torch.allclose(actual, defined(*given, weights, settings), rtol=0, atol=1e-12)


def test_gradients_are_those_of_its_definition():
    given, weights = inputs(21)
    leaves = [x.requires_grad_() for x in (*given, *weights.values())]
    weight = torch.randn(2, 21, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((nsa_attention(*given, weights, SETTINGS) * weight).sum(), leaves)
    expected = torch.autograd.grad((defined(*given, weights, SETTINGS) * weight).sum(), leaves)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-11) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("start", [1, 3, 4, 13, 29])
def test_queries_may_start_anywhere(start):
    (q, k, v, hidden), weights = inputs(30)
    whole = nsa_attention(q, k, v, hidden, weights, SETTINGS)
    part = nsa_attention(q[:, start:], k, v, hidden[:, start:], weights, SETTINGS, q_start=start)
    assert torch.allclose(part, whole[:, start:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_it_is_causal_to_the_bit(tokens):
    given, weights = inputs(tokens, torch.float32)
    before = nsa_attention(*given, weights, SETTINGS)
    for position in range(tokens):
        for index in range(4):
            changed = [x.clone() for x in given]
            changed[index][:, position] += 1
            moved = (nsa_attention(*changed, weights, SETTINGS) != before).flatten(2).any(-1).any(0)
            assert not moved[:position].any()
            assert moved[position] or index < 2, "values and gates count at once"


def test_bfloat16_is_near_float32():
    """With every block read: a near tie would choose another block."""
    settings = replace(SETTINGS, top_k=99)
    given, weights = inputs(200, torch.float32, settings)
    exact = nsa_attention(*given, weights, settings)
    near = nsa_attention(*(x.bfloat16() for x in given), weights, settings)
    assert near.dtype == torch.bfloat16
    assert (near - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_settings():
    assert NSAConfig.from_dict(SETTINGS.to_dict()) == SETTINGS
    for bad in ({"block_size": 0}, {"top_k": 0}, {"window": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be an integer"):
            NSAConfig(**bad)
