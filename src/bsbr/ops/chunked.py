"""The attention block by block in plain PyTorch: memory linear in length, forward and backward, any device.

Inside, tensors of a group of heads are [Z, G, S, D]: Z rows times key heads, G query heads of each.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import far, retrieved
from bsbr.ops.exponentials import exp_
from bsbr.ops.groups import Group, by_head, cut_heads, each_group, take_heads
from bsbr.ops.native.forward import native_forward
from bsbr.ops.routing import select_blocks
from bsbr.ops.schedule import Plan, Segment
from bsbr.ops.sinks import add_sinks, sinks_gradient
from bsbr.ops.summaries import summarize
from bsbr.ops.tiles import Dropout, attend, attend_backward

# Streams of dropout: the dense prefix counts from 0, the local field by position, the retrieved field by pair, each
# from its own start, so that no two places drop by the same numbers.
_LOCAL, _RETRIEVED = 1 << 28, 1 << 29


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
    native: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of `reference_attention` in memory linear in the number of tokens.

    1. Queries before `dense_until` attend to their whole past in one dense call.
    2. The others: local blocks folded into the batch of one call; block scores, choice of blocks and far field by
       segments that stay in cache; then the chosen blocks one by one; merged by log-sum-exp.
    3. The backward pass computes summaries and scores again, and stores neither.

    Args:
        q: [B, Tq, HQ, D]; k: [B, T, H, D]; v: [B, T, H, Dv], T = q_start + Tq.
        config: the settings.
        scale: factor on q.k.
        q_start: position of the first query.
        calibration: [HQ, 5], in float32 or better.
        block_indices: selection to use, [B, Tq, HQ, top_k], or None to choose here.
        dropout: dropout of the attention weights, not of the far field's.
        native: leave the forward pass to the C code (`bsbr.ops.native`).
        sinks: a logit for each query head, [HQ], or None.
    Returns:
        o [B, Tq, HQ, Dv], and lse [B, Tq, HQ] in float32 or better.
    """
    plan = Plan(config, scale, q_start, q.shape[1], dropout)
    return _Chunked.apply(plan, native, block_indices, q, k, v, calibration, sinks)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        native: bool,
        block_indices: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        calibration: Tensor,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if native:
            o, lse, every = native_forward(plan, q, k, v, calibration, block_indices)
            every = every.unflatten(1, (k.shape[2], -1))
            chosen = [every[group].flatten(0, 1) for group in cut_heads(q, k)]
        else:
            o, lse, chosen = _forward(plan, block_indices, q, k, v, calibration)
        if sinks is not None:
            o, lse = add_sinks(o, lse, sinks)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, calibration, sinks, o, lse, *chosen)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, calibration, sinks, o, lse, *chosen = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

        def work(index: int, group: Group) -> tuple[slice, Tensor]:
            part = take_heads(group, q, k, v, calibration)
            part_do, part_o, part_lse = (by_head(x, k)[group].flatten(0, 1).contiguous() for x in (do, o, lse))
            own = _with_stream(ctx.plan, index)
            *gradients, scalars = _backward(own, *part, chosen[index], part_do, part_o, part_lse)
            views = (by_head(dq, k)[group], dk.transpose(1, 2)[group], dv.transpose(1, 2)[group])
            for view, gradient in zip(views, gradients, strict=True):
                view.copy_(gradient.view_as(view))
            rows, heads = group
            return heads, scalars.unflatten(0, (rows.stop - rows.start, -1)).sum(0)

        dcalibration = torch.zeros_like(calibration)
        for heads, scalars in each_group(work, q, k):
            dcalibration.unflatten(0, (k.shape[2], -1))[heads] += scalars
        dsinks = None if sinks is None else sinks_gradient(do, o, lse, sinks)
        return None, None, None, dq, dk, dv, dcalibration, dsinks


def _forward(
    plan: Plan, block_indices: Tensor | None, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output and log-sum-exp of all queries, and of each group of heads the choice of blocks [Z, G, top_k, S]."""
    o = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=calibration.dtype)
    dense = plan.num_dense

    def work(index: int, group: Group) -> Tensor:
        own = _with_stream(plan, index)
        part = take_heads(group, q, k, v, calibration)
        given = None
        if block_indices is not None:
            given = by_head(block_indices, k)[group].flatten(0, 1).mT[..., dense:]
        own_o, own_lse = by_head(o, k)[group], by_head(lse, k)[group]
        part_o, part_lse = _forward_dense(own, *part[:3])
        own_o[..., :dense, :] = part_o.view_as(own_o[..., :dense, :])
        own_lse[..., :dense] = part_lse.view_as(own_lse[..., :dense])
        part_o, part_lse, chosen = _forward_sparse(own, *part, given)
        own_o[..., dense:, :] = part_o.view_as(own_o[..., dense:, :])
        own_lse[..., dense:] = part_lse.view_as(own_lse[..., dense:])
        return chosen

    return o, lse, each_group(work, q, k)


def _with_stream(plan: Plan, group: int) -> Plan:
    return plan._replace(dropout=plan.dropout._replace(seed=plan.dropout.seed + (group << 32)))


def _summarize(plan: Plan, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor) -> far.FarField:
    """Summaries of the past and what its states give each local block; differentiable."""
    config, past = plan.config, plan.num_past
    summaries = summarize(k[:, :past], v[:, :past], config.unit)
    q_last = None
    if config.state == "block":
        last = slice(config.block_size - 1, past, config.block_size)
        q_last = q[:, :, last].to(calibration.dtype)
    states = far.read_states(config, summaries, q_last, calibration, plan.scale)
    return far.FarField(summaries.mean_k, summaries.var_k, summaries.mean_v, states, calibration, plan.scale)


def _forward_dense(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if not plan.num_dense:
        return q.new_empty(*q.shape[:2], 0, v.shape[-1]), q.new_empty(*q.shape[:2], 0)
    keys = slice(0, plan.sparse_start)
    return attend(q[:, :, : plan.num_dense], k[:, keys], v[:, keys], plan.scale, plan.q_start, plan.dropout)


def _forward_sparse(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and choice of blocks [Z, G, top_k, S] of the sparse queries."""
    every_q, q = q, q[:, :, plan.num_dense :]
    o = calibration.new_empty(*q.shape[:3], v.shape[-1])
    lse = calibration.new_empty(q.shape[:3])
    chosen = torch.empty(*q.shape[:2], plan.config.top_k, q.shape[2], dtype=torch.int64, device=q.device)
    if not q.shape[2]:
        return o, lse, chosen
    field = _summarize(plan, every_q, k, v, calibration)
    for segment in plan.segments(q.shape[0] * q.shape[1], q.device.type):
        rows = segment.rows
        if given is not None:
            chosen[..., rows] = given[..., rows]
        o[:, :, rows], lse[:, :, rows] = _forward_segment(segment, field, q, k, v, chosen[..., rows], given is None)
    if plan.config.top_k:
        tiles = retrieved.plan_tiles(chosen, plan.num_past // plan.config.unit)
        blocks = _retrieval_blocks(plan, k, v)
        o, lse = retrieved.merge_retrieved(tiles, q, *blocks, plan.scale, o, lse, plan.dropout, _RETRIEVED)
    return o, lse, chosen


def _forward_segment(
    segment: Segment, field: far.FarField, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, choose: bool
) -> tuple[Tensor, Tensor]:
    """Local and far field of a segment; writes its choice of blocks to `chosen` if it has to choose."""
    plan, heads = segment.plan, q.shape[0]
    q = q[:, :, segment.rows]
    parts = attend(
        _fold(segment, q), *_local_blocks(segment, k, v), plan.scale, segment.first, plan.dropout,
        _LOCAL + segment.start,
    )  # fmt: skip
    o, lse = (_unfold(segment, x, heads) for x in parts)
    wide_q = q.to(lse.dtype)
    mass = far.scores(plan.config, field, wide_q, segment.blocks)
    if plan.config.top_k and choose:
        chosen.copy_(select_blocks(mass, plan.config.top_k, plan.config.selection))
    elif plan.config.top_k:
        mass.scatter_(-2, chosen, -math.inf)
    if plan.config.far != "drop":
        o, lse = far.merge_far(plan.config, field, wide_q, mass, segment.blocks, o, lse)
    return o, lse


def _backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    chosen: Tensor,
    do: Tensor,
    o: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and calibration, in the dtype of lse."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    dense = plan.num_dense
    if dense:
        keys = slice(0, plan.sparse_start)
        dq[:, :, :dense], dk[:, keys], dv[:, keys] = attend_backward(
            do[:, :, :dense], q[:, :, :dense], k[:, keys], v[:, keys], o[:, :, :dense], lse[:, :, :dense],
            plan.scale, plan.q_start, plan.dropout,
        )  # fmt: skip
    dcalibration = torch.zeros_like(calibration)
    if dense == q.shape[2]:
        return dq, dk, dv, dcalibration
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, calibration)]
        traced = _summarize(plan, *leaves)
    do, q, o, lse, sparse_dq = (x[:, :, dense:] for x in (do, q, o, lse, dq))
    field = far.FarField(*(None if x is None else x.detach() for x in traced[:5]), plan.scale)  # type: ignore[arg-type, call-arg]
    gradients = far.zero_gradients(field)
    for segment in plan.segments(q.shape[0] * q.shape[1], q.device.type):
        _backward_segment(segment, field, gradients, chosen, do, q, k, v, o, lse, sparse_dq, dk, dv)
    if plan.config.top_k:
        tiles = retrieved.plan_tiles(chosen, plan.num_past // plan.config.unit)
        blocks = _retrieval_blocks(plan, k, v)
        parts = retrieved.retrieved_backward(tiles, do, q, *blocks, o, lse, plan.scale, plan.dropout, _RETRIEVED)
        sparse_dq += parts[0]
        dk[:, : plan.num_past] += parts[1].view(k.shape[0], plan.num_past, -1)
        dv[:, : plan.num_past] += parts[2].view(v.shape[0], plan.num_past, -1)
    traced_gradients = [(x, g) for x, g in zip(traced[:5], gradients, strict=True) if x is not None and x.requires_grad]
    through = torch.autograd.grad(
        [x for x, _ in traced_gradients], leaves, [g for _, g in traced_gradients], allow_unused=True
    )
    for total, more in zip((dq, dk, dv, dcalibration), through, strict=True):
        if more is not None:
            total += more
    return dq, dk, dv, dcalibration


def _backward_segment(
    segment: Segment,
    field: far.FarField,
    gradients: far.FarGradients,
    chosen: Tensor,
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
    plan, heads, rows, keys = segment.plan, q.shape[0], segment.rows, segment.keys
    do, q, o, lse = (x[:, :, rows] for x in (do, q, o, lse))
    folded_do, folded_q, folded_o, folded_lse = (_fold(segment, x) for x in (do, q, o, lse))
    local_dq, local_dk, local_dv = attend_backward(
        folded_do, folded_q, *_local_blocks(segment, k, v), folded_o, folded_lse, plan.scale, segment.first,
        plan.dropout, _LOCAL + segment.start,
    )  # fmt: skip
    dq[:, :, rows] += _unfold(segment, local_dq, heads)
    dk[:, keys] += local_dk.view(heads, -1, local_dk.shape[-1])
    dv[:, keys] += local_dv.view(heads, -1, local_dv.shape[-1])
    if plan.config.far == "drop":
        return
    wide_q, wide_do = q.to(lse.dtype), do.to(lse.dtype)
    mass = far.scores(plan.config, field, wide_q, segment.blocks).scatter_(-2, chosen[..., rows], -math.inf)
    weights = exp_(mass.sub_(lse.unsqueeze(-2)))
    delta = (wide_do * o).sum(-1)
    dq[:, :, rows] += far.far_backward(plan.config, field, gradients, wide_q, weights, wide_do, delta, segment.blocks)


def _retrieval_blocks(plan: Plan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by past retrieval block, [Z * N, unit, D]."""
    k, v = (x[:, : plan.num_past].unflatten(1, (-1, plan.config.unit)).flatten(0, 1) for x in (k, v))
    return k, v


def _local_blocks(segment: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by local block, [Z * C, m, D]."""
    k, v = (x[:, segment.keys].unflatten(1, (len(segment.blocks), -1)).flatten(0, 1) for x in (k, v))
    return k, v


def _fold(segment: Segment, x: Tensor) -> Tensor:
    """Queries of a segment by local block, [Z, G, S, ...] -> [Z * C, G, m, ...]."""
    return x.unflatten(2, (len(segment.blocks), -1)).transpose(1, 2).flatten(0, 1)


def _unfold(segment: Segment, x: Tensor, heads: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.unflatten(0, (heads, len(segment.blocks))).transpose(1, 2).flatten(2, 3)
