"""The search for many best blocks of each query, more than are worth writing out one after the other.

The score that the last of them has is found bit by bit, from the highest: 32 counts of the scores at or above a number.
"""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import VARYING, Scores, Tiles, bits_of, nothing_of, score_at
from bsbr.ops.triton.search import sizes, whose
from bsbr.ops.triton.short_scores import LOWEST, STEPS, steps_below

_COLUMNS = 1024
"""Scores of a query that are held at once; of a longer past they are read again for every bit."""


def choose_many_blocks(
    problem: Problem, tiles: Tiles, scores: Scores, tops: Tensor, chosen: Tensor, counts: Tensor | None
) -> None:
    """Choose blocks as `bsbr.ops.triton.search.choose_blocks` does, but put them in the order of their numbers.

    Args:
        problem, tiles, scores, tops, chosen, counts: as there.
    """
    columns = min(_COLUMNS, max(32, triton.next_power_of_2(tiles.room)))
    _choose[(tiles.count * tiles.rows,)](
        scores.each, scores.bests, tops, chosen, counts, *sizes(problem, tiles, chosen), tiles.room, G=problem.group,
        B=problem.config.block_size, UNIT=problem.config.unit, TOP_K=problem.config.top_k,
        KP=triton.next_power_of_2(problem.config.top_k), TILE=tiles.blocks, BM=tiles.rows, COLUMNS=columns,
        ONCE=tiles.room <= columns, num_warps=1, num_stages=1,
    )  # fmt: skip


@triton.jit
def _values(scores, bests, start, place, stop, room, BM: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Scores of a query from block `start` on, [COLUMNS], in steps if kept in 16 bits; -inf from `stop` on."""
    block = start + tl.arange(0, COLUMNS)
    inside = tl.minimum(block, room - 1)
    values = tl.load(scores + score_at(place, inside, BM))
    if scores.dtype.element_ty == tl.int16:
        values = tl.load(bests + inside // TILE * BM) - steps_below(values)
    return tl.where(block < stop, values, float("-inf"))


@triton.jit
def _ordered(values):
    """Unsigned integers in the order of the scores."""
    return (bits_of(values) ^ (-(2**31))).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=[*VARYING, "num_sparse"])
def _choose(
    scores, bests, tops, chosen, counts, heads, heads_all, first_head, first_work, num_tiles, sparse_start, num_sparse,
    room, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr,
    TILE: tl.constexpr, BM: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    own, place = tl.program_id(0) // BM, tl.program_id(0) % BM
    first, head, to, real = whose(
        place, own + first_work, first_head, heads, heads_all, num_tiles, sparse_start, num_sparse, G, TOP_K, BM
    )  # fmt: skip
    if not real:
        return
    stop = first // B * (B // UNIT)
    count = tl.minimum(stop, TOP_K)
    if counts is not None:
        count = tl.minimum(tl.load(counts + head).to(tl.int32), stop)
    scores += own.to(tl.int64) * BM * room
    bests += own.to(tl.int64) * BM * (room // TILE) + place
    values = _values(scores, bests, 0, place, stop, room, BM, TILE, COLUMNS)
    keys = _ordered(values)
    least, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        number = tl.sum((keys >= (least | bit)).to(tl.int32))
        if not ONCE:
            for start in range(COLUMNS, stop, COLUMNS):
                more = _ordered(_values(scores, bests, start, place, stop, room, BM, TILE, COLUMNS))
                number += tl.sum((more >= (least | bit)).to(tl.int32))
        least = tl.where(number >= count, least | bit, least)
        bit = bit >> 1
    above = tl.sum((keys > least).to(tl.int32))
    if not ONCE:
        for start in range(COLUMNS, stop, COLUMNS):
            more = _ordered(_values(scores, bests, start, place, stop, room, BM, TILE, COLUMNS))
            above += tl.sum((more > least).to(tl.int32))
    # of equal scores the lower blocks, as many as are missing
    missing, found, equal_before = count - above, 0, 0
    best, next_best = float("-inf"), float("-inf")
    for start in range(0, stop, COLUMNS):
        if not ONCE:
            values = _values(scores, bests, start, place, stop, room, BM, TILE, COLUMNS)
            keys = _ordered(values)
        block = start + tl.arange(0, COLUMNS)
        equal = ((keys == least) & (block < stop)).to(tl.int32)
        earlier = equal_before + tl.cumsum(equal, 0) - equal
        taken = (block < stop) & ((keys > least) | ((equal > 0) & (earlier < missing)))
        at = found + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + to + at, block, mask=taken)
        tl.store(scores + score_at(place, tl.minimum(block, room - 1), BM), nothing_of(scores), mask=taken)
        best = tl.maximum(best, tl.max(values))
        next_best = tl.maximum(next_best, tl.max(tl.where(taken, float("-inf"), values)))
        equal_before += tl.sum(equal)
        found += tl.sum(taken.to(tl.int32))
    rank = tl.arange(0, KP)
    tl.store(chosen + to + rank, tl.full([KP], -1, tl.int32), mask=(rank >= count) & (rank < TOP_K))
    if scores.dtype.element_ty == tl.int16:  # not below what is so far below its tile's best that it counts as nothing
        next_best = tl.ceil(tl.maximum(next_best, best - LOWEST)) / STEPS
    tl.store(tops + tl.program_id(0), tl.where(count < stop, next_best, -1e38))
