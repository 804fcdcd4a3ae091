"""A sink is one more logit with a value of zero: in every backend, in gradients and in the cache."""

import random

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from bsbr.ops.shared_cache import block_cache
from tests.ops.cases import random_case, skip_unless_able
from tests.ops.test_decode import cached_case, parts


def draw_sinks(heads, seed, spread=2.0):
    return torch.randn(heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_with_every_block_read_it_is_a_softmax_with_one_more_column(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 90, heads, 16, generator=generator) for heads in (4, 2, 2))
    config, sinks = BSBRConfig(block_size=8, top_k=99, dense_below=0), draw_sinks(4, 1).float()
    skip_unless_able(backend, q, config)
    found, lse = bsbr_attention(q, k, v, config, sinks=sinks, backend=backend, return_lse=True)
    every_k, every_v = (x.double().repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    scores = q.double().transpose(1, 2) @ every_k.mT / 4
    scores = scores.masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf)
    column = sinks.double().view(1, 4, 1, 1).expand(2, 4, 90, 1)
    joined = torch.cat([scores, column], -1)
    expected = (joined.softmax(-1)[..., :-1] @ every_v).transpose(1, 2)
    assert (found - expected).abs().max() <= 2e-6
    assert (lse - joined.logsumexp(-1).transpose(1, 2)).abs().max() <= 1e-5


def test_gradients_in_float64_equal_those_of_the_reference():
    for seed in range(60):
        case = random_case(seed, longest=150)
        sinks = draw_sinks(case.q.shape[2], seed)
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.calibration, sinks)]
        options = {**case.options, "calibration": leaves[3], "sinks": leaves[4]}
        expected = bsbr_attention(*leaves[:3], case.config, **options, backend="reference")
        actual = bsbr_attention(*leaves[:3], case.config, **options, backend="chunked")
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted, found = (
            torch.autograd.grad((o * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
            for o in (expected, actual)
        )
        for name, a, b in zip(("q", "k", "v", "calibration", "sinks"), found, wanted, strict=True):
            error = (a - b).abs().max() / (1 + b.abs().max())
            assert error <= 1e-10, f"case {seed}, {name}: {error:.3g}, {case.config}"


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_a_cache_gives_what_the_whole_text_gives(mode):
    for seed in range(30):
        case, draw = cached_case(seed), random.Random(seed)
        sinks, scale, start, outputs = draw_sinks(case.q.shape[2], seed), case.q.shape[3] ** -0.5, 0, []
        options = {"scale": scale, "calibration": case.calibration, "sinks": sinks}
        expected = bsbr_attention(case.q, case.k, case.v, case.config, backend="reference", **options)
        cache = block_cache(case.config, mode)
        for size in parts(case.k.shape[1], draw):
            span = slice(start, start + size)
            outputs.append(cache.attend(case.q[:, span], case.k[:, span], case.v[:, span], **options))
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-9)
