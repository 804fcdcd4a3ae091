"""What must hold whatever the implementation: causality, padding, isolation, grouped heads, poisoned input."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from tests.ops.cases import skip_unless_able

KINDS = {
    "moments": BSBRConfig(dense_below=0, block_size=32, top_k=2),
    "units": BSBRConfig(dense_below=0, block_size=32, retrieval_block_size=8, top_k=5),
    "token state": BSBRConfig(dense_below=0, block_size=32, top_k=1, state="token"),
    "block state": BSBRConfig(dense_below=0, block_size=32, top_k=1, state="block"),
    "mean": BSBRConfig(dense_below=0, block_size=32, top_k=2, far="mean"),
    "drop": BSBRConfig(dense_below=0, block_size=32, top_k=2, far="drop"),
    "local": BSBRConfig(dense_below=0, block_size=32, top_k=0, far="drop"),
    "states only": BSBRConfig(dense_below=0, block_size=32, top_k=0),
    "window": BSBRConfig(dense_below=0, block_size=32, top_k=2, selection="recent"),
    "shared choice": BSBRConfig(dense_below=0, block_size=32, top_k=2, selection="group"),
    "dense below": BSBRConfig(block_size=32, top_k=1, dense_below=45),
}


def draw(seed, rows=1, tokens=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, tokens, heads, 8, generator=generator).to(dtype) for heads in (2, 1, 1)]


@pytest.mark.parametrize("backend", ["chunked", "native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_earlier_output_changes_by_a_bit(kind, backend):
    """Every token of 300 is changed in turn: q, k and v, mildly and hugely; earlier outputs stay bit-identical."""
    count, rows = 300, 10 if backend == "reference" else 60
    config, tensors = KINDS[kind], draw(0, tokens=count)
    skip_unless_able(backend, tensors[0], config)
    same = [x.repeat(rows, 1, 1, 1) for x in tensors]
    before = bsbr_attention(*same, config, backend=backend)
    for first in range(0, count, rows):  # each row has a token of its own changed
        tokens = torch.arange(first, first + rows)
        changed = [x.clone() for x in same]
        for x in changed:
            x[tokens - first, tokens] = torch.where((tokens % 2 == 0)[:, None, None], 1e4, x[0, tokens] + 1)
        differs = (before != bsbr_attention(*changed, config, backend=backend)).flatten(2).any(-1)
        earlier = torch.arange(count) < tokens[:, None]
        assert not (differs & earlier).any(), f"tokens {(differs & earlier).any(1).nonzero() + first}: earlier outputs"
        assert (differs & ~earlier).any(1).all(), "an output ignores its own token"


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_reach_the_future(kind):
    q, k, v = (x.double().requires_grad_() for x in draw(1, tokens=130))
    o = bsbr_attention(q, k, v, KINDS[kind])
    for x in torch.autograd.grad(o[:, :71].sum(), (q, k, v)):
        assert not x[:, 71:].any()
        assert x[:, :71].any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind):
    config, (q, k, v) = KINDS[kind], draw(2, rows=3, tokens=170)
    lengths = torch.tensor([170, 101, 0])
    for x in (k, v):  # what stands in padding does not matter, not even if it is no number
        x[1, 101:] = torch.nan
        x[2] = torch.inf
    o, lse = bsbr_attention(q, k, v, config, lengths=lengths, return_lse=True)
    for row, length in enumerate(lengths[:2].tolist()):
        alone = bsbr_attention(*(x[row : row + 1, :length] for x in (q, k, v)), config)
        torch.testing.assert_close(o[row : row + 1, :length], alone, rtol=0, atol=2e-6)
    assert not o[1, 101:].any()
    assert not o[2].any()
    assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "block state"])
@pytest.mark.parametrize("start", [1, 31, 32, 33, 64, 99, 128, 169])
def test_queries_that_come_later_get_the_same(kind, start):
    """Prefill and then decode: the last queries alone give what they give among all."""
    config, (q, k, v) = KINDS[kind], draw(3, tokens=170, dtype=torch.float64)
    whole = bsbr_attention(q, k, v, config)
    late = bsbr_attention(q[:, start:], k, v, config, q_start=start)
    torch.testing.assert_close(late, whole[:, start:], rtol=0, atol=1e-12)


def test_grouped_heads_are_repeated_heads():
    q, k, v = (x.double() for x in draw(4, tokens=100))
    config = BSBRConfig(dense_below=0, block_size=16, top_k=2)
    wide = bsbr_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), config)
    torch.testing.assert_close(bsbr_attention(q, k, v, config), wide, rtol=0, atol=1e-12)


def test_blocks_that_nobody_reads_may_hold_anything():
    """With the far field dropped, a block no query chose has no effect even if it is poisoned."""
    q, k, v = (x.double() for x in draw(5, tokens=64))
    config = BSBRConfig(dense_below=0, block_size=8, top_k=1, far="drop")
    q[:], k[:, 8:16] = 1, -5  # block 1 never has the largest mean score
    chosen = reference_attention(q, k, v, config)[2]
    assert not (chosen == 1).any()
    clean = bsbr_attention(q, k, v, config)
    v[:, 8:16] = 1e30
    poisoned = bsbr_attention(q, k, v, config)
    assert torch.equal(clean[:, 16:], poisoned[:, 16:])


def test_a_key_that_is_no_number_shows_in_later_blocks_and_not_in_earlier_ones():
    """Its block has a score that is no number. With the far field dropped, nothing but the choice could bring it up."""
    q, k, v = draw(8, tokens=256)
    config = BSBRConfig(dense_below=0, block_size=32, top_k=1, far="drop")
    clean = bsbr_attention(q, k, v, config, backend="chunked")
    k[:, 70] = torch.nan
    o = bsbr_attention(q, k, v, config, backend="chunked")
    assert torch.equal(o[:, :64], clean[:, :64])
    assert o[:, 96:].isnan().all()


def test_large_common_part_of_keys_keeps_its_digits():
    """Variances about the mean, not differences of squares: 1e3 times more mean than spread stays accurate."""
    q, k, v = draw(6, tokens=256)
    k = k + 1e3
    config = BSBRConfig(dense_below=0, block_size=32, top_k=1)
    # the common part moves all scores of a query alike, which softmax does not see
    q = q - q.mean(-1, keepdim=True)
    expected, _, chosen = reference_attention(q, k, v, config)
    actual = bsbr_attention(q, k, v, config, block_indices=chosen)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("magnitude", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_extreme_scores_stay_finite(magnitude, dtype):
    q, k, v = draw(7, tokens=200)
    q = q * magnitude / 10
    o = bsbr_attention(q.to(dtype), k.to(dtype), v.to(dtype), BSBRConfig(dense_below=0, block_size=16, top_k=2))
    assert o.isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (1, 9, 3, 8)}, "multiple"),
        ({"k": (1, 9, 2, 4)}, "agree"),
        ({"v": (1, 8, 2, 8)}, "agree"),
        ({"q": (9, 2, 8)}, r"\[B, T, H, D\]"),
        ({"q_start": 2}, "q_start"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, "lengths"),
        ({"calibration": torch.ones(4, 4)}, "calibration"),
        ({"sinks": torch.ones(2)}, "sinks"),
        ({"block_indices": torch.zeros(1, 9, 4, 7, dtype=torch.int64)}, "block_indices"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, match):
    given = {"q": (1, 9, 4, 8), "k": (1, 9, 2, 8), "v": (1, 9, 2, 8)} | change
    q, k, v = (torch.zeros(given.pop(name)) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=match):
        bsbr_attention(q, k, v, BSBRConfig(dense_below=0, block_size=4, top_k=1), **given)
