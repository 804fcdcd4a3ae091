"""The retrieved field: each block's queries gathered into full tiles, one partial result for every (query, block) pair.

Key-block-outer, after FlashMoBA (arXiv 2511.11571): the query heads of a key head that chose a block share its tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.pairs import Pairs
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.summaries import padded


def attend_pairs(
    problem: Problem, pairs: Pairs, first_head: int, q: Tensor, k: Tensor, v: Tensor, part_o: Tensor, part_lse: Tensor
) -> None:
    """Attend to the chosen blocks, pair by pair.

    Args:
        problem: sizes.
        pairs: of key heads first_head, first_head + 1, ..., counted over rows and key heads.
        first_head: the first of them.
        q, k, v: of all heads, [B, T, H, D].
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts].
            These are the first `top_k` parts of each query.
    """
    width, unit = q.shape[3], problem.config.unit
    _attend[pairs.tile_block.shape[::-1]](
        q, k, v, *pairs[:5], part_o, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], k.shape[2],
        pairs.counts.shape[1], pairs.pair.shape[1], first_head,
        problem.num_dense, problem.score_scales[0],
        PARTS=part_o.shape[2], G=problem.group, TOP_K=problem.config.top_k, UNIT=unit, D=width,
        DP=padded(width), ROWS=pairs.rows, BM=min(64, problem.most_rows), num_warps=4, num_stages=1,
    )  # fmt: skip


@triton.jit
def _pairs_at(pairs, count, BM: tl.constexpr):
    """The next BM pairs of `count`."""
    place = tl.arange(0, BM)
    return tl.load(pairs + place, mask=place < count, other=0)


@triton.jit
def _queries_of(
    head_q, pair, count, qt, qh, G: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """The queries of a tile of pairs, [BM, DP]."""
    query, d = pair // TOP_K, tl.arange(0, DP)
    held = (tl.arange(0, BM) < count)[:, None] & (d < D)[None, :]
    at = (query // G).to(tl.int64) * qt + query % G * qh
    return tl.load(head_q + at[:, None] + d[None, :], mask=held, other=0.0)


@triton.jit(do_not_specialize=["heads", "num_blocks", "pairs_per_head", "first_head", "first_query"])
def _attend(
    q, k, v, pairs, start, count, tile_end, tile_block, part_o, part_lse, qb, qt, qh, kb, kt, kh, vb, vt, vh, heads,
    num_blocks, pairs_per_head, first_head, first_query, scale,
    PARTS: tl.constexpr, G: tl.constexpr, TOP_K: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr,
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
    own_pairs = pairs + z * pairs_per_head + tl.load(start + z * num_blocks + block)
    first_part = z * (pairs_per_head // TOP_K * PARTS)
    pair = _pairs_at(own_pairs + begin, own_count - begin, BM)
    own_q = _queries_of(head_q, pair, own_count - begin, qt, qh, G, TOP_K, D, DP, BM)
    next_pair = _pairs_at(own_pairs + begin + BM, own_count - begin - BM, BM)
    for at in range(begin, min(begin + ROWS, own_count), BM):
        # the next queries are on their way while these are worked on, and where the ones after them are is asked
        next_q = _queries_of(head_q, next_pair, own_count - at - BM, qt, qh, G, TOP_K, D, DP, BM)
        pair_after = _pairs_at(own_pairs + at + 2 * BM, own_count - at - 2 * BM, BM)
        used = tl.arange(0, BM) < own_count - at
        scores = tl.dot(own_q, tl.trans(own_k), input_precision="ieee") * scale
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - top[:, None])
        total = tl.sum(weights, 1)
        o = tl.dot(weights.to(own_v.dtype), own_v, input_precision="ieee") / total[:, None]
        to = first_part + pair // TOP_K * PARTS + pair % TOP_K
        tl.store(part_lse + to, top + tl.log2(total), mask=used)
        tl.store(part_o + to[:, None] * D + d[None, :], o.to(part_o.dtype.element_ty), mask=used[:, None] & inside)
        pair, own_q, next_pair = next_pair, next_q, pair_after
