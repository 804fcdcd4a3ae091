"""Gradients of the summaries, block-outer, and from there to keys and values."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.summaries import Summaries
from bsbr.ops.triton.fields_backward import FarRows
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import load_blocks, load_chosen, score_factors, strike, tile_scores
from bsbr.ops.triton.summaries import FarField, padded

_MOST_TOKENS, _LEAST_TOKENS, _PROGRAMS = 4096, 256, 1024
"""Queries that one program reads of each head: as many as leave this many programs. Several add to the gradient of a
block."""


class SummaryGradients(NamedTuple):
    """Gradients of `Summaries`."""

    mean_k: Tensor
    """[Z, N, D] float32."""
    var_k: Tensor
    """[Z, N, D] float32."""
    mean_v: Tensor
    """[Z, N, D] float32."""
    states: Tensor
    """[Z, N, D, D] in the dtype of the states; without states [Z, 0, D, D]."""


def summaries_backward(
    problem: Problem,
    q: Tensor,
    field: FarField,
    calibration: Tensor,
    chosen: Tensor,
    do: Tensor,
    far_rows: FarRows,
) -> SummaryGradients:
    """Differentiate the far field with respect to its summaries.

    Args:
        problem, q, field, calibration, chosen, do: as given to `fields_backward`.
        far_rows: what that wrote.
    Returns:
        Gradients of the summaries.
    """
    config, width = problem.config, q.shape[3]
    heads, num_blocks, _ = field.centred_k.shape
    dmean_k, dvar_k, dmean_v = torch.zeros(3, heads, num_blocks, width, dtype=torch.float32, device=q.device)
    rows, blocks = (
        min(problem.tile_rows, problem.gradient_rows if width <= 128 else 32),
        64 if problem.most_rows >= 64 and width <= 128 else 32,
    )
    shapes = {"G": problem.group, "B": config.block_size, "D": width, "DP": padded(width)}
    tiles, tokens = triton.cdiv(num_blocks, blocks), _MOST_TOKENS
    while tokens > _LEAST_TOKENS and tiles * triton.cdiv(problem.num_sparse, tokens) * heads < _PROGRAMS:
        tokens //= 2
    _blocks_backward[(tiles, triton.cdiv(problem.num_sparse + rows, tokens), heads)](
        q, *field[:3], calibration, chosen, do, far_rows.shift, far_rows.offset, dmean_k, dvar_k, dmean_v,
        *q.stride()[:3], q.shape[2] // problem.group, num_blocks, problem.sparse_start, problem.q_start,
        problem.num_queries, tokens, *problem.score_scales,
        UNIT=config.unit, TOP_K=config.top_k, BM=rows, BN=blocks,
        MOMENTS=config.far == "moments", num_warps=8 if width > 128 else 4, num_stages=1, **shapes,
    )  # fmt: skip
    dstates = torch.empty_like(field.states[:, :0])
    if config.state != "none":
        read = torch.empty_like(field.states)
        tile = min(problem.tile_rows, 64)
        _states_backward[(field.states.shape[1], heads)](
            q, do, far_rows.share, calibration, read, *q.stride()[:3], q.shape[2] // problem.group,
            problem.sparse_start, problem.q_start, problem.num_queries, problem.scale, BM=tile,
            num_warps=8 if width > 64 else 4, num_stages=1, **shapes,
        )  # fmt: skip
        dstates = field.states.new_empty(heads, num_blocks, width, width)
        elements, part = width * width, 64
        _running_mean_backward[(triton.cdiv(elements, part), heads)](
            read, dstates, num_blocks, elements, PER_BLOCK=problem.per_block, TILE=part, num_warps=2
        )
    return SummaryGradients(dmean_k, dvar_k, dmean_v, dstates)


def moments_backward(
    unit: int, k: Tensor, v: Tensor, summaries: Summaries, gradients: SummaryGradients, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor]:
    """Add what keys and values get through the summaries, and round.

    Args:
        unit: keys of a block.
        k, v: [B, T, H, D].
        summaries: their means, as `block_moments` gives them.
        gradients: of the summaries.
        dk, dv: gradients so far, [B, T, H, D] float32 contiguous.
    Returns:
        Gradients of k and v, in their dtype.
    """
    heads, width = k.shape[2], k.shape[3]
    out_k, out_v = (torch.empty(dk.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    _moments_backward[(triton.cdiv(k.shape[1], unit), k.shape[0] * heads)](
        k, v, summaries.mean_k, summaries.mean_v, *gradients, dk, dv, out_k, out_v, *k.stride()[:3], *v.stride()[:3],
        heads, k.shape[1], summaries.mean_k.shape[1], UNIT=unit, D=width, DP=padded(width),
        STATES=gradients.states.shape[1] > 0, num_warps=16 if unit * padded(width) > 16384 else 8 if width > 64 else 4,
    )  # fmt: skip
    return out_k, out_v


@triton.jit(do_not_specialize=["heads", "num_blocks", "sparse_start", "q_start", "num_queries", "tokens"])
def _blocks_backward(
    q, centred_k, var_k, mean_v, calibration, chosen, do, far_shift, far_offset, dmean_k, dvar_k, dmean_v,
    qb, qt, qh, heads, num_blocks, sparse_start, q_start, num_queries, tokens, mean_scale,
    var_scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    start, z = tl.program_id(0) * BN, tl.program_id(2).to(tl.int64)
    row, key_head = z // heads, z % heads
    n, d = start + tl.arange(0, BN), tl.arange(0, DP)
    inside = (d < D)[None, :]
    begin = sparse_start // BM * BM + tl.program_id(1) * tokens
    end = min(begin + tokens, q_start + num_queries)
    begin = max(begin, (start * UNIT // B + 1) * B)  # the first local block for which one of these blocks is past
    if begin >= end:
        return
    num_sparse = q_start + num_queries - sparse_start
    own_centred = load_blocks(centred_k + z * num_blocks * D, start, num_blocks, D, DP, BN)
    own_var = load_blocks(var_k + z * num_blocks * D, start, num_blocks, D, DP, BN) if MOMENTS else own_centred
    values = load_blocks(mean_v + z * num_blocks * D, start, num_blocks, D, DP, BN)
    sum_mean = tl.zeros([BN, DP], tl.float32)
    sum_var = tl.zeros([BN, DP], tl.float32)
    sum_values = tl.zeros([BN, DP], tl.float32)
    for step in range(0, tl.cdiv(end - begin, BM) * G):
        first = begin + step // G * BM
        member = step % G
        head = key_head * G + member
        token = first + tl.arange(0, BM)
        valid = (token >= sparse_start) & (token < q_start + num_queries)
        held = valid[:, None] & inside
        query = (token - q_start).to(tl.int64)
        at_o = (row * num_queries + query) * heads * G + head
        tile_q = tl.load(q + row * qb + head * qh + query[:, None] * qt + d[None, :], mask=held, other=0.0)
        tile_do = tl.load(do + at_o[:, None] * D + d[None, :], mask=held, other=0.0)
        shift = tl.load(far_shift + at_o, mask=valid, other=float("-inf"))  # other rows weigh nothing
        offset = tl.load(far_offset + at_o, mask=valid, other=0.0)
        wide = tile_q.to(tl.float32)
        scalars = calibration + head * 5
        mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
        square = (wide * wide * var_factor).to(var_k.dtype.element_ty)
        sparse = (token - sparse_start).to(tl.int64)
        blocks = load_chosen(chosen + ((row * num_sparse + sparse) * heads * G + head) * TOP_K, valid, TOP_K)
        scores = tile_scores(tile_q, square, own_centred, own_var, mean_factor, MOMENTS)
        weights = tl.exp2(strike(scores, start, first // B * (B // UNIT), blocks, TOP_K, BN) + shift[:, None])
        gamma = tl.load(scalars + 3)
        dvalues = tl.dot(tile_do, values, input_precision="ieee")
        dscores = weights * (gamma * dvalues + offset[:, None])
        sum_values = tl.dot(tl.trans((weights * gamma).to(tile_do.dtype)), tile_do, sum_values, input_precision="ieee")
        # `square` holds all of a score's variance term but the factor that both terms share
        dscores *= mean_factor * 0.6931471805599453
        sum_mean = tl.dot(tl.trans(dscores.to(tile_q.dtype)), tile_q, sum_mean, input_precision="ieee")
        if MOMENTS:
            sum_var = tl.dot(tl.trans(dscores.to(square.dtype)), square, sum_var, input_precision="ieee")
    to = (z * num_blocks + n[:, None]) * D + d[None, :]
    real = (n < num_blocks)[:, None] & inside
    tl.atomic_add(dmean_k + to, sum_mean, mask=real, sem="relaxed")
    tl.atomic_add(dmean_v + to, sum_values, mask=real, sem="relaxed")
    if MOMENTS:
        tl.atomic_add(dvar_k + to, sum_var, mask=real, sem="relaxed")


@triton.jit(do_not_specialize=["heads", "sparse_start", "q_start", "num_queries"])
def _states_backward(
    q, do, far_share, calibration, dread, qb, qt, qh, heads, sparse_start, q_start, num_queries, scale,
    G: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    block, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, key_head = z // heads, z % heads
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    total = tl.zeros([DP, DP], tl.float32)
    for step in range(0, B // BM * G):
        token = block * B + step // G * BM + tl.arange(0, BM)
        head = key_head * G + step % G
        valid = (token >= sparse_start) & (token < q_start + num_queries)
        held = valid[:, None] & inside
        query = (token - q_start).to(tl.int64)
        at_o = (row * num_queries + query) * heads * G + head
        tile_q = tl.load(q + row * qb + head * qh + query[:, None] * qt + d[None, :], mask=held, other=0.0)
        tile_do = tl.load(do + at_o[:, None] * D + d[None, :], mask=held, other=0.0)
        share = tl.load(far_share + at_o, mask=valid, other=0.0) * (scale * tl.load(calibration + head * 5 + 4))
        weighted = (tile_do.to(tl.float32) * share[:, None]).to(dread.dtype.element_ty)
        total = tl.dot(tl.trans(tile_q.to(dread.dtype.element_ty)), weighted, total, input_precision="ieee")
    to = dread + (z * tl.num_programs(0) + block) * D * D + d[:, None] * D + d[None, :]
    tl.store(to, total.to(dread.dtype.element_ty), mask=(d < D)[:, None] & inside)


@triton.jit(do_not_specialize=["num_blocks"])
def _running_mean_backward(dread, dstates, num_blocks, elements, PER_BLOCK: tl.constexpr, TILE: tl.constexpr):
    element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    z = tl.program_id(1).to(tl.int64)
    inside = element < elements
    num_reads = num_blocks // PER_BLOCK + 1
    total = tl.zeros([TILE], tl.float32)
    for back in range(0, num_blocks // PER_BLOCK):
        block = num_blocks // PER_BLOCK - back  # local block whose queries read the mean of all blocks before it
        part = tl.load(dread + (z * num_reads + block) * elements + element, mask=inside, other=0.0)
        total += part.to(tl.float32) / (block * PER_BLOCK)
        for i in tl.static_range(PER_BLOCK):
            n = block * PER_BLOCK - 1 - i
            to = dstates + (z * num_blocks + n) * elements + element
            tl.store(to, total.to(dstates.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "num_keys", "num_blocks"])
def _moments_backward(
    k, v, mean_k, mean_v, dmean_k, dvar_k, dmean_v, dstates, dk, dv, out_k, out_v, kb, kt, kh, vb, vt, vh, heads,
    num_keys, num_blocks, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    block, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = z // heads, z % heads
    token = (block * UNIT + tl.arange(0, UNIT)).to(tl.int64)
    d = tl.arange(0, DP)
    real = (token < num_keys)[:, None] & (d < D)[None, :]
    at = ((row * num_keys + token[:, None]) * heads + head) * D + d[None, :]
    sum_k, sum_v = tl.load(dk + at, mask=real, other=0.0), tl.load(dv + at, mask=real, other=0.0)
    if block < num_blocks:
        own_k = tl.load(k + row * kb + head * kh + token[:, None] * kt + d[None, :], mask=real, other=0.0)
        own_v = tl.load(v + row * vb + head * vh + token[:, None] * vt + d[None, :], mask=real, other=0.0)
        of_block = (z * num_blocks + block) * D + d
        mu = tl.load(mean_k + of_block, mask=d < D, other=0.0)
        vbar = tl.load(mean_v + of_block, mask=d < D, other=0.0)
        centred_k, centred_v = own_k.to(tl.float32) - mu[None, :], own_v.to(tl.float32) - vbar[None, :]
        by_mean = tl.load(dmean_k + of_block, mask=d < D, other=0.0)
        by_var = tl.load(dvar_k + of_block, mask=d < D, other=0.0)
        sum_k += (by_mean[None, :] + 2 * centred_k * by_var[None, :]) / UNIT
        sum_v += tl.load(dmean_v + of_block, mask=d < D, other=0.0)[None, :] / UNIT
        if STATES:
            element = dstates.dtype.element_ty
            at_state = dstates + (z * num_blocks + block) * D * D + d[:, None] * D + d[None, :]
            dstate = tl.load(at_state, mask=(d < D)[:, None] & (d < D)[None, :], other=0.0)
            sum_k += tl.dot(centred_v.to(element), tl.trans(dstate), input_precision="ieee") / UNIT
            sum_v += tl.dot(centred_k.to(element), dstate, input_precision="ieee") / UNIT
    tl.store(out_k + at, sum_k.to(out_k.dtype.element_ty), mask=real)
    tl.store(out_v + at, sum_v.to(out_v.dtype.element_ty), mask=real)
