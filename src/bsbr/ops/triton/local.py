"""The local field: exact causal attention of each query inside its own block."""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.summaries import padded


def attend_local(
    problem: Problem, heads_here: range, q: Tensor, k: Tensor, v: Tensor, part_o: Tensor, part_lse: Tensor
) -> None:
    """Attend to the own block for the sparse queries of some key heads.

    Args:
        problem: sizes.
        heads_here: key heads, counted over rows and key heads.
        q, k, v: of all heads, [B, T, H, D].
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts].
            This is part `top_k` of each query.
    """
    width, rows = q.shape[3], problem.tile_rows
    _attend_local[(problem.num_tiles * len(heads_here) * problem.group,)](
        q, k, v, part_o, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        k.shape[2], len(heads_here), heads_here.start, problem.sparse_start, problem.q_start, problem.num_queries,
        problem.score_scales[0], PARTS=part_o.shape[2], G=problem.group, B=problem.config.block_size,
        TOP_K=problem.config.top_k, D=width, DP=padded(width), BM=rows, KEYS=min(rows, 64),
        num_warps=8 if rows >= 128 else 4, num_stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "heads_here", "first_head", "sparse_start", "q_start", "num_queries"])
def _attend_local(
    q, k, v, part_o, part_lse, qb, qt, qh, kb, kt, kh, vb, vt, vh,
    heads, heads_here, first_head, sparse_start, q_start, num_queries, score_scale,
    PARTS: tl.constexpr, G: tl.constexpr, B: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    heads_all = heads_here * G
    tile = tl.program_id(0) // heads_all
    own_z, member = tl.program_id(0) % heads_all // G, tl.program_id(0) % G
    z = (first_head + own_z).to(tl.int64)
    row, head = z // heads, z % heads * G + member
    first = (sparse_start // BM + tile) * BM
    token, d = first + tl.arange(0, BM), tl.arange(0, DP)
    inside = (d < D)[None, :]
    valid = (token >= sparse_start) & (token < q_start + num_queries)
    own = q + row * qb + head * qh + (token - q_start).to(tl.int64)[:, None] * qt + d[None, :]
    tile_q = tl.load(own, mask=valid[:, None] & inside, other=0.0)
    top = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for start in range(first // B * B, first + BM, KEYS):
        key = start + tl.arange(0, KEYS)
        held = (key < q_start + num_queries)[:, None] & inside
        far_key = key.to(tl.int64)[:, None]
        own_k = tl.load(k + row * kb + z % heads * kh + far_key * kt + d[None, :], mask=held, other=0.0)
        own_v = tl.load(v + row * vb + z % heads * vh + far_key * vt + d[None, :], mask=held, other=0.0)
        scores = tl.dot(tile_q, tl.trans(own_k), input_precision="ieee") * score_scale
        scores = tl.where(key[None, :] <= token[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(own_v.dtype), own_v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    num_sparse = q_start + num_queries - sparse_start
    sparse = (token - sparse_start).to(tl.int64)
    part = (own_z.to(tl.int64) * num_sparse * G + sparse * G + member) * PARTS + TOP_K
    tl.store(part_lse + part, top + tl.log2(total), mask=valid)
    acc = (acc / total[:, None]).to(part_o.dtype.element_ty)
    tl.store(part_o + part[:, None] * D + d[None, :], acc, mask=valid[:, None] & inside)
