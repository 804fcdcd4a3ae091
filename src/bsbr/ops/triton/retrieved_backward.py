"""Gradients of the retrieved field, key-block-outer like the forward pass: scores are computed again tile by tile."""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.pairs import Pairs
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.retrieved import _pairs_at, _queries_of
from bsbr.ops.triton.summaries import padded


def pairs_backward(
    problem: Problem,
    pairs: Pairs,
    first_head: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    part_q: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Differentiate the retrieved field of some key heads.

    Several programs share a block and add to its dk and dv in whatever order they finish.

    Args:
        problem, pairs, first_head, q, k, v: as given to `attend_pairs`.
        do: gradient of o, [B, Tq, HQ, D] contiguous.
        lse, delta: of the whole softmax, natural log and sum of do * o, [B, Tq, HQ] float32.
        part_q: partial gradients of q, [heads, S * G, top_k + 1, D]; the first `top_k` of each query are written.
        dk, dv: sums to add to, [B, T, H, D] float32 contiguous.
    """
    width, unit = q.shape[3], problem.config.unit
    _pairs_backward[pairs.tile_block.shape[::-1]](
        q, k, v, do, lse, delta, *pairs[:5], part_q, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        k.shape[2], k.shape[1], pairs.counts.shape[1], pairs.pair.shape[1], first_head,
        problem.num_dense, problem.num_queries, problem.score_scales[0], problem.scale,
        G=problem.group, TOP_K=problem.config.top_k, UNIT=unit, D=width, DP=padded(width), ROWS=pairs.rows,
        BM=32, num_warps=8 if width > 64 else 4, num_stages=1,
    )  # fmt: skip


@triton.jit
def _rows_of(
    head_q, head_do, pair, count, qt, qh, heads, G: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The queries of a tile of pairs and the gradients of their outputs, [BM, DP]."""
    query, d = pair // TOP_K, tl.arange(0, DP)
    held = (tl.arange(0, BM) < count)[:, None] & (d < D)[None, :]
    at_do = ((query // G).to(tl.int64) * heads * G + query % G) * D
    own_do = tl.load(head_do + at_do[:, None] + d[None, :], mask=held, other=0.0)
    return _queries_of(head_q, pair, count, qt, qh, G, TOP_K, D, DP, BM), own_do


@triton.jit(
    do_not_specialize=[
        "heads",
        "num_keys",
        "num_blocks",
        "pairs_per_head",
        "first_head",
        "first_query",
        "num_queries",
    ]
)
def _pairs_backward(
    q, k, v, do, lse, delta, pairs, start, count, tile_end, tile_block, part_q, dk, dv,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    heads, num_keys, num_blocks, pairs_per_head, first_head, first_query, num_queries, score_scale, scale,
    G: tl.constexpr, TOP_K: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    tile, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.load(tile_block + z * tl.num_programs(0) + tile)
    if block >= num_blocks:
        return
    own_count = tl.load(count + z * num_blocks + block)
    from_end = tl.load(tile_end + z * num_blocks + block) - tile  # tiles of this block from here on
    begin = (tl.cdiv(own_count, ROWS) - from_end) * ROWS
    head, row = (first_head + z) % heads, (first_head + z) // heads
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    token = (block * UNIT + tl.arange(0, UNIT)).to(tl.int64)
    own_k = tl.load(k + row * kb + head * kh + token[:, None] * kt + d[None, :], mask=inside, other=0.0)
    own_v = tl.load(v + row * vb + head * vh + token[:, None] * vt + d[None, :], mask=inside, other=0.0)
    head_q = q + row * qb + head * G * qh + first_query.to(tl.int64) * qt
    head_do = do + ((row * num_queries + first_query) * heads + head) * (G * D)
    own_pairs = pairs + z * pairs_per_head + tl.load(start + z * num_blocks + block)
    first_part = z * (pairs_per_head // TOP_K * (TOP_K + 1))
    sum_k = tl.zeros([UNIT, DP], tl.float32)
    sum_v = tl.zeros([UNIT, DP], tl.float32)
    pair = _pairs_at(own_pairs + begin, own_count - begin, BM)
    own_q, own_do = _rows_of(head_q, head_do, pair, own_count - begin, qt, qh, heads, G, TOP_K, D, DP, BM)
    next_pair = _pairs_at(own_pairs + begin + BM, own_count - begin - BM, BM)
    for at in range(begin, min(begin + ROWS, own_count), BM):
        # the next rows are on their way while these are worked on
        next_q, next_do = _rows_of(head_q, head_do, next_pair, own_count - at - BM, qt, qh, heads, G, TOP_K, D, DP, BM)
        pair_after = _pairs_at(own_pairs + at + 2 * BM, own_count - at - 2 * BM, BM)
        used = tl.arange(0, BM) < own_count - at
        query = pair // TOP_K
        at_o = (row * num_queries + first_query + query // G) * (heads * G) + head * G + query % G
        top = tl.load(lse + at_o, mask=used, other=float("inf")) * 1.4426950408889634  # rows of nobody weigh nothing
        own_delta = tl.load(delta + at_o, mask=used, other=0.0)
        # keys by queries: two of the products then take weights as they lie in registers
        weights = tl.dot(own_k, tl.trans(own_q), input_precision="ieee") * score_scale
        weights = tl.exp2(weights - top[None, :])
        dweights = tl.dot(own_v, tl.trans(own_do), input_precision="ieee")
        sum_v = tl.dot(weights.to(own_do.dtype), own_do, sum_v, input_precision="ieee")
        dscores = (weights * (dweights - own_delta[None, :])).to(own_q.dtype)
        sum_k = tl.dot(dscores, own_q, sum_k, input_precision="ieee")
        dq = tl.dot(tl.trans(dscores), own_k, input_precision="ieee") * scale
        to = first_part + pair + query  # top_k + 1 parts of each query
        tl.store(part_q + to[:, None] * D + d[None, :], dq.to(part_q.dtype.element_ty), mask=used[:, None] & inside)
        pair, own_q, own_do, next_pair = next_pair, next_q, next_do, pair_after
    into = ((row * num_keys + token[:, None]) * heads + head) * D + d[None, :]
    tl.atomic_add(dk + into, sum_k * scale, mask=inside, sem="relaxed")
    tl.atomic_add(dv + into, sum_v, mask=inside, sem="relaxed")
