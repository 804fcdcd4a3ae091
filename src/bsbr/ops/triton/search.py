"""The search for the best blocks of each query, in scores that its program has written out.

Of every 8 blocks in a row the largest score is kept as the peak of the group. The `top_k` best blocks lie in the
`top_k` groups of largest peak (each of these groups has a block at least as good as any other group's best, and of
equal ones the lower), so a query looks at N / 8 peaks and 8 * top_k scores instead of N. Of a long past the groups are
found in the same way, in the tiles of blocks that hold the best: then a query looks at N / 64 of these and at
8 * top_k peaks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import GROUP_BLOCKS, Scores, Tiles, nothing_of, score_at, tile_of
from bsbr.ops.triton.short_scores import LOWEST, STEPS, steps_below

_NONE = tl.constexpr(-(2**31))
"""The key of no score."""

_NOWHERE = tl.constexpr(1 << 24)
"""A group after all groups."""


_ROWS, _ROWS_BY_TILES = 4, 2
"""Queries that one warp searches for: no other waits for it, and its registers leave room for 28 warps; by way of the
tiles they take twice as many each."""

MOST_WRITTEN_OUT = 32
"""Blocks that the search writes out one after the other at most: it takes the compiler 3 s for 16, 11 s for 32 and 75 s
for 48, once for every number."""

_MANY_GROUPS = 128
"""Groups beyond which the best are found by way of the tiles of blocks."""


def choose_blocks(
    problem: Problem, tiles: Tiles, scores: Scores, tops: Tensor, chosen: Tensor, counts: Tensor | None
) -> None:
    """Choose the `top_k` past blocks of largest score for some tiles of queries, and strike them out of the scores.

    Args:
        problem: sizes.
        tiles: which tiles.
        scores: as `write_scores` wrote them; those of chosen blocks become what counts as nothing.
        tops: where to put about the largest score that is left, [tiles, rows] float32; -1e38 where none is.
        chosen: where to put the blocks, best first, [B, S, HQ, top_k] int32; -1 where a query reads fewer.
        counts: blocks that a query of each key head reads, [H] int64; None where each reads `top_k`.
    """
    most, groups = triton.next_power_of_2(problem.config.top_k), tiles.room // GROUP_BLOCKS
    by_tiles = groups > _MANY_GROUPS
    rows = _ROWS_BY_TILES if by_tiles else _ROWS
    programs = tiles.count * (tiles.rows // rows)
    space = torch.empty(programs, rows, most * GROUP_BLOCKS, dtype=torch.int32, device=chosen.device)
    first_level = tiles.room // tiles.blocks if by_tiles else groups
    _choose[(programs,)](
        *scores, space, tops, chosen, counts, *sizes(problem, tiles, chosen), tiles.room, G=problem.group,
        B=problem.config.block_size, UNIT=problem.config.unit, TOP_K=problem.config.top_k, KP=most, GROUP=GROUP_BLOCKS,
        TILE=tiles.blocks, COLUMNS=min(64, max(16, triton.next_power_of_2(first_level))),
        BY_TILES=by_tiles, BM=tiles.rows, ROWS=rows, num_warps=1, num_stages=1,
    )  # fmt: skip


def strike_out(problem: Problem, tiles: Tiles, scores: Tensor, chosen: Tensor) -> None:
    """Strike given blocks out of the scores.

    Args:
        problem, tiles: as given to `choose_blocks`.
        scores: `Scores.each`.
        chosen: the blocks, [B, S, HQ, top_k] int32; negative ones are none.
    """
    _strike[(tiles.count,)](
        scores, chosen, *sizes(problem, tiles, chosen), tiles.room, G=problem.group, TOP_K=problem.config.top_k,
        KP=triton.next_power_of_2(problem.config.top_k), BM=tiles.rows,
    )  # fmt: skip


def sizes(problem: Problem, tiles: Tiles, chosen: Tensor) -> tuple[int, ...]:
    """What `whose` takes of a launch."""
    heads = chosen.shape[2] // problem.group
    here = len(tiles.heads) * problem.group, tiles.heads.start, tiles.first, tiles.per_head
    return heads, *here, problem.sparse_start, problem.num_sparse


@triton.jit
def sortable(scores, held, COLUMNS: tl.constexpr):
    """Integers in the order of the scores; their last bits tell the column, so that no two of a row are equal.

    What is lost are those bits of a score, 2**-17 of it for 64 columns; equal scores come with the lower column first.
    """
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = (bits & -COLUMNS) | (COLUMNS - 1 - tl.arange(0, COLUMNS))[None, :]
    return tl.where(held, bits, _NONE)


@triton.jit
def score_of(key):
    """About the score that a key stands for; -inf for none."""
    score = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(key == _NONE, float("-inf"), score)


@triton.jit
def _extract(keys, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT best keys of each row, best first, and their columns."""
    best, place = (), ()
    for _ in tl.static_range(COUNT):
        value = tl.max(keys, 1)
        keys = tl.where(keys == value[:, None], _NONE, keys)
        best += (value,)
        place += (COLUMNS - 1 - (value & (COLUMNS - 1)),)
    return best, place


@triton.jit
def best_groups(
    peaks, num_groups, row_stride, column_stride, BM: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr
):
    """The COUNT groups of largest peak of each of BM queries, best first. Returns their keys and numbers.

    Tiles of groups from left to right: the best of the first; then, while some query still has a peak above its worst
    kept one, each inserts its best peak of the tile, if above, into its sorted list.
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, COLUMNS)[None, :]
    held = (column < num_groups) & (row >= 0)
    # no mask: of one that ends anywhere the compiler makes loads of four bytes, and there is room for whole tiles
    keys = sortable(tl.load(peaks + row * row_stride + column * column_stride), held, COLUMNS)
    best, index = _extract(keys, COLUMNS, COUNT)
    for start in range(COLUMNS, num_groups, COLUMNS):
        held = (start + column < num_groups) & (row >= 0)
        keys = sortable(tl.load(peaks + row * row_stride + (start + column) * column_stride), held, COLUMNS)
        value = tl.max(keys, 1)
        # across tiles only scores count: of equal ones the earlier stays ahead
        while tl.max((value > (best[COUNT - 1] | (COLUMNS - 1))).to(tl.int32), 0) > 0:
            keys = tl.where(keys == value[:, None], _NONE, keys)
            place = start + COLUMNS - 1 - (value & (COLUMNS - 1))
            kept, kept_index = (), ()
            above = value > (best[0] | (COLUMNS - 1))
            kept += (tl.where(above, value, best[0]),)
            kept_index += (tl.where(above, place, index[0]),)
            for j in tl.static_range(1, COUNT):
                here = value > (best[j] | (COLUMNS - 1))
                kept += (tl.where(above, best[j - 1], tl.where(here, value, best[j])),)
                kept_index += (tl.where(above, index[j - 1], tl.where(here, place, index[j])),)
                above = here
            best, index = kept, kept_index
            value = tl.max(keys, 1)
    return best, index


@triton.jit
def _ascending(values, COUNT: tl.constexpr):
    """The same COUNT tensors, so that of each element the smallest comes first."""
    for turn in tl.static_range(COUNT):
        ordered = ()
        for j in tl.static_range(COUNT):
            if (j - turn) % 2 == 0 and j + 1 < COUNT:
                ordered += (tl.minimum(values[j], values[j + 1]),)
            elif (j - turn) % 2 == 1 and j > 0:
                ordered += (tl.maximum(values[j - 1], values[j]),)
            else:
                ordered += (values[j],)
        values = ordered
    return values


@triton.jit
def _in_order(best, number, COUNT: tl.constexpr):
    """The numbers of the COUNT best, ascending: of equal scores the one in the lower block then comes first."""
    found = ()
    for j in tl.static_range(COUNT):
        found += (tl.where(best[j] == _NONE, _NOWHERE, number[j]),)
    return _ascending(found, COUNT)


@triton.jit
def _members(found, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr):
    """The numbers of all EACH members of what was found, ascending, [ROWS, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    whose = tl.full([ROWS, COLUMNS], _NOWHERE, tl.int32)
    for j in tl.static_range(COUNT):
        whose = tl.where(column // EACH == j, found[j][:, None], whose)
    return whose * EACH + column % EACH


@triton.jit
def _groups_of_tiles(
    bests, peaks, space, num_tiles, num_groups, room, BM: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    KP: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The TOP_K groups of largest peak, ascending; the next best key, and about the best score of other tiles.

    They lie in the TOP_K best tiles of EACH groups, as the best blocks lie in the best groups.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, KP * EACH)[None, :]
    best, tile = best_groups(bests, num_tiles, 1, BM, ROWS, TOP_K + 1, COLUMNS)
    group = _members(_in_order(best, tile, TOP_K), TOP_K, ROWS, KP * EACH, EACH)
    at = row[:, None] * room + tl.minimum(group, room - 1)
    keys = sortable(tl.load(peaks + at), group < num_groups, KP * EACH)
    peak, place = _extract(keys, KP * EACH, TOP_K + 1)
    tl.store(space + row[:, None] * (KP * EACH) + column, group)
    tl.debug_barrier()
    places, found = _in_order(peak, place, TOP_K), ()
    for j in tl.static_range(TOP_K):
        real = places[j] < _NOWHERE
        found += (tl.load(space + row * (KP * EACH) + places[j], mask=real, other=_NOWHERE),)
    tl.debug_barrier()
    return found, peak[TOP_K], score_of(best[TOP_K])


@triton.jit
def best_blocks(
    scores, bests, peaks, space, place, stop, count, room, BM: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    KP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BY_TILES: tl.constexpr,
):  # fmt: skip
    """The TOP_K best blocks of queries before `stop`, [ROWS, KP], best first, and about the best score of the others,
    where `count` is given of all but the first `count`.

    `scores` and `bests` belong to a tile of BM queries, in which these are at `place`, from `bests` on; `peaks`
    [ROWS, room / 8] and `space` [ROWS, 8 KP] to this program. Columns from TOP_K on mean nothing.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, KP * GROUP)[None, :]
    room_groups = tl.multiple_of(room // GROUP, 8)
    num_groups = tl.cdiv(stop, GROUP)
    if BY_TILES:
        found, next_peak, others = _groups_of_tiles(
            bests, peaks, space, tl.cdiv(stop, TILE), num_groups, room_groups, BM, ROWS, TOP_K, KP, TILE // GROUP,
            COLUMNS,
        )  # fmt: skip
        others = tl.maximum(others, score_of(next_peak))
    else:
        peak, group = best_groups(peaks, num_groups, room_groups, 1, ROWS, TOP_K + 1, COLUMNS)
        found, others = _in_order(peak, group, TOP_K), score_of(peak[TOP_K])
    block = _members(found, TOP_K, ROWS, KP * GROUP, GROUP)
    tl.store(space + row * (KP * GROUP) + column, block)
    inside = tl.minimum(block, room - GROUP + column % GROUP)
    values = tl.load(scores + score_at(place[:, None], inside, BM))
    if scores.dtype.element_ty == tl.int16:
        values = tl.load(bests + row + inside // TILE * BM) - steps_below(values)
    best, place = _extract(sortable(values, block < stop, KP * GROUP), KP * GROUP, TOP_K + 1)
    next_best = best[TOP_K]
    if count is not None:
        for j in tl.static_range(TOP_K):
            next_best = tl.where(count == j, best[j], next_best)
    top = tl.maximum(score_of(next_best), others)
    if scores.dtype.element_ty == tl.int16:  # not below what is so far below its tile's best that it counts as nothing
        top = tl.ceil(tl.maximum(top, score_of(best[0]) - LOWEST)) / STEPS
    rank = tl.arange(0, KP)[None, :]
    places = tl.zeros([ROWS, KP], tl.int32)
    for j in tl.static_range(TOP_K):
        places = tl.where(rank == j, place[j][:, None], places)
    tl.debug_barrier()
    return tl.load(space + row * (KP * GROUP) + places), top


@triton.jit
def whose(
    place, work, first_head, heads, heads_all, num_tiles, sparse_start, num_sparse, G: tl.constexpr,
    TOP_K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """First token of a tile, its key head, where blocks of its queries at `place` are, and which of these are real."""
    first, own_z, member = tile_of(work, num_tiles, heads_all, sparse_start, G, BM)
    z = (first_head + own_z).to(tl.int64)
    sparse = first + place - sparse_start
    query = (z // heads * num_sparse + sparse) * (heads * G) + z % heads * G + member
    return first, z % heads, query * TOP_K, (sparse >= 0) & (sparse < num_sparse)


@triton.jit(
    do_not_specialize=["heads", "heads_all", "first_head", "first_work", "num_tiles", "sparse_start", "num_sparse"]
)
def _choose(
    scores, bests, peaks, space, tops, chosen, counts, heads, heads_all, first_head, first_work, num_tiles,
    sparse_start, num_sparse, room, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr,
    KP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, BY_TILES: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) // (BM // ROWS)
    place = tl.program_id(0) % (BM // ROWS) * ROWS + tl.arange(0, ROWS)
    first, head, to, real = whose(
        place, own + first_work, first_head, heads, heads_all, num_tiles, sparse_start, num_sparse, G, TOP_K, BM
    )  # fmt: skip
    stop, count = first // B * (B // UNIT), None
    if counts is not None:
        count = tl.minimum(tl.load(counts + head).to(tl.int32), stop)
    at = tl.program_id(0).to(tl.int64) * ROWS
    scores += own.to(tl.int64) * BM * room
    bests += own.to(tl.int64) * BM * (room // TILE) + tl.program_id(0) % (BM // ROWS) * ROWS
    peaks += at * tl.multiple_of(room // GROUP, 8)
    blocks, top = best_blocks(
        scores, bests, peaks, space + at * (KP * GROUP), place, stop, count, room, BM, ROWS, TOP_K, KP, GROUP, TILE,
        COLUMNS, BY_TILES,
    )  # fmt: skip
    rank = tl.arange(0, KP)[None, :]
    kept = real[:, None] & (rank < TOP_K)
    if counts is not None:
        tl.store(chosen + to[:, None] + rank, tl.where(rank < count, blocks, -1), mask=kept)
        kept &= rank < count
        top = tl.where(count < stop, top, -1e38)
    else:
        tl.store(chosen + to[:, None] + rank, blocks, mask=kept)
    tl.store(tops + at + tl.arange(0, ROWS), top)
    tl.store(scores + score_at(place[:, None], blocks, BM), nothing_of(scores), mask=kept)


@triton.jit(
    do_not_specialize=["heads", "heads_all", "first_head", "first_work", "num_tiles", "sparse_start", "num_sparse"]
)
def _strike(
    scores, chosen, heads, heads_all, first_head, first_work, num_tiles, sparse_start, num_sparse, room,
    G: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BM)
    _, _, at, real = whose(
        place, tl.program_id(0) + first_work, first_head, heads, heads_all, num_tiles, sparse_start, num_sparse, G,
        TOP_K, BM,
    )  # fmt: skip
    rank = tl.arange(0, KP)[None, :]
    block = tl.load(chosen + at[:, None] + rank, mask=real[:, None] & (rank < TOP_K), other=-1)
    to = scores + tl.program_id(0).to(tl.int64) * BM * room + score_at(place[:, None], block, BM)
    tl.store(to, nothing_of(scores), mask=block >= 0)
