"""The retrieved field: exact attention of each query to the blocks it chose, key-block-outer.

All (query, block) pairs are sorted by block; then each block is one dense attention of the queries that chose it. The
idea of FlashMoBA (arXiv 2511.11571) in plain tensors.

The queries of a block fill whole tiles, the last one padded: a matrix product then works on whole tiles of rows
whatever the choice, so that what later tokens choose cannot change an earlier result by a single bit.

A block is little work, so each step writes into tensors made once, and all views of them are made at once.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bsbr.ops.exponentials import LOG2_E, exp_
from bsbr.ops.tiles import Dropout

_ROWS = 64
"""Rows of a tile: a multiple of what matrix kernels work on at once."""


class Tiles(NamedTuple):
    """Which query sits in which row of the tiles, block after block."""

    query: Tensor
    """Flat index into the Z * G * S queries of each row; 0 where nobody uses it, [tiles * rows]."""
    used: Tensor
    """False where nobody uses a row, [tiles * rows]."""
    counts: list[int]
    """Tiles of each of the Z * N blocks."""
    row: Tensor
    """The rows of each query, [top_k, Z * G * S]."""

    def blocks(self, *by_row: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the blocks that some query chose, each with its part of tensors that have an entry for every row."""
        parts = [x.split([count * _ROWS for count in self.counts]) for x in by_row]
        for block, count in enumerate(self.counts):
            if count:
                yield block, [x[block] for x in parts]

    def workspace(self, *widths: int, like: Tensor) -> list[Tensor]:
        """Make tensors that can hold the rows of any block, [rows, width], in the dtype of `like`."""
        return [like.new_empty(max(self.counts) * _ROWS, width) for width in widths]


def plan_tiles(block_indices: Tensor, num_blocks: int) -> Tiles:
    """Sort the pairs by block, and by query within a block, into tiles.

    Args:
        block_indices: blocks each query reads, [Z, G, top_k, S].
        num_blocks: N, blocks of each of the Z key heads.
    Returns:
        The tiles.

    Example:
        >>> tiles = plan_tiles(torch.tensor([[[[0, 1, 0]]]]), 2)
        >>> tiles.counts, tiles.query[tiles.used].tolist()
        ([1, 1], [0, 2, 1])
    """
    heads, top_k = block_indices.shape[0], block_indices.shape[2]
    head_start = torch.arange(heads, device=block_indices.device) * num_blocks
    block = (block_indices + head_start[:, None, None, None]).permute(2, 0, 1, 3).flatten()
    in_order, order = block.int().sort(stable=True)  # a one-dimensional integer sort is a radix sort
    pairs = torch.bincount(in_order, minlength=heads * num_blocks)
    counts = (pairs + _ROWS - 1) // _ROWS
    # where the rows of a block start among the tiles, less where its pairs start among the sorted pairs
    shift = (counts.cumsum(0) - counts) * _ROWS - (pairs.cumsum(0) - pairs)
    sorted_row = torch.arange(order.numel(), device=order.device) + shift.repeat_interleave(pairs)
    num_rows = int(counts.sum()) * _ROWS
    pair_query = torch.arange(order.numel() // top_k, device=order.device).repeat(top_k)
    query = sorted_row.new_zeros(num_rows).scatter_(0, sorted_row, pair_query[order])
    used = torch.zeros(num_rows, dtype=torch.bool, device=order.device).scatter_(0, sorted_row, True)
    row = torch.empty_like(order).scatter_(0, order, sorted_row)
    return Tiles(query, used, counts.tolist(), row.view(top_k, -1))


def merge_retrieved(
    tiles: Tiles,
    q: Tensor,
    blocks_k: Tensor,
    blocks_v: Tensor,
    scale: float,
    o: Tensor,
    lse: Tensor,
    dropout: Dropout,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Attend to the chosen blocks and merge the result into what the queries have so far.

    Args:
        tiles: the queries of each block.
        q: queries, [Z, G, S, D].
        blocks_k: keys by block, [Z * N, unit, D].
        blocks_v: values by block, [Z * N, unit, Dv].
        scale: factor on q.k.
        o: output so far, [Z, G, S, Dv] in the dtype of lse; lse: its log-sum-exp, [Z, G, S].
        dropout: dropout of the weights.
        offset: which stream of the dropout to use.
    Returns:
        o and lse over the former keys and the chosen blocks together.
    """
    q = q.reshape(-1, q.shape[-1]).to(lse.dtype)
    keys, values = _base_two(blocks_k, scale, lse.dtype), blocks_v.to(lse.dtype).unbind()
    part_o = lse.new_empty(tiles.query.numel(), o.shape[-1])
    top, total = lse.new_empty(2, tiles.query.numel(), 1)
    work_q, work = tiles.workspace(q.shape[1], blocks_k.shape[1], like=lse)
    for block, (query, block_o, block_top, block_total) in tiles.blocks(tiles.query, part_o, top, total):
        own_q, weights = work_q[: len(query)], work[: len(query)]
        torch.mm(torch.index_select(q, 0, query, out=own_q), keys[block], out=weights)
        torch.amax(weights, 1, True, out=block_top)
        torch.sum(weights.sub_(block_top).exp2_(), 1, True, out=block_total)
        if dropout.p:
            weights *= dropout.mask(weights, offset + block)
        torch.mm(weights, values[block], out=block_o)
    top *= math.log(2)
    row, shape = tiles.row.flatten(), tiles.row.shape
    every_lse = torch.cat([lse.reshape(1, -1), (top + total.log())[row].view(shape)])  # [1 + top_k, Z * G * S]
    highest = every_lse.amax(0)
    merged_lse = exp_(every_lse - highest).sum(0).log_().add_(highest)
    share = exp_(top[row].view(shape) - merged_lse)  # of the weights before they are divided by their total
    merged = embedding_bag(tiles.row.T.contiguous(), part_o, mode="sum", per_sample_weights=share.T.contiguous())
    merged.addcmul_(o.reshape(-1, o.shape[-1]), exp_(every_lse[0] - merged_lse)[:, None])
    return merged.view_as(o), merged_lse.view_as(lse)


def retrieved_backward(
    tiles: Tiles,
    do: Tensor,
    q: Tensor,
    blocks_k: Tensor,
    blocks_v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    dropout: Dropout,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the retrieved field's share of the whole softmax.

    Args:
        tiles, q, blocks_k, blocks_v, scale, dropout, offset: as given to `merge_retrieved`.
        do: gradient of o, [Z, G, S, Dv].
        o: output of the whole softmax, [Z, G, S, Dv].
        lse: its log-sum-exp, [Z, G, S].
    Returns:
        dq [Z, G, S, D], dk [Z * N, unit, D] and dv [Z * N, unit, Dv], in the dtype of lse.
    """
    shape, wide = q.shape, lse.dtype
    do, q = do.reshape(-1, do.shape[-1]).to(wide), q.reshape(-1, shape[-1]).to(wide)
    delta = (do * o.reshape(-1, o.shape[-1])).sum(1)[tiles.query, None]
    row_lse = (LOG2_E * lse.reshape(-1))[tiles.query].masked_fill_(~tiles.used, torch.inf)  # padded rows weigh nothing
    keys, wide_k, wide_v = _base_two(blocks_k, scale, wide), blocks_k.to(wide).unbind(), blocks_v.to(wide).mT.unbind()
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (blocks_k, blocks_v))
    part_q = lse.new_empty(tiles.query.numel(), q.shape[-1])
    unit = blocks_k.shape[1]
    works = tiles.workspace(q.shape[1], do.shape[1], unit, unit, like=lse)
    for block, (query, own_lse, own_delta, own_dq) in tiles.blocks(tiles.query, row_lse[:, None], delta, part_q):
        own_q, own_do, weights, dweights = (x[: len(query)] for x in works)
        torch.mm(torch.index_select(q, 0, query, out=own_q), keys[block], out=weights).sub_(own_lse).exp2_()
        torch.mm(torch.index_select(do, 0, query, out=own_do), wide_v[block], out=dweights)
        kept = weights
        if dropout.p:
            mask = dropout.mask(weights, offset + block)
            dweights, kept = dweights * mask, weights * mask
        torch.mm(kept.T, own_do, out=dv[block])
        dscores = dweights.sub_(own_delta).mul_(weights)
        torch.mm(dscores.T, own_q, out=dk[block])
        torch.mm(dscores, wide_k[block], out=own_dq)
    dq = embedding_bag(tiles.row.T.contiguous(), part_q, mode="sum")
    return dq.mul_(scale).view(shape), dk.mul_(scale), dv


def _base_two(blocks_k: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Keys whose products with queries are powers of two, [D, unit] of each block."""
    return (blocks_k.to(dtype) * (scale * LOG2_E)).mT.unbind()
