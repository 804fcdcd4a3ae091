"""The retrieved field: exact attention of each query to the blocks it chose, key-block-outer.

All (query, block) pairs are sorted by block; then each block is one dense attention of the queries that chose it. The
idea of FlashMoBA (arXiv 2511.11571) in plain tensors.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bsbr.ops.tiles import Dropout, attend, attend_backward


class Pairs(NamedTuple):
    """The (query, block) pairs, sorted by block."""

    query: Tensor
    """Flat index into the Z * G * S queries of each pair, [P]."""
    counts: list[int]
    """Pairs of each of the Z * N blocks."""
    place: Tensor
    """Where each query's pairs stand among the sorted ones, [Z * G * S, top_k]."""


def sort_pairs(block_indices: Tensor, num_blocks: int) -> Pairs:
    """Sort the pairs by block, and by query within a block.

    Args:
        block_indices: blocks each query reads, [Z, G, top_k, S].
        num_blocks: N, blocks of each of the Z key heads.
    Returns:
        The pairs.

    Example:
        >>> pairs = sort_pairs(torch.tensor([[[[0, 1, 0]]]]), 2)
        >>> pairs.query.tolist(), pairs.counts
        ([0, 2, 1], [2, 1])
    """
    heads, top_k = block_indices.shape[0], block_indices.shape[2]
    head_start = torch.arange(heads, device=block_indices.device) * num_blocks
    block = (block_indices + head_start[:, None, None, None]).permute(2, 0, 1, 3).flatten()
    in_order, order = block.int().sort(stable=True)  # a one-dimensional integer sort is a radix sort
    counts = torch.bincount(in_order, minlength=heads * num_blocks).tolist()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Pairs(order % (order.numel() // top_k), counts, place.view(top_k, -1).T.contiguous())


def merge_retrieved(
    pairs: Pairs,
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
        pairs: the queries of each block.
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
    part_o = lse.new_empty(pairs.query.numel(), o.shape[-1])
    part_lse = lse.new_empty(pairs.query.numel())
    for block, here in _blocks(pairs):
        own_q = q.index_select(0, pairs.query[here])[None, None]
        own_o, own_lse = attend(
            own_q, blocks_k[block, None], blocks_v[block, None], scale, None, dropout, offset + here.start
        )
        part_o[here], part_lse[here] = own_o[0, 0], own_lse[0, 0]
    lses = torch.cat([lse.reshape(1, -1), part_lse[pairs.place.T]])  # [1 + top_k, Z * G * S]
    total = lses.logsumexp(0)
    weights = (lses - total).exp_()
    merged = embedding_bag(pairs.place, part_o, mode="sum", per_sample_weights=weights[1:].T.contiguous())
    merged.addcmul_(o.reshape(-1, o.shape[-1]), weights[0, :, None])
    return merged.view_as(o), total.view_as(lse)


def retrieved_backward(
    pairs: Pairs,
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
        pairs, q, blocks_k, blocks_v, scale, dropout, offset: as given to `merge_retrieved`.
        do: gradient of o, [Z, G, S, Dv].
        o: output of the whole softmax, [Z, G, S, Dv].
        lse: its log-sum-exp, [Z, G, S].
    Returns:
        dq [Z, G, S, D], dk [Z * N, unit, D] and dv [Z * N, unit, Dv], in the dtype of lse.
    """
    shape, lse = q.shape, lse.reshape(-1)
    do, q, o = (x.reshape(-1, x.shape[-1]) for x in (do, q, o))
    part_q = lse.new_empty(pairs.query.numel(), q.shape[-1])
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (blocks_k, blocks_v))
    for block, here in _blocks(pairs):
        query = pairs.query[here]
        own_do, own_q, own_o, own_lse = (x.index_select(0, query)[None, None] for x in (do, q, o, lse))
        own_dq, own_dk, own_dv = attend_backward(
            own_do, own_q, blocks_k[block, None], blocks_v[block, None], own_o, own_lse, scale, None,
            dropout, offset + here.start,
        )  # fmt: skip
        part_q[here], dk[block], dv[block] = own_dq[0, 0], own_dk[0], own_dv[0]
    return embedding_bag(pairs.place, part_q, mode="sum").view(shape), dk, dv


def _blocks(pairs: Pairs) -> list[tuple[int, slice]]:
    """The blocks that some query chose, and where their pairs stand."""
    found, start = [], 0
    for block, count in enumerate(pairs.counts):
        if count:
            found.append((block, slice(start, start + count)))
        start += count
    return found
