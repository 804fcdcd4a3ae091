"""The far field: every past block that a query does not read, as one entry of a softmax."""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.routing import load_blocks, score_factors, tile_scores
from bsbr.ops.triton.summaries import FarField, padded


def attend_far(
    problem: Problem,
    heads_here: range,
    q: Tensor,
    field: FarField,
    calibration: Tensor,
    chosen: Tensor,
    part_o: Tensor,
    part_lse: Tensor,
) -> None:
    """Attend to the far field for the sparse queries of some key heads.

    Block scores are computed again, tile by tile, with the chosen blocks struck out; one product reads the states.

    Args:
        problem: sizes.
        heads_here: key heads, counted over rows and key heads.
        q: [B, Tq, HQ, D].
        field: summaries.
        calibration: [HQ, 5] float32.
        chosen: [B, S, HQ, top_k] int32.
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts].
            This is the last part of each query.
    """
    config, width, rows = problem.config, q.shape[3], problem.tile_rows
    _attend_far[(problem.num_tiles * len(heads_here) * problem.group,)](
        q, *field, calibration, chosen, part_o, part_lse,
        *q.stride()[:3], q.shape[2] // problem.group, len(heads_here), heads_here.start,
        field.centred_k.shape[1], field.states.shape[1],
        problem.num_tiles, problem.sparse_start, problem.q_start, problem.num_queries, *problem.score_scales,
        problem.scale,
        G=problem.group, B=config.block_size, UNIT=config.unit, TOP_K=config.top_k, D=width, DP=padded(width), BM=rows,
        BN=64 if problem.most_rows >= 64 and width <= 128 else 32, MOMENTS=config.far == "moments",
        STATE=config.state != "none", num_warps=8 if rows >= 128 else 4, num_stages=1,
    )  # fmt: skip


@triton.jit
def load_chosen(chosen, valid, TOP_K: tl.constexpr):
    """The chosen blocks of a tile of queries, as a tuple."""
    blocks = ()
    for j in tl.static_range(TOP_K):
        blocks += (tl.load(chosen + j, mask=valid, other=-1),)
    return blocks


@triton.jit
def strike(scores, from_block, stop, blocks, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Scores with -inf from `stop` on and where a query reads the block exactly; one bit a block, BN is 32 or 64."""
    column = tl.arange(0, BN)
    left = stop - from_block
    if TOP_K == 0:
        scores = tl.where((column < left)[None, :], scores, float("-inf"))
    else:
        low = tl.zeros_like(blocks[0]) + tl.where(left < 32, -1 << (tl.maximum(left, 0) & 31), 0)
        high = tl.zeros_like(low) + tl.where(left < 64, -1 << (tl.maximum(left - 32, 0) & 31), 0)
        for j in tl.static_range(TOP_K):
            offset = blocks[j] - from_block
            bit = 1 << (offset & 31)
            low |= tl.where(offset >> 5 == 0, bit, 0)
            if BN > 32:
                high |= tl.where(offset >> 5 == 1, bit, 0)
        read = low[:, None]
        if BN > 32:
            read = tl.where((column < 32)[None, :], read, high[:, None])
        scores = tl.where((read & (1 << (column & 31))[None, :]) == 0, scores, float("-inf"))
    return scores


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
def _attend_far(
    q, centred_k, var_k, mean_v, first_k, states, calibration, chosen, part_o, part_lse,
    qb, qt, qh, heads, heads_here, first_head, num_blocks, num_states, num_tiles, sparse_start, q_start, num_queries,
    mean_scale, var_scale, scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
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
    query = (token - q_start).to(tl.int64)
    sparse = (token - sparse_start).to(tl.int64)
    num_sparse = q_start + num_queries - sparse_start
    own = q + row * qb + head * qh + query[:, None] * qt + d[None, :]
    tile_q = tl.load(own, mask=valid[:, None] & inside, other=0.0)
    top = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)

    block = first // B
    wide = tile_q.to(tl.float32)
    scalars = calibration + head * 5
    mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
    square = (wide * wide * var_factor).to(var_k.dtype.element_ty)
    common = mean_factor * tl.sum(wide * tl.load(first_k + z * D + d, mask=d < D, other=0.0)[None, :], 1)
    common += tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0)
    blocks = load_chosen(chosen + ((row * num_sparse + sparse) * heads * G + head) * TOP_K, valid, TOP_K)
    stop = block * (B // UNIT)
    for start in range(0, stop, BN):
        own_centred = load_blocks(centred_k + z * num_blocks * D, start, stop, D, DP, BN)
        own_var = load_blocks(var_k + z * num_blocks * D, start, stop, D, DP, BN) if MOMENTS else own_centred
        scores = tile_scores(tile_q, square, own_centred, own_var, mean_factor, MOMENTS)
        scores = strike(scores, start, stop, blocks, TOP_K, BN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        n = start + tl.arange(0, BN)
        values = tl.load(
            mean_v + z * num_blocks * D + n[:, None] * D + d[None, :], mask=(n < stop)[:, None] & inside, other=0.0
        )
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    top += common
    acc *= tl.load(scalars + 3)
    if STATE:
        state = tl.load(
            states + (z * num_states + block) * D * D + d[:, None] * D + d[None, :],
            mask=(d < D)[:, None] & inside, other=0.0,
        )  # fmt: skip
        # read again, so that no registers hold it through the loop above
        again = tl.load(own, mask=valid[:, None] & inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        weighted = (again * (total * (scale * tl.load(scalars + 4)))[:, None]).to(state.dtype)
        acc = tl.dot(weighted, state, acc, input_precision="ieee")

    part = (own_z.to(tl.int64) * num_sparse * G + sparse * G + member) * (TOP_K + 2) + TOP_K + 1
    tl.store(part_lse + part, top + tl.log2(total), mask=valid)
    acc = (acc / tl.maximum(total, 1e-38)[:, None]).to(part_o.dtype.element_ty)
    tl.store(part_o + part[:, None] * D + d[None, :], acc, mask=valid[:, None] & inside)
