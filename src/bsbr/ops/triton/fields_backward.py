"""Gradients of the local and the far field with respect to the queries and the five scalars of a head."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import load_blocks, load_chosen, score_factors, strike, tile_scores
from bsbr.ops.triton.summaries import FarField, padded


class FarRows(NamedTuple):
    """What the gradients of the summaries need of each query, [B, Tq, HQ] float32 each."""

    share: Tensor
    """Probability of the far field."""
    shift: Tensor
    """What turns a score into the logarithm of a probability, base 2: all that blocks share, less lse."""
    offset: Tensor
    """Gradient of an entry's weight beside gamma mean_v . do: the state's part, less delta."""


def fields_backward(
    problem: Problem,
    heads_here: range,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: FarField,
    calibration: Tensor,
    chosen: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    part_q: Tensor,
    far_rows: FarRows,
) -> Tensor:
    """Differentiate the local and the far field of some key heads.

    Source: the softmax gradient ds = p (dp - delta), with p and delta of the whole softmax; an entry's value is
    gamma mean_v + beta q^T F.

    Args:
        problem, heads_here, q, k, v, field, calibration, chosen: as given to `attend_fields`.
        do: gradient of o, [B, Tq, HQ, D] contiguous.
        lse, delta: of the whole softmax, natural log and sum of do * o, [B, Tq, HQ] float32.
        part_q: partial gradients of q, [heads, S * G, top_k + 1, D]; the last of each query is written.
        far_rows: where to put what the far field's other gradients need of each query.
    Returns:
        Gradients of the scalars, [heads, G, 5] float32.
    """
    config, width, rows = problem.config, q.shape[3], min(problem.tile_rows, problem.gradient_rows)
    tiles = -(-problem.stop // rows) - problem.sparse_start // rows
    sums = torch.zeros(tiles, len(heads_here), problem.group, 5, dtype=torch.float32, device=q.device)
    _fields_backward[(tiles * len(heads_here) * problem.group,)](
        q, k, v, *field, calibration, chosen, do, lse, delta, part_q, *far_rows, sums,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        k.shape[2], len(heads_here), heads_here.start, field.centred_k.shape[1], field.states.shape[1],
        tiles, problem.sparse_start, problem.q_start, problem.num_queries, *problem.score_scales, problem.scale,
        G=problem.group, B=config.block_size, UNIT=config.unit, TOP_K=config.top_k, D=width, DP=padded(width), BM=rows,
        BN=32, FAR=config.far != "drop", MOMENTS=config.far == "moments", STATE=config.state != "none",
        num_warps=8 if width > 128 else 4, num_stages=1,
    )  # fmt: skip
    return sums.sum(0)


@triton.jit(
    do_not_specialize=[
        "heads",
        "heads_here",
        "first_head",
        "num_blocks",
        "num_states",
        "num_tiles",
        "sparse_start",
        "q_start",
        "num_queries",
    ]
)
def _fields_backward(
    q, k, v, centred_k, var_k, mean_v, first_k, states, calibration, chosen, do, lse, delta,
    part_q, far_share, far_shift, far_offset, sums,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    heads, heads_here, first_head, num_blocks, num_states, num_tiles, sparse_start, q_start, num_queries,
    mean_scale, var_scale, scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    heads_all = heads_here * G
    tile = num_tiles - 1 - tl.program_id(0) // heads_all  # the longest first
    own_z, member = tl.program_id(0) % heads_all // G, tl.program_id(0) % G
    z = (first_head + own_z).to(tl.int64)
    row, head = z // heads, z % heads * G + member
    first = (sparse_start // BM + tile) * BM
    token, d = first + tl.arange(0, BM), tl.arange(0, DP)
    inside = (d < D)[None, :]
    valid = (token >= sparse_start) & (token < q_start + num_queries)
    held = valid[:, None] & inside
    query = (token - q_start).to(tl.int64)
    sparse = (token - sparse_start).to(tl.int64)
    num_sparse = q_start + num_queries - sparse_start
    at_q = q + row * qb + head * qh + query[:, None] * qt + d[None, :]
    at_o = (row * num_queries + query) * heads * G + head
    tile_q = tl.load(at_q, mask=held, other=0.0)
    at_do = do + at_o[:, None] * D + d[None, :]
    tile_do = tl.load(at_do, mask=held, other=0.0)
    top = tl.load(lse + at_o, mask=valid, other=float("inf")) * 1.4426950408889634  # other rows weigh nothing
    own_delta = tl.load(delta + at_o, mask=valid, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)

    block = first // B
    if FAR:
        wide = tile_q.to(tl.float32)
        scalars = calibration + head * 5
        mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
        square = (wide * wide * var_factor).to(var_k.dtype.element_ty)
        gamma = tl.load(scalars + 3)
        common_k = tl.load(first_k + z * D + d, mask=d < D, other=0.0)
        common = mean_factor * tl.sum(wide * common_k[None, :], 1)
        common += tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0) - top
        blocks = load_chosen(chosen + ((row * num_sparse + sparse) * heads * G + head) * TOP_K, valid, TOP_K)
        state_factor = scale * tl.load(scalars + 4)
        along = tl.zeros([BM], tl.float32)
        if STATE:
            at_state = states + (z * num_states + block) * D * D + d[:, None] * D + d[None, :]
            state = tl.load(at_state, mask=(d < D)[:, None] & inside, other=0.0)
            read = tl.dot(tile_do.to(state.dtype), tl.trans(state), input_precision="ieee")  # do F^T
            along = tl.sum(read * wide, 1)
        by_mean = tl.zeros([BM, DP], tl.float32)
        by_var = tl.zeros([BM, DP], tl.float32)
        share = tl.zeros([BM], tl.float32)
        sum_scores = tl.zeros([BM], tl.float32)
        sum_values = tl.zeros([BM], tl.float32)
        stop = block * (B // UNIT)
        for start in range(0, stop, BN):
            own_centred = load_blocks(centred_k + z * num_blocks * D, start, stop, D, DP, BN)
            own_var = load_blocks(var_k + z * num_blocks * D, start, stop, D, DP, BN) if MOMENTS else own_centred
            scores = tile_scores(tile_q, square, own_centred, own_var, mean_factor, MOMENTS)
            weights = tl.exp2(strike(scores, start, stop, blocks, TOP_K, BN) + common[:, None])
            values = load_blocks(mean_v + z * num_blocks * D, start, stop, D, DP, BN)
            dvalues = tl.dot(tile_do, values, input_precision="ieee")
            share += tl.sum(weights, 1)
            sum_values += tl.sum(weights * dvalues, 1)
            dscores = weights * (gamma * dvalues + (state_factor * along - own_delta)[:, None])
            sum_scores += tl.sum(dscores, 1)
            by_mean = tl.dot(dscores.to(own_centred.dtype), tl.trans(own_centred), by_mean, input_precision="ieee")
            if MOMENTS:
                by_var = tl.dot(dscores.to(own_var.dtype), tl.trans(own_var), by_var, input_precision="ieee")
        by_mean += sum_scores[:, None] * common_k[None, :]
        again = tl.load(at_q, mask=held, other=0.0, cache_modifier=".cg").to(tl.float32)
        dq = by_mean * (scale * tl.load(scalars + 1)) + again * by_var * (scale * scale * tl.load(scalars + 2))
        to = sums + ((tile * heads_here + own_z) * G + member) * 5
        tl.store(to, tl.sum(sum_scores, 0))
        tl.store(to + 1, scale * tl.sum(tl.sum(by_mean * again, 1), 0))
        tl.store(to + 2, scale * scale / 2 * tl.sum(tl.sum(by_var * again * again, 1), 0))
        tl.store(to + 3, tl.sum(sum_values, 0))
        tl.store(to + 4, scale * tl.sum(share * along, 0))
        tl.store(far_share + at_o, share, mask=valid)
        tl.store(far_shift + at_o, common, mask=valid)
        tl.store(far_offset + at_o, state_factor * along - own_delta, mask=valid)
        if STATE:  # again: nothing of this is held in registers through the loop above
            state = tl.load(at_state, mask=(d < D)[:, None] & inside, other=0.0, cache_modifier=".cg")
            do_again = tl.load(at_do, mask=held, other=0.0, cache_modifier=".cg").to(tl.float32)
            weighted = (do_again * (state_factor * share)[:, None]).to(state.dtype)
            dq = tl.dot(weighted, tl.trans(state), dq, input_precision="ieee")

    KEYS: tl.constexpr = BM if BM < 64 else 64
    for start in range(block * B, first + BM, KEYS):
        key = start + tl.arange(0, KEYS)
        real = (key < q_start + num_queries)[:, None] & inside
        far_key = key.to(tl.int64)[:, None]
        own_k = tl.load(k + row * kb + z % heads * kh + far_key * kt + d[None, :], mask=real, other=0.0)
        own_v = tl.load(v + row * vb + z % heads * vh + far_key * vt + d[None, :], mask=real, other=0.0)
        scores = tl.dot(tile_q, tl.trans(own_k), input_precision="ieee") * mean_scale - top[:, None]
        weights = tl.where(key[None, :] <= token[:, None], tl.exp2(scores), 0.0)
        dweights = tl.dot(tile_do, tl.trans(own_v), input_precision="ieee")
        dscores = weights * (dweights - own_delta[:, None]) * scale
        dq = tl.dot(dscores.to(own_k.dtype), own_k, dq, input_precision="ieee")

    part = (own_z.to(tl.int64) * num_sparse * G + sparse * G + member) * (TOP_K + 1) + TOP_K
    tl.store(part_q + part[:, None] * D + d[None, :], dq.to(part_q.dtype.element_ty), mask=held)
