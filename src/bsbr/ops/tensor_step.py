"""A step of decoding by operations of PyTorch: the tokens of one piece are added to a cache and attend from it."""

from collections.abc import Callable

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.decode import Past, decode_attention, decode_exact
from bsbr.ops.own_blocks import OwnBlocks
from bsbr.ops.pieces import Piece, row_numbers
from bsbr.ops.running import RunningSummaries
from bsbr.ops.stores import Store


def attend_by_tensors(
    piece: Piece, rows: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    parts: tuple[OwnBlocks, RunningSummaries, Store | None], config: BSBRConfig, calibration: Tensor, scale: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add the tokens of a piece and attend from them.

    Args:
        piece: which rows, and where they are.
        rows: the rows as a tensor; None means all of the cache.
        q: [R, S, HQ, D]; k: [R, S, H, D]; v: [R, S, H, Dv].
        parts: the layer's own blocks, summaries, and past keys and values where they are kept.
        config: the settings.
        calibration: [HQ, 5], in float32 or better.
        scale: factor on q.k.
        sinks: a logit for each query head, [HQ], in the dtype of calibration; None means none.
    Returns:
        o, [R, S, HQ, Dv] in the dtype of q.
    """
    own_blocks, summaries, store = parts
    heads = k.shape[2]
    own_k, own_v, unseen = own_blocks.add(piece, rows, k, v)
    folded_q = q.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [Z, G, S, D]
    own = own_k.flatten(0, 1), own_v.flatten(0, 1), unseen
    if sinks is not None:
        sinks = sinks.view(heads, -1).repeat(len(piece.rows), 1)
    if piece.dense:
        before = _before(piece, rows, own_k, own_v, store, config.block_size)
        o = decode_exact(folded_q, *before, *own, calibration.dtype, scale, sinks)
    else:
        past = Past(*summaries.before(piece, rows), _fetch(store, rows, heads))
        scalars = calibration.unflatten(0, (heads, -1)).repeat(len(piece.rows), 1, 1)
        o = decode_attention(folded_q, *own, past, config, scalars, scale, sinks)
    return o.to(q.dtype).unflatten(0, (-1, heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _before(
    piece: Piece, rows: Tensor | None, own_k: Tensor, own_v: Tensor, store: Store | None, size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values before the rows' own blocks, [Z, T, D], and which of them are not there, [Z, 1, T]."""
    stops = [start // size * size for start in piece.places]
    if store is None or not max(stops):
        return own_k.flatten(0, 1)[:, :0], own_v.flatten(0, 1)[:, :0], None
    k, v = (x if rows is None else x[rows] for x in store.prefix(max(stops)))
    absent = None
    if not piece.even:
        stop = row_numbers(tuple(stops), k.device)[:, None, None]
        absent = (torch.arange(max(stops), device=k.device) >= stop).repeat_interleave(k.shape[1], 0)
    return k.flatten(0, 1), v.flatten(0, 1), absent


def _fetch(store: Store | None, rows: Tensor | None, heads: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read blocks of these rows, whose key heads are counted from the first of them."""

    def fetch(head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        assert store is not None
        return store.fetch(head if rows is None else rows[head // heads] * heads + head % heads, block)

    return fetch
