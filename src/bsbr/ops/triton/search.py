"""The search for the best blocks of each query, in scores that its program has written out.

Of every 8 blocks in a row the largest score is kept as the peak of the group. The `top_k` best blocks lie in the
`top_k` groups of largest peak (each of these groups has a block at least as good as any other group's best, and of
equal ones the lower), so a query looks at N / 8 peaks and 8 * top_k scores instead of N.
"""

import triton
import triton.language as tl

GROUP_BLOCKS = 8
"""Blocks of a group, GROUP in the kernels."""

_NONE = tl.constexpr(-(2**31))
"""The key of no score."""

_NOWHERE = tl.constexpr(1 << 24)
"""A group after all groups."""


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
def best_groups(peaks, num_groups, room, BM: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """The COUNT groups of largest peak of each query, best first; `peaks` [BM, room]. Returns their keys and numbers.

    Tiles of groups from left to right: the best of the first; then, while some query still has a peak above its worst
    kept one, each inserts its best peak of the tile, if above, into its sorted list.
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, COLUMNS)[None, :]
    held = (column < num_groups) & (row >= 0)
    keys = sortable(tl.load(peaks + row * room + column, mask=held, other=0.0), held, COLUMNS)
    best, index = _extract(keys, COLUMNS, COUNT)
    for start in range(COLUMNS, num_groups, COLUMNS):
        held = (start + column < num_groups) & (row >= 0)
        keys = sortable(tl.load(peaks + row * room + start + column, mask=held, other=0.0), held, COLUMNS)
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
def best_blocks(
    scores, peaks, candidates, stop, room, BM: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The TOP_K best blocks of each query before `stop`, [BM, KP], best first, and about the best score of the others.

    `scores` [BM, room], `peaks` [BM, room / 8] and `candidates` [BM, 8 KP] belong to this program. Columns from TOP_K
    on mean nothing.
    """
    row, column = tl.arange(0, BM)[:, None], tl.arange(0, KP * GROUP)[None, :]
    peak, group = best_groups(peaks, tl.cdiv(stop, GROUP), room // GROUP, BM, TOP_K + 1, COLUMNS)
    found = ()
    for j in tl.static_range(TOP_K):
        found += (tl.where(peak[j] == _NONE, _NOWHERE, group[j]),)
    found = _ascending(found, TOP_K)  # of equal scores the one in the lower block comes first
    block = tl.full([BM, KP * GROUP], _NOWHERE, tl.int32)
    for j in tl.static_range(TOP_K):
        block = tl.where(column // GROUP == j, found[j][:, None], block)
    block = block * GROUP + column % GROUP
    tl.store(candidates + row * (KP * GROUP) + column, block)
    held = block < stop
    keys = sortable(tl.load(scores + row * room + block, mask=held, other=0.0), held, KP * GROUP)
    best, place = _extract(keys, KP * GROUP, TOP_K + 1)
    rank = tl.arange(0, KP)[None, :]
    places = tl.zeros([BM, KP], tl.int32)
    for j in tl.static_range(TOP_K):
        places = tl.where(rank == j, place[j][:, None], places)
    tl.debug_barrier()
    blocks = tl.load(candidates + row * (KP * GROUP) + places)
    return blocks, tl.maximum(score_of(best[TOP_K]), score_of(peak[TOP_K]))
