"""The choice of blocks: block scores on tensor cores and each query's best, kept in registers; no T x N matrix.

Scores leave out what all blocks of a query share (log n, the bias, and the product with the mean key of block 0), which
no choice depends on. So a large common part of all keys costs the 16-bit products no digits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.summaries import FarField, padded


def choose_blocks(problem: Problem, q: Tensor, field: FarField, calibration: Tensor) -> Tensor:
    """Choose the `top_k` past blocks of largest estimated mass for every sparse query.

    Source: `bsbr.ops.routing.select_blocks`; exactly equal scores go to the lower block index.

    1. Tiles of scores, queries by blocks, from left to right.
    2. While some query of the tile still has a score above its worst kept one, each takes its best score of the tile,
       if above, into its sorted list and strikes it from the tile.

    Args:
        problem: sizes.
        q: [B, Tq, HQ, D].
        field: summaries.
        calibration: [HQ, 5] float32.
    Returns:
        Block indices, [B, S, HQ, top_k] int32 for the S sparse queries, best first.
    """
    batch, _, heads, width = q.shape
    chosen = torch.empty(batch, problem.num_sparse, heads, problem.config.top_k, dtype=torch.int32, device=q.device)
    rows = problem.tile_rows
    _choose[(problem.num_tiles * batch * heads,)](
        q, field.centred_k, field.var_k, calibration, chosen, *q.stride()[:3], batch * heads, heads,
        field.centred_k.shape[1], problem.num_tiles, problem.sparse_start,
        problem.q_start, problem.num_sparse, *problem.score_scales,
        G=problem.group, B=problem.config.block_size, PER_BLOCK=problem.per_block, TOP_K=problem.config.top_k,
        D=width, DP=padded(width), BM=rows, BN=min(64, problem.most_rows),
        MOMENTS=problem.config.far == "moments", num_warps=8 if rows >= 128 else 4, num_stages=2,
    )  # fmt: skip
    return chosen


@triton.jit
def load_blocks(x, from_block, stop, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """A tile of summaries, [DP, BN]."""
    n, d = from_block + tl.arange(0, BN), tl.arange(0, DP)
    return tl.load(x + n[None, :] * D + d[:, None], mask=(d < D)[:, None] & (n < stop)[None, :], other=0.0)


@triton.jit
def score_factors(calibration, head, mean_scale, var_scale):
    """Factor of all scores of a head, and of the squared queries in front of it, so that both products share a sum."""
    mean_factor = mean_scale * tl.load(calibration + head * 5 + 1)
    mean_factor = tl.where(tl.abs(mean_factor) < 1e-20, 1e-20, mean_factor)
    return mean_factor, var_scale * tl.load(calibration + head * 5 + 2) / mean_factor


@triton.jit
def tile_scores(q, square, centred_k, var_k, mean_factor, MOMENTS: tl.constexpr):
    """Scores of a tile of queries for a tile of summaries; `square` holds the factor of the variance."""
    scores = tl.dot(q, centred_k, input_precision="ieee")
    if MOMENTS:
        scores = tl.dot(square, var_k, scores, input_precision="ieee")
    return scores * mean_factor


@triton.jit
def sortable(scores, stop, from_block, BN: tl.constexpr):
    """Integers in the order of the scores; their last 6 bits tell the column, so that no two of a row are equal.

    What is lost are the last 6 bits of a score, 2**-17 of it; equal scores come with the lower column first.
    """
    column = tl.arange(0, BN)
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = (bits & -64) | (63 - column)[None, :]
    return tl.where((from_block + column < stop)[None, :], bits, -(2**31))


@triton.jit(
    do_not_specialize=["all_heads", "heads", "num_blocks", "num_tiles", "sparse_start", "q_start", "num_sparse"]
)
def _choose(
    q, centred_k, var_k, calibration, chosen, qb, qt, qh, all_heads, heads, num_blocks, num_tiles,
    sparse_start, q_start, num_sparse, mean_scale, var_scale,
    G: tl.constexpr, B: tl.constexpr, PER_BLOCK: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    tile = num_tiles - 1 - tl.program_id(0) // all_heads  # the longest first
    row, head = tl.program_id(0) % all_heads // heads, tl.program_id(0) % heads
    first = (sparse_start // BM + tile) * BM
    token, d = first + tl.arange(0, BM), tl.arange(0, DP)
    valid = (token >= sparse_start) & (token < sparse_start + num_sparse)
    own = q + row.to(tl.int64) * qb + head * qh + (token - q_start).to(tl.int64)[:, None] * qt + d[None, :]
    tile_q = tl.load(own, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    wide = tile_q.to(tl.float32)
    mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
    square = (wide * wide * var_factor).to(var_k.dtype.element_ty)
    z = (row * (heads // G) + head // G).to(tl.int64)
    centred_k += z * num_blocks * D
    var_k += z * num_blocks * D
    stop = first // B * PER_BLOCK
    best, index = (), ()
    for j in tl.static_range(TOP_K):
        best += (tl.full([BM], -(2**31), tl.int32),)
        index += (tl.full([BM], j, tl.int32),)
    # the next tile is loaded before the search in this one, which hides the wait
    next_k = load_blocks(centred_k, 0, stop, D, DP, BN)
    next_var = load_blocks(var_k, 0, stop, D, DP, BN) if MOMENTS else next_k
    for start in range(0, stop, BN):
        scores = tile_scores(tile_q, square, next_k, next_var, mean_factor, MOMENTS)
        next_k = load_blocks(centred_k, start + BN, stop, D, DP, BN)
        if MOMENTS:
            next_var = load_blocks(var_k, start + BN, stop, D, DP, BN)
        keys = sortable(scores, stop, start, BN)
        value = tl.max(keys, 1)
        while tl.max((value > best[TOP_K - 1]).to(tl.int32), 0) > 0:
            keys = tl.where(keys == value[:, None], -(2**31), keys)
            place = start + 63 - (value & 63)
            value = value | 63  # across tiles only scores count: of equal ones the earlier stays ahead
            kept, kept_index = (), ()
            moved = value  # all from the first that it is better than move down: of equal scores the earlier stays
            for j in tl.static_range(TOP_K):
                better = value > best[j]
                kept += (tl.where(better, moved, best[j]),)
                kept_index += (tl.where(better, place, index[j]),)
                moved, place = tl.where(better, best[j], moved), tl.where(better, index[j], place)
            best, index = kept, kept_index
            value = tl.max(keys, 1)
    to = chosen + ((row * num_sparse + token - sparse_start).to(tl.int64) * heads + head) * TOP_K
    for j in tl.static_range(TOP_K):
        tl.store(to + j, index[j], mask=valid)
