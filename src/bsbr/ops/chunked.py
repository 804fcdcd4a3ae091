"""The attention block by block in plain PyTorch: memory linear in length, forward and backward, any device."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import far, retrieved
from bsbr.ops.routing import select_blocks
from bsbr.ops.summaries import query_features, summarize
from bsbr.ops.tiles import Dropout, attend, attend_backward

_ROWS = 32768
"""Query rows worked on at once: enough to fill tiles, few enough to bound memory."""

_SCORES = 1 << 19
"""Block scores held at once: a segment's scores should stay in a CPU core's cache."""


class Plan(NamedTuple):
    """What one call computes, apart from tensors."""

    config: BSBRConfig
    scale: float
    q_start: int
    num_queries: int
    dropout: Dropout

    @property
    def stop(self) -> int:
        """Position after the last query."""
        return self.q_start + self.num_queries

    @property
    def dense_until(self) -> int:
        """Position from which queries are sparse; before it everything is exact (few blocks are past, or told so)."""
        return min(self.stop, max(self.q_start, dense_until(self.config)))

    def segments(self, heads: int) -> list[slice]:
        """Cut the sparse positions into runs of whole local blocks, or parts of one, small enough to stay in cache."""
        size, unit = self.config.block_size, self.config.unit
        segments, start = [], self.dense_until
        while start < self.stop:
            if start % size or self.stop - start < size:
                stop = min(self.stop, (start // size + 1) * size)
            else:
                # blocks c such that heads * c * size queries times the blocks past at their end fit
                half, room = start / 2 / size, _SCORES * unit / (heads * size * size)
                wanted = max(1, int(math.sqrt(half * half + room) - half))
                stop = start + min(wanted, (self.stop - start) // size) * size
            segments.append(slice(start, stop))
            start = stop
        return segments


def dense_until(config: BSBRConfig) -> int:
    """Return the position below which the attention is exact by definition.

    A query with at most `top_k` past blocks reads all of them.

    Args:
        config: the settings.
    Returns:
        Positions before this one read their whole past exactly.

    Example:
        >>> dense_until(BSBRConfig(block_size=128, top_k=2))
        384
    """
    full = (config.top_k * config.unit // config.block_size + 1) * config.block_size
    return max(config.dense_below, full)


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    *,
    scale: float,
    q_start: int,
    calibration: Tensor,
    block_indices: Tensor | None,
    dropout: Dropout,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of `reference_attention` in memory linear in the number of tokens.

    1. Queries before `dense_until` attend to their whole past in one dense call.
    2. The others: local blocks folded into the batch of one call; block scores, choice of blocks and far field by
       segments that stay in cache; then all chosen blocks at once, key-block-outer; merged by log-sum-exp.
    3. The backward pass repeats the scores, never stores them.

    Args:
        q: [B, Tq, HQ, D]; k: [B, T, H, D]; v: [B, T, H, Dv], T = q_start + Tq.
        config: the settings.
        scale: factor on q.k.
        q_start: position of the first query.
        calibration: [HQ, 5], in float32 or better.
        block_indices: selection to use, [B, Tq, HQ, S], or None to choose here.
        dropout: dropout of the attention weights.
    Returns:
        o [B, Tq, HQ, Dv], and lse [B, Tq, HQ] in float32 or better.
    """
    (batch, num_queries, num_heads, _), key_heads = q.shape, k.shape[2]
    group = num_heads // key_heads
    grouped = q.unflatten(2, (key_heads, group)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * H, G, Tq, D]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # [B * H, T, D]
    scalars = calibration.view(key_heads, group, 5).repeat(batch, 1, 1)
    if block_indices is not None:
        block_indices = block_indices.unflatten(2, (key_heads, group)).permute(0, 2, 3, 4, 1).flatten(0, 1)
    step = max(1, _ROWS // (group * num_queries))
    parts = []
    for start in range(0, grouped.shape[0], step):
        plan = Plan(config, scale, q_start, num_queries, dropout._replace(seed=dropout.seed + (start << 32)))
        some = slice(start, start + step)
        chosen = None if block_indices is None else block_indices[some]
        parts.append(_attend_heads(plan, grouped[some], k[some], v[some], scalars[some], chosen))
    o, lse = (torch.cat(x) if len(parts) > 1 else x[0] for x in zip(*parts, strict=True))
    o = o.view(batch, num_heads, num_queries, -1).transpose(1, 2)
    return o, lse.view(batch, num_heads, num_queries).transpose(1, 2)


def _attend_heads(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor, block_indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summarise the past of some heads, then attend; the summaries are differentiated by autograd."""
    config, sparse = plan.config, plan.dense_until < plan.stop
    past = (plan.stop - 1) // config.block_size * config.block_size if sparse else 0
    summaries = summarize(k[:, :past], v[:, :past], config.unit)
    q_last = None
    if config.state == "block" and sparse:
        last = slice(config.block_size - 1, past, config.block_size)
        q_last = q[:, :, last].to(calibration.dtype) * plan.scale
    states = far.read_states(config, summaries, q_last, calibration) if sparse else None
    field = far.FarField(summaries.mean_k, summaries.var_k, summaries.mean_v, states, calibration)
    return _Chunked.apply(plan, block_indices, q.contiguous(), k.contiguous(), v.contiguous(), *field)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, block_indices: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *fields: Any
    ) -> tuple[Tensor, Tensor]:
        field = far.FarField(*fields)
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=field.calibration.dtype)
        dense = plan.dense_until - plan.q_start
        if dense:
            keys = slice(0, plan.dense_until)
            o[:, :, :dense], lse[:, :, :dense] = attend(
                q[:, :, :dense], k[:, keys], v[:, keys], plan.scale, plan.q_start, plan.dropout
            )
        chosen, sparse = [], slice(dense, None)
        rest_o, rest_lse = torch.empty_like(o[:, :, sparse], dtype=lse.dtype), lse[:, :, sparse]
        for segment in plan.segments(q.shape[0] * q.shape[1]):
            rows = slice(segment.start - plan.dense_until, segment.stop - plan.dense_until)
            given = None if block_indices is None else block_indices[..., _rows(plan, segment)]
            rest_o[:, :, rows], rest_lse[:, :, rows], indices = _forward_segment(plan, field, q, k, v, segment, given)
            chosen.append(indices)
        indices = torch.cat(chosen, -1) if chosen else None  # [Z, G, top_k, S]
        if indices is not None and indices.shape[2]:
            pairs = retrieved.sort_pairs(indices, k.shape[1] // plan.config.unit)
            rest_o, rest_lse = retrieved.merge_retrieved(
                pairs, q[:, :, sparse], *_blocks(plan, k, v), plan.scale, rest_o, rest_lse, plan.dropout, _RETRIEVED
            )
        o[:, :, sparse], lse[:, :, sparse] = rest_o, rest_lse
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, o, lse, indices, *fields)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, o, lse, indices, *fields = ctx.saved_tensors
        plan, field = ctx.plan, far.FarField(*fields)
        gradients, do = far.zero_gradients(field), do.contiguous()
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        dense = plan.dense_until - plan.q_start
        if dense:
            keys, rows = slice(0, plan.dense_until), slice(0, dense)
            dq[:, :, rows], dk[:, keys], dv[:, keys] = attend_backward(
                do[:, :, rows], q[:, :, rows], k[:, keys], v[:, keys], o[:, :, rows], lse[:, :, rows], plan.scale,
                plan.q_start, plan.dropout,
            )  # fmt: skip
        for segment in plan.segments(q.shape[0] * q.shape[1]):
            _backward_segment(plan, field, gradients, segment, indices, do, q, k, v, o, lse, dq, dk, dv)
        if indices is not None and indices.shape[2]:
            pairs, rest = retrieved.sort_pairs(indices, k.shape[1] // plan.config.unit), slice(dense, None)
            part_q, part_k, part_v = retrieved.retrieved_backward(
                pairs, do[:, :, rest], q[:, :, rest], *_blocks(plan, k, v), o[:, :, rest], lse[:, :, rest],
                plan.scale, plan.dropout, _RETRIEVED,
            )  # fmt: skip
            dq[:, :, rest] += part_q
            whole = part_k.shape[0] // k.shape[0] * plan.config.unit
            dk[:, :whole] += part_k.view(k.shape[0], whole, -1)
            dv[:, :whole] += part_v.view(v.shape[0], whole, -1)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *gradients


# Streams of dropout: the dense prefix counts from 0, the local field and the far field by position, each from its own
# start, so that no two places drop by the same numbers.
_LOCAL, _FAR, _RETRIEVED = 1 << 28, 1 << 29, 1 << 30


def _rows(plan: Plan, segment: slice) -> slice:
    return slice(segment.start - plan.q_start, segment.stop - plan.q_start)


def _blocks(plan: Plan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by complete retrieval block, [Z * N, unit, D]."""
    unit = plan.config.unit
    count = k.shape[1] // unit
    return tuple(x[:, : count * unit].unflatten(1, (count, unit)).flatten(0, 1) for x in (k, v))  # type: ignore[return-value]


def _fold(plan: Plan, segment: slice, x: Tensor) -> Tensor:
    """Queries [Z, G, S, ...] of a segment -> [Z * C, G, m, ...], one entry for each local block."""
    count = _count(plan, segment)
    return x.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(plan: Plan, segment: slice, x: Tensor, heads: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.unflatten(0, (heads, _count(plan, segment))).transpose(1, 2).flatten(2, 3)


def _count(plan: Plan, segment: slice) -> int:
    return max(1, (segment.stop - segment.start) // plan.config.block_size)


def _local_keys(plan: Plan, segment: slice) -> tuple[slice, int]:
    """Keys of the local blocks of a segment, and the place in its block where the segment starts."""
    first = segment.start % plan.config.block_size
    return slice(segment.start - first, segment.stop), first


def _far_scores(
    plan: Plan, field: far.FarField, features: Tensor, segment: slice, given: Tensor | None
) -> tuple[Tensor, Tensor, range]:
    """Scores of the past blocks with the chosen ones taken out, the choice [Z, G, top_k, S], and the local blocks."""
    config = plan.config
    blocks = range(segment.start // config.block_size, (segment.stop - 1) // config.block_size + 1)
    mass = far.scores(config, field, features, blocks)
    if given is None and config.top_k:
        given = select_blocks(mass, config.top_k, config.selection)
    if given is None:
        given = torch.empty(*features.shape[:2], 0, features.shape[2], dtype=torch.int64, device=features.device)
    return mass.scatter_(-2, given, -math.inf), given, blocks


def _forward_segment(
    plan: Plan, field: far.FarField, q: Tensor, k: Tensor, v: Tensor, segment: slice, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Local and far field of a segment, and its choice of blocks."""
    q = q[:, :, _rows(plan, segment)]
    keys, first = _local_keys(plan, segment)
    count = _count(plan, segment)
    local_k, local_v = (x[:, keys].unflatten(1, (count, -1)).flatten(0, 1) for x in (k, v))
    offset = _LOCAL + segment.start
    parts = attend(_fold(plan, segment, q), local_k, local_v, plan.scale, first, plan.dropout, offset)
    o, lse = (_unfold(plan, segment, x, q.shape[0]) for x in parts)
    features = query_features(q, plan.scale)
    scaled = features[..., : q.shape[-1]]
    mass, chosen, blocks = _far_scores(plan, field, features, segment, given)
    if plan.config.far != "drop":
        o, lse = far.merge_far(plan.config, field, scaled, mass, blocks, o, lse)
    return o, lse, chosen


def _backward_segment(
    plan: Plan,
    field: far.FarField,
    gradients: far.FarGradients,
    segment: slice,
    indices: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add the gradients of a segment's local and far field."""
    rows = _rows(plan, segment)
    do, q, o, lse = (x[:, :, rows] for x in (do, q, o, lse))
    keys, first = _local_keys(plan, segment)
    heads, count = q.shape[0], _count(plan, segment)
    local_k, local_v = (x[:, keys].unflatten(1, (count, -1)).flatten(0, 1) for x in (k, v))
    folded = (_fold(plan, segment, x) for x in (do, q))
    local_q, local_dk, local_dv = attend_backward(
        *folded, local_k, local_v, _fold(plan, segment, o), _fold(plan, segment, lse), plan.scale, first, plan.dropout,
        _LOCAL + segment.start,
    )  # fmt: skip
    dq[:, :, rows] += _unfold(plan, segment, local_q, heads)
    dk[:, keys] += local_dk.unflatten(0, (heads, count)).flatten(1, 2)
    dv[:, keys] += local_dv.unflatten(0, (heads, count)).flatten(1, 2)
    if plan.config.far == "drop":
        return
    given = indices[..., segment.start - plan.dense_until : segment.stop - plan.dense_until]
    features, wide_do = query_features(q, plan.scale), do.to(lse.dtype)
    scaled = features[..., : q.shape[-1]]
    mass, _, blocks = _far_scores(plan, field, features, segment, given)
    weights = mass.sub_(lse.unsqueeze(-2)).exp_()
    delta = (wide_do * o).sum(-1)
    scaled_dq = far.far_backward(plan.config, field, gradients, scaled, weights, wide_do, delta, blocks)
    dq[:, :, rows] += scaled_dq * plan.scale
