"""Gradients of the keys and values that their own block's queries read."""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.summaries import padded


def local_backward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    prefix: tuple[Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write the local field's gradients of all keys and values, and to them add those of the dense prefix.

    Args:
        problem, q, k, v: as given to `attend_fields`.
        do, lse, delta: as given to `fields_backward`.
        prefix: gradients of keys and values through the dense queries, [B, P, H, D] each, P of them.
        dk, dv: where to put the gradients, [B, T, H, D] float32 contiguous.
    """
    rows, width = min(problem.tile_rows, problem.gradient_rows), q.shape[3]
    prefix_k, prefix_v = (x.contiguous() for x in prefix)
    _local_backward[(triton.cdiv(k.shape[1], rows), k.shape[0] * k.shape[2])](
        q, k, v, do, lse, delta, prefix_k, prefix_v, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        k.shape[2], k.shape[1], problem.num_dense,
        problem.sparse_start, problem.q_start, problem.num_queries, problem.score_scales[0], problem.scale,
        G=problem.group, B=problem.config.block_size, D=width, DP=padded(width), BM=rows,
        num_warps=8 if width > 64 else 4, num_stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "num_keys", "num_dense", "sparse_start", "q_start", "num_queries"])
def _local_backward(
    q, k, v, do, lse, delta, prefix_k, prefix_v, dk, dv, qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, num_keys, num_dense,
    sparse_start, q_start, num_queries, score_scale, scale,
    G: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BM
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    key, d = first + tl.arange(0, BM), tl.arange(0, DP)
    inside = (d < D)[None, :]
    real = (key < num_keys)[:, None] & inside
    far_key = key.to(tl.int64)[:, None]
    own_k = tl.load(k + row * kb + head * kh + far_key * kt + d[None, :], mask=real, other=0.0)
    own_v = tl.load(v + row * vb + head * vh + far_key * vt + d[None, :], mask=real, other=0.0)
    sum_k = tl.zeros([BM, DP], tl.float32)
    sum_v = tl.zeros([BM, DP], tl.float32)
    end = first // B * B + B
    steps = tl.where(end > sparse_start, end - first, 0) // BM  # tiles of queries from this one to the end of the block
    for step in range(0, steps * G):
        token = first + step // G * BM + tl.arange(0, BM)
        member = head * G + step % G
        valid = (token >= sparse_start) & (token < q_start + num_queries)
        held = valid[:, None] & inside
        query = (token - q_start).to(tl.int64)
        at_o = (row * num_queries + query) * heads * G + member
        own_q = tl.load(q + row * qb + member * qh + query[:, None] * qt + d[None, :], mask=held, other=0.0)
        own_do = tl.load(do + at_o[:, None] * D + d[None, :], mask=held, other=0.0)
        top = tl.load(lse + at_o, mask=valid, other=float("inf")) * 1.4426950408889634  # other rows weigh nothing
        scores = tl.dot(own_q, tl.trans(own_k), input_precision="ieee") * score_scale - top[:, None]
        weights = tl.where(key[None, :] <= token[:, None], tl.exp2(scores), 0.0)
        dweights = tl.dot(own_do, tl.trans(own_v), input_precision="ieee")
        own_delta = tl.load(delta + at_o, mask=valid, other=0.0)
        dscores = (weights * (dweights - own_delta[:, None])).to(own_q.dtype)
        sum_v = tl.dot(tl.trans(weights.to(own_do.dtype)), own_do, sum_v, input_precision="ieee")
        sum_k = tl.dot(tl.trans(dscores), own_q, sum_k, input_precision="ieee")
    sum_k *= scale
    if first < num_dense:
        early = (key < num_dense)[:, None] & inside
        from_prefix = ((row * num_dense + far_key) * heads + head) * D + d[None, :]
        sum_k += tl.load(prefix_k + from_prefix, mask=early, other=0.0).to(tl.float32)
        sum_v += tl.load(prefix_v + from_prefix, mask=early, other=0.0).to(tl.float32)
    into = ((row * num_keys + far_key) * heads + head) * D + d[None, :]
    tl.store(dk + into, sum_k, mask=real)
    tl.store(dv + into, sum_v, mask=real)
