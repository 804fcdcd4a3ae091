"""Estimated masses of a tile of queries and a tile of blocks, as every kernel of the past computes them.

Scores leave out what all blocks of a query share (log n, the bias, and the product with the mean key of block 0), which
no choice depends on. So a large common part of all keys costs the 16-bit products no digits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.short_scores import ROUNDING, STEPS, encode, most_of_eight
from bsbr.ops.triton.summaries import FarField, padded

GROUP_BLOCKS = 8
"""Blocks of a group, GROUP in the kernels."""

SHARE = 2
"""Most query heads of a key head whose scores one program computes: they share what is loaded of the blocks."""

VARYING = ["heads", "heads_all", "first_head", "first_work", "num_tiles", "sparse_start"]
"""Arguments of every kernel that works on tiles of queries, for whose values none is compiled anew."""


class Scores(NamedTuple):
    """Scores of the past blocks of some tiles of queries; bests and peaks of those in 16 bits are in steps."""

    each: Tensor
    """[tiles, room / 64, rows, 64] float32, or int16 as `bsbr.ops.triton.short_scores` says."""
    bests: Tensor
    """The best of each tile of blocks, [tiles, room / blocks, rows] float32."""
    peaks: Tensor | None
    """The best of every GROUP_BLOCKS, [tiles, rows, room / GROUP_BLOCKS] float32; None where nobody looks for them."""


class Tiles(NamedTuple):
    """Tiles of queries whose scores are held together, and where."""

    first: int
    """The number of the first: tiles of the last tokens come first, those of the same tokens by query head."""
    count: int
    """How many they are."""
    per_head: int
    """Tiles of a query head."""
    rows: int
    """Queries of a tile."""
    room: int
    """Blocks there is room for."""
    heads: range
    """Key heads, counted over rows and key heads."""
    blocks: int
    """Blocks of a tile of blocks, 64 or 32: products in float32 and wide heads leave room for fewer."""


def write_scores(
    problem: Problem, tiles: Tiles, q: Tensor, field: FarField, calibration: Tensor, scores: Scores
) -> None:
    """Write the scores of all past blocks of some tiles of queries, the best of every GROUP_BLOCKS and of every tile.

    Args:
        problem: sizes.
        tiles: which tiles.
        q: [B, Tq, HQ, D].
        field: summaries.
        calibration: [HQ, 5] float32.
        scores: where to put them; what comes after a query's past means nothing.
    """
    config, width = problem.config, q.shape[3]
    fast = tiles.blocks > 32
    share = min(SHARE, problem.group & -problem.group) if fast else 1
    _write_scores[(tiles.count // share,)](
        q, field.centred_k, field.var_k, calibration, *scores, *q.stride()[:3], q.shape[2] // problem.group,
        len(tiles.heads) * problem.group, tiles.heads.start, tiles.first, tiles.per_head, field.centred_k.shape[1],
        tiles.room, problem.sparse_start, problem.q_start, problem.num_queries, *problem.score_scales,
        G=problem.group, B=config.block_size, UNIT=config.unit, GROUP=GROUP_BLOCKS, D=width, DP=padded(width),
        BM=tiles.rows, SHARE=share, BN=tiles.blocks, MOMENTS=config.far == "moments",
        num_warps=4 * share, num_stages=1, maxnreg=168 if share == 1 else 128,
    )  # fmt: skip


@triton.jit
def tile_of(work, num_tiles, heads_all, sparse_start, G: tl.constexpr, BM: tl.constexpr):
    """The first token of a tile of queries, its key head, counted from the first here, and its place in that."""
    tile = num_tiles - 1 - work // heads_all  # the longest first
    return (sparse_start // BM + tile) * BM, work % heads_all // G, work % G


@triton.jit
def score_at(row, block, BM: tl.constexpr):
    """Where a tile of BM queries has the score of a block: 64 blocks of all its queries lie together."""
    return block // 64 * (64 * BM) + row * 64 + block % 64


@triton.jit
def group_at(row, group, BM: tl.constexpr):
    """Where it has the first of the 8 scores of a group, which lie together: `score_at` in fewer instructions."""
    return group // 8 * (64 * BM) + row * 64 + group % 8 * 8


@triton.jit
def nothing_of(scores):
    """What is written for a block that counts as nothing."""
    if scores.dtype.element_ty == tl.int16:
        nothing = tl.full([], -1, tl.int16)
    else:
        nothing = tl.full([], float("-inf"), tl.float32)
    return nothing


@triton.jit
def bits_of(score):
    """Integers in the order of the scores; what is no number comes first, and so shows."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


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
def load_chosen(chosen, valid, TOP_K: tl.constexpr):
    """The chosen blocks of a tile of queries, as a tuple."""
    blocks = ()
    for j in tl.static_range(TOP_K):
        blocks += (tl.load(chosen + j, mask=valid, other=-1),)
    return blocks


@triton.jit
def strike(scores, from_block, stop, blocks, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Scores with -inf from `stop` on and where a query reads the block exactly; one bit a block, BN is 32 or 64."""
    column = tl.arange(0, BN)
    left = stop - from_block
    if TOP_K == 0:
        scores = tl.where((column < left)[None, :], scores, float("-inf"))
    else:
        low = tl.zeros_like(blocks[0]) + tl.where(left < 32, -1 << (tl.maximum(left, 0) & 31), 0)
        high = tl.zeros_like(low) + tl.where(left < 64, -1 << (tl.maximum(left - 32, 0) & 31), 0)
        for j in tl.static_range(TOP_K):
            offset = blocks[j] - from_block
            bit = 1 << (offset & 31)
            low |= tl.where(offset >> 5 == 0, bit, 0)
            if BN > 32:
                high |= tl.where(offset >> 5 == 1, bit, 0)
        read = low[:, None]
        if BN > 32:
            read = tl.where((column < 32)[None, :], read, high[:, None])
        scores = tl.where((read & (1 << (column & 31))[None, :]) == 0, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=[*VARYING, "num_blocks", "q_start", "num_queries"])
def _write_scores(
    q, centred_k, var_k, calibration, scores, bests, peaks, qb, qt, qh,
    heads, heads_all, first_head, first_work, num_tiles, num_blocks, room, sparse_start, q_start, num_queries,
    mean_scale, var_scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, SHARE: tl.constexpr, BN: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    work = tl.program_id(0) * SHARE + first_work
    first, own_z, member = tile_of(work, num_tiles, heads_all, sparse_start, G, BM)
    ROWS: tl.constexpr = SHARE * BM
    place = tl.arange(0, ROWS)
    z = (first_head + own_z).to(tl.int64)
    row, head = z // heads, z % heads * G + member + place // BM
    token, d = first + place % BM, tl.arange(0, DP)
    valid = (token >= sparse_start) & (token < q_start + num_queries)
    own = q + row * qb + head[:, None] * qh + (token - q_start).to(tl.int64)[:, None] * qt + d[None, :]
    tile_q = tl.load(own, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    wide = tile_q.to(tl.float32)
    mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
    square = (wide * wide * var_factor[:, None]).to(var_k.dtype.element_ty)
    stop = first // B * (B // UNIT)
    centred_k += z * num_blocks * D
    var_k += z * num_blocks * D
    scores += tl.program_id(0).to(tl.int64) * ROWS * room
    bests += tl.program_id(0).to(tl.int64) * ROWS * (room // BN)
    if peaks is not None:
        peaks += tl.program_id(0).to(tl.int64) * ROWS * (room // GROUP)
    # In the result of a product a thread holds columns 2 i, 2 i + 1 of every 8. Blocks are laid to columns such that
    # those are blocks in a row: then a thread finds the largest of a group alone, and writes them together.
    column = tl.arange(0, BN)
    SHORT: tl.constexpr = scores.dtype.element_ty == tl.int16
    LANE: tl.constexpr = 4 if SHORT else 2  # rows that a warp writes at once, 16 bytes a thread
    turned = place % (ROWS * LANE // 16) // LANE * 16 + place // (ROWS * LANE // 16) * LANE + place % LANE
    factor = mean_factor * STEPS if SHORT else mean_factor
    order = column // 2 % 4 * (BN // 4) + column // 8 * 2 + column % 2
    # The next tile is on its way while this one is worked on, from behind the products on: the fence in front of them
    # waits for all that is on its way.
    next_n = tl.minimum(order, stop - 1)[None, :] * D + d[:, None]
    next_k = tl.load(centred_k + next_n, mask=(d < D)[:, None], other=0.0)
    next_var = tl.load(var_k + next_n, mask=(d < D)[:, None], other=0.0) if MOMENTS else next_k
    for start in range(0, stop, BN):
        tile = tile_scores(tile_q, square, next_k, next_var, factor[:, None], MOMENTS)
        next_n = tl.minimum(start + BN + order, stop - 1)[None, :] * D + d[:, None]
        next_k = tl.load(centred_k + next_n, mask=(d < D)[:, None], other=0.0)
        next_var = tl.load(var_k + next_n, mask=(d < D)[:, None], other=0.0) if MOMENTS else next_k
        if SHORT:
            tile += ROUNDING
        tile = tl.permute(tl.reshape(tile, [ROWS, BN // 8, 4, 2]), (0, 2, 1, 3))
        groups = tl.reshape(tile, [ROWS, BN // GROUP, GROUP])
        if SHORT:
            most = most_of_eight(tl.reshape(tile, [ROWS, BN]))
            best = tl.max(most, 1)
            tile = encode(best[:, None][:, :, None] - groups)
            best += 0.0 * tl.sum(most, 1) - ROUNDING  # a score that is no number leaves none of its tile's
            most -= ROUNDING
        else:
            most = tl.max(groups, 2)
            best = tl.max(most, 1)
        # rows as the threads that write them are laid out, so that a row stays in its warp
        tile = tl.reshape(tile, [ROWS // 16, 16 // LANE, LANE, BN])
        tile = tl.reshape(tl.permute(tile, (1, 0, 2, 3)), [ROWS, BN])
        block = start + tl.arange(0, BN)[None, :]
        tl.store(scores + (turned // BM * (BM * room))[:, None] + score_at((turned % BM)[:, None], block, BM), tile)
        if peaks is not None:
            at = place[:, None] * (room // GROUP) + start // GROUP
            tl.store(peaks + at + tl.arange(0, BN // GROUP)[None, :], most)
        at = place // BM * (BM * (room // BN)) + start // BN * BM + place % BM
        tl.store(bests + at, best)
