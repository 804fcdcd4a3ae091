"""The retrieved field: exact attention of each query to the blocks it chose, key-block-outer.

All (query, block) pairs are sorted by block; then each block is one dense attention of the queries that chose it. The
idea of FlashMoBA (arXiv 2511.11571) in plain tensors.

The queries of a block fill whole tiles, the last one padded: a matrix product then works on whole tiles of rows
whatever the choice, so that what later tokens choose cannot change an earlier result by a single bit.

A block is little work, so each step writes into tensors made once, and all views of them are made at once. On a GPU
many tiles are one call instead (`bsbr.ops.retrieved_batched`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bsbr.ops.exponentials import LOG2_E, exp_
from bsbr.ops.retrieved_batched import attend_tiles, attend_tiles_backward
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

    def tile_blocks(self) -> Tensor:
        """The block of each tile, [tiles] int64."""
        device = self.query.device
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(len(self.counts), device=device).repeat_interleave(counts)

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
    keys, values = _base_two(blocks_k, scale, lse.dtype), blocks_v.to(lse.dtype)
    part_o = lse.new_empty(tiles.query.numel(), o.shape[-1])
    top, total = lse.new_empty(2, tiles.query.numel(), 1)
    if _batches(q, dropout):
        attend_tiles(q, keys, values, tiles.query, tiles.tile_blocks(), part_o, top, total)
    else:
        _attend_blocks(tiles, q, keys, values, dropout, offset, part_o, top, total)
    top *= math.log(2)
    row, shape = tiles.row.flatten(), tiles.row.shape
    every_lse = torch.cat([lse.reshape(1, -1), (top + total.log())[row].view(shape)])  # [1 + top_k, Z * G * S]
    highest = every_lse.amax(0)
    merged_lse = exp_(every_lse - highest).sum(0).log_().add_(highest)
    share = exp_(top[row].view(shape) - merged_lse)  # of the weights before they are divided by their total
    merged = embedding_bag(tiles.row.T.contiguous(), part_o, mode="sum", per_sample_weights=share.T.contiguous())
    merged.addcmul_(o.reshape(-1, o.shape[-1]), exp_(every_lse[0] - merged_lse)[:, None])
    return merged.view_as(o), merged_lse.view_as(lse)


def _attend_blocks(
    tiles: Tiles,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    dropout: Dropout,
    offset: int,
    part_o: Tensor,
    top: Tensor,
    total: Tensor,
) -> None:
    """What `attend_tiles` computes, block after block, with dropout."""
    each_k, each_v = keys.unbind(), values.unbind()
    work_q, work = tiles.workspace(q.shape[1], keys.shape[2], like=part_o)
    for block, (query, block_o, block_top, block_total) in tiles.blocks(tiles.query, part_o, top, total):
        own_q, weights = work_q[: len(query)], work[: len(query)]
        torch.mm(torch.index_select(q, 0, query, out=own_q), each_k[block], out=weights)
        torch.amax(weights, 1, True, out=block_top)
        torch.sum(weights.sub_(block_top).exp2_(), 1, True, out=block_total)
        if dropout.p:
            weights *= dropout.mask(weights, offset + block)
        torch.mm(weights, each_v[block], out=block_o)


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
    keys, wide_k, wide_v = _base_two(blocks_k, scale, wide), blocks_k.to(wide), blocks_v.to(wide)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (blocks_k, blocks_v))
    part_q = lse.new_empty(tiles.query.numel(), q.shape[-1])
    if _batches(q, dropout):
        attend_tiles_backward(
            do, q, keys, wide_k, wide_v, tiles.query, tiles.tile_blocks(), row_lse[:, None], delta, part_q, dk, dv
        )
    else:
        by_row = (row_lse[:, None], delta, part_q)
        _attend_blocks_backward(tiles, do, q, keys, wide_k, wide_v, dropout, offset, by_row, dk, dv)
    dq = embedding_bag(tiles.row.T.contiguous(), part_q, mode="sum")
    return dq.mul_(scale).view(shape), dk.mul_(scale), dv


def _attend_blocks_backward(
    tiles: Tiles,
    do: Tensor,
    q: Tensor,
    keys: Tensor,
    blocks_k: Tensor,
    blocks_v: Tensor,
    dropout: Dropout,
    offset: int,
    by_row: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
) -> None:
    """What `attend_tiles_backward` computes, block after block, with dropout; `by_row` is lse, delta and dq."""
    each_key, each_k, each_v = keys.unbind(), blocks_k.unbind(), blocks_v.mT.unbind()
    unit = blocks_k.shape[1]
    works = tiles.workspace(q.shape[1], do.shape[1], unit, unit, like=dk)
    for block, (query, own_lse, own_delta, own_dq) in tiles.blocks(tiles.query, *by_row):
        own_q, own_do, weights, dweights = (x[: len(query)] for x in works)
        torch.mm(torch.index_select(q, 0, query, out=own_q), each_key[block], out=weights).sub_(own_lse).exp2_()
        torch.mm(torch.index_select(do, 0, query, out=own_do), each_v[block], out=dweights)
        kept = weights
        if dropout.p:
            mask = dropout.mask(weights, offset + block)
            dweights, kept = dweights * mask, weights * mask
        torch.mm(kept.T, own_do, out=dv[block])
        dscores = dweights.sub_(own_delta).mul_(weights)
        torch.mm(dscores.T, own_q, out=dk[block])
        torch.mm(dscores, each_k[block], out=own_dq)


def _batches(q: Tensor, dropout: Dropout) -> bool:
    """Whether tiles go through in batches; a mask of dropout is drawn block by block."""
    return q.is_cuda and not dropout.p


def _base_two(blocks_k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Keys whose products with queries are powers of two, [Z * N, D, unit]."""
    return (blocks_k.to(dtype) * (scale * LOG2_E)).mT
