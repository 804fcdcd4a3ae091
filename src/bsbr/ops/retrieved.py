"""The retrieved field: exact attention of each query to the blocks it chose, key-block-outer.

All (query, block) pairs are sorted by block; then each block is one dense attention of the queries that chose it. The
idea of FlashMoBA (arXiv 2511.11571) in plain tensors.

The queries of a block fill whole tiles, the last one padded: a matrix product then works on whole tiles of rows
whatever the choice, so that what later tokens choose cannot change an earlier result by a single bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

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
    """The rows of each query, [Z * G * S, top_k]."""


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
    query = sorted_row.new_zeros(num_rows).scatter_(0, sorted_row, order % (order.numel() // top_k))
    used = torch.zeros(num_rows, dtype=torch.bool, device=order.device).scatter_(0, sorted_row, True)
    row = torch.empty_like(order).scatter_(0, order, sorted_row)
    return Tiles(query, used, counts.tolist(), row.view(top_k, -1).T.contiguous())


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
    q = q.reshape(-1, q.shape[-1])
    part_o = lse.new_empty(tiles.query.numel(), o.shape[-1])
    tops, totals = [], []
    for block, rows in _blocks(tiles):
        scores = _scores(q, blocks_k, tiles, block, rows, scale, lse.dtype)
        top = scores.amax(1, keepdim=True)
        weights = scores.sub_(top).exp_()
        tops.append(top.squeeze(1))
        totals.append(weights.sum(1))
        if dropout.p:
            weights *= dropout.mask(weights, offset + block)
        torch.mm(weights, blocks_v[block].to(lse.dtype), out=part_o[rows])
    top, total = torch.cat(tops), torch.cat(totals)
    every_lse = torch.cat([lse.reshape(1, -1), (top + total.log())[tiles.row.T]])  # [1 + top_k, Z * G * S]
    merged_lse = every_lse.logsumexp(0)
    share = (top[tiles.row] - merged_lse[:, None]).exp_()  # of the weights before they are divided by their total
    merged = embedding_bag(tiles.row, part_o, mode="sum", per_sample_weights=share)
    merged.addcmul_(o.reshape(-1, o.shape[-1]), (every_lse[0] - merged_lse).exp_()[:, None])
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
    do, q = do.reshape(-1, do.shape[-1]).to(wide), q.reshape(-1, shape[-1])
    delta = (do * o.reshape(-1, o.shape[-1])).sum(1)
    row_lse = lse.reshape(-1)[tiles.query].masked_fill_(~tiles.used, torch.inf)  # a padded row weighs nothing
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (blocks_k, blocks_v))
    part_q = lse.new_empty(tiles.query.numel(), q.shape[-1])
    for block, rows in _blocks(tiles):
        query, own_k, own_v = tiles.query[rows], blocks_k[block].to(wide), blocks_v[block].to(wide)
        own_do, own_q = do.index_select(0, query), q.index_select(0, query).to(wide)
        scores = _scores(q, blocks_k, tiles, block, rows, scale, wide)
        weights = scores.sub_(row_lse[rows, None]).exp_()
        dweights, kept = own_do @ own_v.T, weights
        if dropout.p:
            mask = dropout.mask(weights, offset + block)
            dweights, kept = dweights * mask, weights * mask
        torch.mm(kept.T, own_do, out=dv[block])
        dscores = dweights.sub_(delta.index_select(0, query)[:, None]).mul_(weights).mul_(scale)
        torch.mm(dscores.T, own_q, out=dk[block])
        torch.mm(dscores, own_k, out=part_q[rows])
    return embedding_bag(tiles.row, part_q, mode="sum").view(shape), dk, dv


def _blocks(tiles: Tiles) -> list[tuple[int, slice]]:
    """The blocks that some query chose, and their rows."""
    found, start = [], 0
    for block, count in enumerate(tiles.counts):
        if count:
            found.append((block, slice(start, start + count * _ROWS)))
        start += count * _ROWS
    return found


def _scores(
    q: Tensor, blocks_k: Tensor, tiles: Tiles, block: int, rows: slice, scale: float, dtype: torch.dtype
) -> Tensor:
    """Scores of a block's queries with its keys, [rows, unit]."""
    own_q = q.index_select(0, tiles.query[rows]).to(dtype)
    return torch.addmm(own_q.new_empty(()), own_q, blocks_k[block].to(dtype).T, beta=0, alpha=scale)
