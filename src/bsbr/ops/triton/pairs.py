"""Counting sort of (query, block) pairs by block, without asking the device for a size.

A pair is numbered (query * G + head) * top_k + place within its key head. How the pairs of a block are ordered is
left to chance (atomics), which changes no output: every row of a tile is computed by itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_COPIES = 64
"""Counters of a block: atomics on one address wait for each other, so programs take turns."""


class Pairs(NamedTuple):
    """The pairs of some key heads, sorted by block."""

    pair: Tensor
    """Pairs in order of block, [Z, P] int32."""
    start: Tensor
    """Where the pairs of a block start in its key head's, [Z, N] int32."""
    counts: Tensor
    """Pairs of a block, [Z, N] int32."""
    tile_end: Tensor
    """Tiles of its key head's blocks up to and including this one, [Z, N] int32."""
    tile_block: Tensor
    """The block of each tile of a key head, N past the last one, [Z, tiles the shapes allow] int32."""
    rows: int
    """Pairs of a tile."""


def sort_pairs(chosen: Tensor, group: int, heads_here: range, num_blocks: int, rows: int) -> Pairs:
    """Sort the pairs by block and cut each block's into tiles of `rows`.

    Args:
        chosen: [B, S, HQ, top_k] int32, entries below `num_blocks`; negative ones are no pair.
        group: query heads of a key head.
        heads_here: key heads to sort for, counted over rows and key heads.
        num_blocks: N.
        rows: pairs of a tile.
    Returns:
        The sorted pairs; Z counts the heads here.
    """
    _, num_queries, num_heads, top_k = chosen.shape
    heads = len(heads_here)
    per_head = num_queries * group * top_k
    counters = torch.zeros(_COPIES, heads, num_blocks, dtype=torch.int32, device=chosen.device)
    grid, sizes = (triton.cdiv(per_head, 1024), heads), (heads_here.start, num_heads // group, num_queries, num_blocks)
    options = {"GK": group * top_k, "BLOCK": 1024, "COPIES": _COPIES, "num_warps": 4}
    _count[grid](chosen, counters, *sizes, **options)
    pair = torch.empty(heads, per_head, dtype=torch.int32, device=chosen.device)
    start, count, tile_end = torch.empty(3, heads, num_blocks, dtype=torch.int32, device=chosen.device)
    most = per_head // rows + min(num_blocks, per_head)
    tile_block = torch.empty(heads, most, dtype=torch.int32, device=chosen.device)
    _cut[(heads,)](
        counters, start, count, tile_end, tile_block, num_blocks, most, rows, COPIES=_COPIES, BLOCKS=64, num_warps=4
    )  # fmt: skip
    _place[grid](chosen, counters, pair, *sizes, **options)
    return Pairs(pair, start, count, tile_end, tile_block, rows)


@triton.jit
def _block_of(chosen, first_head, heads, num_queries, GK: tl.constexpr, BLOCK: tl.constexpr):
    """The pairs of a program, and the block of each."""
    z = first_head + tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_queries * GK
    query = (z // heads).to(tl.int64) * num_queries + pair // GK
    block = tl.load(chosen + (query * heads + z % heads) * GK + pair % GK, mask=inside, other=-1)
    return tl.program_id(1), pair, block >= 0, block


@triton.jit
def _counter(z, num_blocks, COPIES: tl.constexpr):
    """Where this program's copy of a key head's counters starts."""
    return (tl.program_id(0) % COPIES * tl.num_programs(1) + z) * num_blocks


@triton.jit(do_not_specialize=["first_head", "heads", "num_queries", "num_blocks"])
def _count(
    chosen, count, first_head, heads, num_queries, num_blocks, GK: tl.constexpr, BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    z, _, inside, block = _block_of(chosen, first_head, heads, num_queries, GK, BLOCK)
    tl.atomic_add(count + _counter(z, num_blocks, COPIES) + block, 1, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["num_blocks", "most", "rows"])
def _cut(
    counters, start, count, tile_end, tile_block, num_blocks, most, rows, COPIES: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """From the counters of a key head, where each copy of a block's pairs starts, and the tiles of the blocks."""
    z, copy = tl.program_id(0).to(tl.int64), tl.arange(0, COPIES)[:, None]
    from_copy = counters + (copy * tl.num_programs(0) + z) * num_blocks
    tile_block += z * most
    pairs_before, tiles_before = 0, 0
    for first in range(0, num_blocks, BLOCKS):
        n = first + tl.arange(0, BLOCKS)
        there = n < num_blocks
        own = tl.load(from_copy + n[None, :], mask=there[None, :], other=0)
        total = tl.sum(own, 0)
        begin = pairs_before + tl.cumsum(total, 0) - total
        tl.store(from_copy + n[None, :], begin[None, :] + tl.cumsum(own, 0) - own, mask=there[None, :])
        tiles = (total + rows - 1) // rows
        end = tiles_before + tl.cumsum(tiles, 0)
        to = z * num_blocks + n
        tl.store(start + to, begin, mask=there)
        tl.store(count + to, total, mask=there)
        tl.store(tile_end + to, end, mask=there)
        for back in range(1, tl.max(tiles, 0) + 1):
            tl.store(tile_block + end - back, n, mask=there & (back <= tiles))
        pairs_before += tl.sum(total, 0)
        tiles_before += tl.sum(tiles, 0)
    for first in range(tiles_before, most, 256):
        tile = first + tl.arange(0, 256)
        tl.store(tile_block + tile, tl.zeros([256], tl.int32) + num_blocks, mask=tile < most)


@triton.jit(do_not_specialize=["first_head", "heads", "num_queries", "num_blocks"])
def _place(
    chosen, cursor, pairs, first_head, heads, num_queries, num_blocks, GK: tl.constexpr, BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    z, pair, inside, block = _block_of(chosen, first_head, heads, num_queries, GK, BLOCK)
    place = tl.atomic_add(cursor + _counter(z, num_blocks, COPIES) + block, 1, mask=inside, sem="relaxed")
    tl.store(pairs + z.to(tl.int64) * num_queries * GK + place, pair, mask=inside)
