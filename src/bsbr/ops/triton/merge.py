"""Joining the partial results of a query into one softmax."""

import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.summaries import padded


def merge_parts(problem: Problem, heads_here: range, part_o: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
    """Join the parts of the sparse queries of some key heads, always in the same order.

    Args:
        problem: sizes.
        heads_here: key heads, counted over rows and key heads.
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts]. Where
            heads read different numbers of blocks, parts of -inf are none, and their outputs were not written.
        o: where to put the output, [B, Tq, HQ, D]; lse: natural log-sum-exp, [B, Tq, HQ] float32.
    """
    rows, width, num_queries = 8, part_o.shape[3], problem.num_sparse * problem.group
    _merge[(triton.cdiv(num_queries, rows), len(heads_here))](
        part_o, part_lse, o, lse, num_queries, problem.num_queries, problem.num_dense, heads_here.start,
        o.shape[2] // problem.group, G=problem.group, PARTS=part_o.shape[2], GAPS=problem.gaps,
        D=width, DP=padded(width), ROWS=rows, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_queries", "first_query", "first_head", "heads"])
def _merge(
    part_o, part_lse, o, lse, num_rows, num_queries, first_query, first_head, heads,
    G: tl.constexpr, PARTS: tl.constexpr, GAPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    held, inside = row < num_rows, (d < D)[None, :]
    part = (tl.program_id(1).to(tl.int64) * num_rows + row) * PARTS
    top = tl.full([ROWS], -1e38, tl.float32)
    for j in range(PARTS):
        top = tl.maximum(top, tl.load(part_lse + part + j, mask=held, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for j in range(PARTS):
        weight = tl.exp2(tl.load(part_lse + part + j, mask=held, other=0.0) - top)
        there = held & (weight != 0) if GAPS else held
        value = tl.load(part_o + (part + j)[:, None] * D + d[None, :], mask=there[:, None] & inside, other=0.0)
        total += weight
        acc += weight[:, None] * value.to(tl.float32)
    z = (first_head + tl.program_id(1)).to(tl.int64)
    to = (z // heads * num_queries + first_query + row // G) * (heads * G) + z % heads * G + row % G
    acc = (acc / total[:, None]).to(o.dtype.element_ty)
    tl.store(o + to[:, None] * D + d[None, :], acc, mask=held[:, None] & inside)
    tl.store(lse + to, (top + tl.log2(total)) * 0.6931471805599453, mask=held)
