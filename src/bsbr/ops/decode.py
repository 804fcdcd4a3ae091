"""The attention of a few queries against a cache whose summaries are ready: nothing is summarised or copied again.

Shapes: Z key heads of all rows, G query heads of each, S queries of each, all in one local block, N past blocks.
Queries come unscaled. Work that grows with the text is one score for each past block, and nothing for each token.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import retrieved
from bsbr.ops.exponentials import exp_
from bsbr.ops.routing import select_blocks
from bsbr.ops.tiles import NO_DROPOUT

_GATHERED = 8
"""Queries up to which each one's blocks are gathered for itself; more of them share blocks, which are read once."""


class Past(NamedTuple):
    """What the queries may know of the blocks before their own local block."""

    meta: Tensor | None
    """Mean keys, [Z, N, D], for far="moments" with the variances after them, [Z, N, 2 D], in float32 or better; None
    where there is no past block or nothing asks for them."""
    mean_v: Tensor | None
    """Mean values, [Z, N, Dv]; None without a far field."""
    state: Tensor | None
    """Mean first-order state of the past blocks, [Z, D, Dv], for state="global"."""
    absent: Tensor | None
    """True where a block is not past for this row, [Z, N]; None where all are."""
    fetch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Keys [..., unit, D] and values [..., unit, Dv] of blocks, from key heads and block numbers of equal shape."""


def decode_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    unseen: Tensor | None,
    past: Past,
    config: BSBRConfig,
    calibration: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend to the own block, to the `top_k` past blocks of largest estimated mass, and to the others by summary.

    Source: docs/method.md; this is `reference_attention` at positions from `dense_until` on.

    Args:
        q: queries, [Z, G, S, D].
        own_k: keys of the own block so far, [Z, R, D]; own_v: its values, [Z, R, Dv].
        unseen: True where a query may not see a key of the own block, [Z or 1, S, R]; None where each sees all.
        past: the blocks before, at least `top_k` in each row.
        config: the settings; the state is "global" or "none".
        calibration: [Z, G, 5], in float32 or better.
        scale: factor on q.k.
        sinks: [Z, G], or None.
    Returns:
        o, [Z, G, S, Dv], in the dtype of calibration.

    Example:
        >>> own = torch.randn(2, 3, 4)
        >>> past = Past(None, None, None, None, lambda head, block: (own, own))
        >>> config = BSBRConfig(block_size=8, top_k=0, dense_below=0)
        >>> decode_attention(torch.randn(2, 1, 1, 4), own, own, None, past, config, torch.ones(2, 1, 5), 0.5).shape
        torch.Size([2, 1, 1, 4])
    """
    dtype = calibration.dtype
    columns = q.to(dtype).flatten(1, 2)  # [Z, C, D]: every query of every head on its own
    own_k, own_v = own_k.to(dtype), own_v.to(dtype)
    scalars = calibration.repeat_interleave(q.shape[2], 1)
    scores, chosen, gathered = [_exact_scores(columns, own_k, unseen, scale)], None, None
    if past.meta is not None:
        mass = _masses(columns, q.shape[1], past.meta, past.absent, config, scalars, scale)
        if config.top_k:
            chosen = select_blocks(mass, config.top_k, config.selection).mT.flatten(1, 2)  # leaves -inf where it chose
        if past.mean_v is not None:
            scores.append(mass.mT.flatten(1, 2))
    if chosen is not None and q.shape[2] <= _GATHERED:
        head = torch.arange(len(q), device=q.device)[:, None, None].expand_as(chosen)
        keys, gathered = (x.flatten(-3, -2).to(dtype) for x in past.fetch(head, chosen))  # [Z, C, top_k * unit, D]
        scores.append((keys @ (scale * columns)[..., None])[..., 0])
    gathered_weights = len(scores) - 1
    scores.extend(_sink_scores(sinks, q))
    weights, lse = _softmax(scores)
    o = weights[0] @ own_v
    if past.meta is not None and past.mean_v is not None:
        o += _far_output(columns, weights[1], past.mean_v, past.state, scalars, scale)
    if gathered is not None:
        o += (weights[gathered_weights][:, :, None] @ gathered)[:, :, 0]
    elif chosen is not None:
        o = _merge_shared(columns, chosen, past, scale, o, lse)
    return o.view(*q.shape[:3], -1)


def decode_exact(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor | None, own_k: Tensor, own_v: Tensor, own_unseen: Tensor | None,
    dtype: torch.dtype, scale: float, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend to the whole past exactly, as queries before `dense_until` do.

    Args:
        q: queries, [Z, G, S, D].
        k: keys before the own block, [Z, T, D]; v: their values, [Z, T, Dv].
        unseen: True where a key belongs to no block before the row's own, [Z, 1, T]; None where all do.
        own_k, own_v, own_unseen: as `unseen` and its keys in `decode_attention`.
        dtype: of the result and the computation.
        scale: factor on q.k.
        sinks: [Z, G], or None.
    Returns:
        o, [Z, G, S, Dv].

    Example:
        >>> x = torch.randn(2, 3, 4)
        >>> decode_exact(x[:, None, :1], x, x, None, x, x, None, torch.float64, 0.5).shape
        torch.Size([2, 1, 1, 4])
    """
    columns = q.to(dtype).flatten(1, 2)
    scores = [_exact_scores(columns, own_k.to(dtype), own_unseen, scale)]
    scores.append(_exact_scores(columns, k.to(dtype), unseen, scale))
    scores.extend(_sink_scores(sinks, q))
    weights, _ = _softmax(scores)
    o = weights[0] @ own_v.to(dtype) + weights[1] @ v.to(dtype)
    return o.view(*q.shape[:3], -1)


def _sink_scores(sinks: Tensor | None, q: Tensor) -> list[Tensor]:
    """The sinks [Z, G] as scores [Z, C, 1] of an entry whose value is 0, or no scores."""
    return [] if sinks is None else [sinks.repeat_interleave(q.shape[2], 1)[..., None]]


def _exact_scores(columns: Tensor, k: Tensor, unseen: Tensor | None, scale: float) -> Tensor:
    """Scores [Z, C, R]; `unseen` is [Z or 1, S or 1, R], the same for each head."""
    scores = (scale * columns) @ k.mT
    if unseen is not None:
        queries = unseen.shape[1]
        by_head = scores.view(len(scores), -1, queries, scores.shape[2])
        by_head.masked_fill_(unseen[:, None], -math.inf)
    return scores


def _masses(
    columns: Tensor, heads: int, meta: Tensor, absent: Tensor | None, config: BSBRConfig, scalars: Tensor, scale: float
) -> Tensor:
    """Estimated log-masses as `select_blocks` takes them: [Z, 1, N, C], or [Z, G, N, S] if heads choose together."""
    bias, mean_scale, var_scale = scalars[..., :3, None].unbind(2)  # each [Z, C, 1]
    direction = scale * mean_scale * columns
    if config.far == "moments":
        direction = torch.cat([direction, scale * scale / 2 * var_scale * columns.square()], -1)
    mass = torch.baddbmm((bias + math.log(config.unit)).mT, meta, direction.mT)  # [Z, N, C]
    if absent is not None:
        mass.masked_fill_(absent[..., None], -math.inf)
    if config.selection == "group":
        return mass.unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
    return mass[:, None]


def _softmax(scores: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Weights of each part under one softmax, and the log-sum-exp."""
    joined = torch.cat(scores, -1)
    top = joined.amax(-1, keepdim=True)
    weights = exp_(joined.sub_(top))
    total = weights.sum(-1, keepdim=True)
    return weights.div_(total).split([part.shape[-1] for part in scores], -1), (top + total.log())[..., 0]


def _far_output(
    columns: Tensor, weights: Tensor, mean_v: Tensor, state: Tensor | None, scalars: Tensor, scale: float
) -> Tensor:
    gamma, beta = scalars[..., 3:, None].unbind(2)
    o = gamma * (weights @ mean_v)
    if state is not None:
        o += beta * scale * weights.sum(-1, keepdim=True) * (columns @ state)
    return o


def _merge_shared(columns: Tensor, chosen: Tensor, past: Past, scale: float, o: Tensor, lse: Tensor) -> Tensor:
    """Read each chosen block once for all its queries, and merge the result into o."""
    assert past.meta is not None
    count = past.meta.shape[1]
    head = torch.arange(len(columns), device=columns.device)[:, None, None] * count
    blocks, place = (head + chosen).unique(return_inverse=True)
    k, v = past.fetch(blocks // count, blocks % count)
    tiles = retrieved.plan_tiles(place.flatten(0, 1).mT[None, None], len(blocks))
    parts = (columns.flatten(0, 1), o.flatten(0, 1), lse.flatten())
    merged, _ = retrieved.merge_retrieved(
        tiles, parts[0][None, None], k, v, scale, parts[1][None, None], parts[2][None, None], NO_DROPOUT, 0
    )
    return merged[0, 0].view_as(o)
