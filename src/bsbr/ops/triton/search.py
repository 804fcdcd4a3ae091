"""The search for the best blocks of each query, in scores that its program has written out.

Of every 8 blocks in a row the largest score is kept as the peak of the group. The `top_k` best blocks lie in the
`top_k` groups of largest peak (each of these groups has a block at least as good as any other group's best, and of
equal ones the lower), so a query looks at N / 8 peaks and 8 * top_k scores instead of N. Of a long past the groups are
found in the same way, in the tiles of blocks that hold the best: then a query looks at N / 64 of these and at
64 * top_k scores, whose peaks are not kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import GROUP_BLOCKS, VARYING, Scores, Tiles, group_at, nothing_of, score_at, tile_of
from bsbr.ops.triton.short_scores import LOWEST, STEPS, steps_below

_NONE = tl.constexpr(-(2**31))
"""The key of no score."""

_NOWHERE = tl.constexpr(1 << 24)
"""A group after all groups."""

_ROWS = 4
"""Queries that one warp searches for: no other waits for it, and its registers leave room for 32 warps."""

MOST_WRITTEN_OUT = 32
"""Blocks that the search writes out one after the other at most: registers hold no more, and it takes the compiler 2 s
for 16, 4 s for 32 and 13 s beyond _AT_ONCE tiles, once for every number."""

_MANY_GROUPS = 64
"""Groups beyond which the best are found by way of the tiles of blocks."""

_AT_ONCE, _COLUMNS = 128, 64
"""Most peaks of a query that are searched at once; of more, so many after the other are inserted among the best."""


def reads_peaks(room: int) -> bool:
    """Whether the search looks at the best of every GROUP_BLOCKS of so many blocks."""
    return room // GROUP_BLOCKS <= _MANY_GROUPS


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
    most, by_tiles = triton.next_power_of_2(problem.config.top_k), not reads_peaks(tiles.room)
    programs = tiles.count * (tiles.rows // _ROWS)
    space = torch.empty(programs, 2, _ROWS, most, dtype=torch.int32, device=chosen.device)
    first_level = tiles.room // (tiles.blocks if by_tiles else GROUP_BLOCKS)
    columns = max(16, triton.next_power_of_2(first_level))
    once = columns <= _AT_ONCE
    _choose[(programs,)](
        *scores, space, tops, chosen, counts, *sizes(problem, tiles, chosen), tiles.room, G=problem.group,
        B=problem.config.block_size, UNIT=problem.config.unit, TOP_K=problem.config.top_k, KP=most, GROUP=GROUP_BLOCKS,
        TILE=tiles.blocks, COLUMNS=columns if once else _COLUMNS, ONCE=once, BY_TILES=by_tiles, BM=tiles.rows,
        ROWS=_ROWS, num_warps=1, num_stages=1,
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
def sortable(scores, held, column, COLUMNS: tl.constexpr):
    """Integers in the order of the scores; their last bits tell the column, so that no two of a row are equal.

    What is lost are those bits of a score, 2**-17 of it for 64 columns; equal scores come with the lower column first.
    """
    bits = scores.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = (bits & -COLUMNS) | (COLUMNS - 1 - column)
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
    keys = sortable(tl.load(peaks + row * row_stride + column * column_stride), held, column, COLUMNS)
    best, index = _extract(keys, COLUMNS, COUNT)
    for start in range(COLUMNS, num_groups, COLUMNS):
        held = (start + column < num_groups) & (row >= 0)
        keys = sortable(tl.load(peaks + row * row_stride + (start + column) * column_stride), held, column, COLUMNS)
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
def _take(keys, COUNT: tl.constexpr):
    """Which keys of each query are its COUNT best, and the next best key."""
    left = keys
    for _ in tl.static_range(COUNT):
        left = tl.where(left == tl.max(left, 0)[None, :], _NONE, left)
    return left != keys, tl.max(left, 0)


@triton.jit
def _write_taken(space, taken, number, ROWS: tl.constexpr, KP: tl.constexpr):
    """Write the numbers of what each query takes to `space` [ROWS, KP], in the order in which they lie.

    How many come before is counted for all queries in one sum, of each in 8 bits.
    """
    row, counts = tl.arange(0, ROWS)[None, :], taken.to(tl.int32)
    before = tl.cumsum(tl.sum(counts << (8 * row), 1), 0)[:, None] >> (8 * row)
    tl.store(space + row * KP + (before & 0xFF) - 1, number + tl.zeros_like(counts), mask=taken)


@triton.jit
def _write_best(
    peaks, space, num_groups, row_stride, column_stride, ROWS: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr,
    COLUMNS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write the numbers of the TOP_K groups of largest peak to `space`, ascending; the next best key.

    ONCE: there are no more than COLUMNS.
    """
    if ONCE:
        row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None]
        held = (column < num_groups) & (row >= 0)
        keys = sortable(tl.load(peaks + row * row_stride + column * column_stride), held, column, COLUMNS)
        taken, after = _take(keys, TOP_K)
        _write_taken(space, taken, column, ROWS, KP)
    else:
        best, number = best_groups(peaks, num_groups, row_stride, column_stride, ROWS, TOP_K + 1, COLUMNS)
        found, after = _in_order(best, number, TOP_K), best[TOP_K]
        for j in tl.static_range(TOP_K):
            tl.store(space + tl.arange(0, ROWS) * KP + j, found[j])
    tl.debug_barrier()
    return after


@triton.jit
def _members(space, count, ROWS: tl.constexpr, KP: tl.constexpr, EACH: tl.constexpr):
    """The numbers of all EACH members of the `count` groups in `space`, ascending, [KP * EACH, ROWS]."""
    row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, KP * EACH)[:, None]
    held = (column // EACH < count) & (row >= 0)
    return tl.load(space + row * KP + column // EACH, mask=held, other=_NOWHERE) * EACH + column % EACH


@triton.jit
def _peaks_of(scores, bests, place, group, BM: tl.constexpr, EACH: tl.constexpr):
    """The largest score of each of some groups of each query, [GROUPS, ROWS]."""
    member = tl.arange(0, 8)[None, None, :]
    each = tl.load(scores + group_at(place[None, :], group, BM)[:, :, None] + member)
    if scores.dtype.element_ty == tl.int16:  # the least of unsigned numbers
        least = (tl.min((each ^ -32768).to(tl.int32), 2) + 32768).to(tl.int16)
        peaks = tl.load(bests + tl.arange(0, place.shape[0])[None, :] + group // EACH * BM) - steps_below(least)
    else:
        peaks = tl.max(each, 2)
    return peaks


@triton.jit
def best_blocks(
    scores, bests, peaks, space, place, stop, count, room, BM: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    KP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr,
    BY_TILES: tl.constexpr,
):  # fmt: skip
    """Blocks among which are the TOP_K best of queries before `stop`, [8 KP, ROWS]; the rank of each, best first, TOP_K
    for those that are none of these; and about the best score of the others, where `count` is given of all but the
    first `count`.

    `scores` and `bests` belong to a tile of BM queries, in which these are at `place`, from `bests` on; `peaks`
    [ROWS, room / 8], None if BY_TILES, and `space` [2, ROWS, KP] to this program.
    """
    row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, KP * GROUP)[:, None]
    room_groups = tl.multiple_of(room // GROUP, 8)
    num_groups = tl.cdiv(stop, GROUP)
    if BY_TILES:  # the best groups lie in the best tiles, as the best blocks lie in the best groups
        EACH: tl.constexpr = TILE // GROUP
        num_tiles, number = tl.cdiv(stop, TILE), tl.arange(0, KP * EACH)[:, None]
        after = _write_best(bests, space, num_tiles, 1, BM, ROWS, TOP_K, KP, COLUMNS, ONCE)
        group = _members(space, tl.minimum(num_tiles, TOP_K), ROWS, KP, EACH)
        most = _peaks_of(scores, bests, place, tl.minimum(group, room_groups - 1), BM, EACH)
        taken, next_peak = _take(sortable(most, group < num_groups, number, KP * EACH), TOP_K)
        space += ROWS * KP  # the first half may still be read
        _write_taken(space, taken, group, ROWS, KP)
        tl.debug_barrier()
        others = tl.maximum(score_of(after), score_of(next_peak))
    else:
        others = score_of(_write_best(peaks, space, num_groups, room_groups, 1, ROWS, TOP_K, KP, COLUMNS, ONCE))
    block = _members(space, tl.minimum(num_groups, TOP_K), ROWS, KP, GROUP)
    held = block < stop
    block = tl.minimum(block, room - GROUP + column % GROUP)
    values = tl.load(scores + score_at(place[None, :], block, BM))
    if scores.dtype.element_ty == tl.int16:
        values = tl.load(bests + row + block // TILE * BM) - steps_below(values)
    left = sortable(values, held, column, KP * GROUP)
    rank = tl.full([KP * GROUP, ROWS], TOP_K, tl.int32)
    value = tl.max(left, 0)
    best, next_best = value, value
    for j in tl.static_range(TOP_K):
        here = left == value[None, :]
        if count is not None:  # and there may be fewer than TOP_K
            next_best = tl.where(count == j, value, next_best)
            here &= (value != _NONE)[None, :]
        rank = tl.where(here, j, rank)
        left = tl.where(here, _NONE, left)
        value = tl.max(left, 0)
    next_best = value if count is None else tl.where(count == TOP_K, value, next_best)
    top = tl.maximum(score_of(next_best), others)
    if scores.dtype.element_ty == tl.int16:  # not below what is so far below its tile's best that it counts as nothing
        top = tl.ceil(tl.maximum(top, score_of(best) - LOWEST)) / STEPS
    return block, rank, top


@triton.jit
def whose(
    place, work, first_head, heads, heads_all, num_tiles, sparse_start, num_sparse, G: tl.constexpr,
    TOP_K: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """First token of a tile, its key head, where blocks of its queries at `place` are, and which of these are real."""
    first, own_z, member = tile_of(work, num_tiles, heads_all, sparse_start, G, BM)
    z = first_head + own_z  # divided before it is widened: an instruction, not a routine
    sparse = first + place - sparse_start
    query = ((z // heads).to(tl.int64) * num_sparse + sparse) * (heads * G) + z % heads * G + member
    return first, z % heads, query * TOP_K, (sparse >= 0) & (sparse < num_sparse)


@triton.jit(do_not_specialize=[*VARYING, "num_sparse"])
def _choose(
    scores, bests, peaks, space, tops, chosen, counts, heads, heads_all, first_head, first_work, num_tiles,
    sparse_start, num_sparse, room, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr,
    KP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr,
    BY_TILES: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr,
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
    if peaks is not None:
        peaks += at * tl.multiple_of(room // GROUP, 8)
    block, rank, top = best_blocks(
        scores, bests, peaks, space + at * (2 * KP), place, stop, count, room, BM, ROWS, TOP_K, KP, GROUP, TILE,
        COLUMNS, ONCE, BY_TILES,
    )  # fmt: skip
    kept = real[None, :] & (rank < TOP_K)
    if counts is not None:
        kept &= rank < count
        slot = tl.arange(0, KP)[:, None]
        none = real[None, :] & (slot >= count) & (slot < TOP_K)
        tl.store(chosen + to[None, :] + slot, tl.full([KP, ROWS], -1, tl.int32), mask=none)
        top = tl.where(count < stop, top, -1e38)
    tl.store(chosen + to[None, :] + rank, block, mask=kept)
    tl.store(tops + at + tl.arange(0, ROWS), top)
    tl.store(scores + score_at(place[None, :], block, BM), nothing_of(scores), mask=kept)


@triton.jit(do_not_specialize=[*VARYING, "num_sparse"])
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
