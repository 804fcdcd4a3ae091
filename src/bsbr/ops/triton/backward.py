"""The backward pass: which kernels run, in which order, on which workspace."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.dense import prefix_backward
from bsbr.ops.triton.fields_backward import FarRows, fields_backward
from bsbr.ops.triton.local_backward import local_backward
from bsbr.ops.triton.pairs import sort_pairs
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.retrieved_backward import pairs_backward
from bsbr.ops.triton.summaries import block_moments, far_field, padded
from bsbr.ops.triton.summaries_backward import moments_backward, summaries_backward


def backward(
    problem: Problem,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of all inputs.

    1. The queries before `sparse_start` by PyTorch's own kernel.
    2. The local field's dk and dv; then all key heads that the workspace allows at a time: the retrieved field, local
       and far field, and the sum of the parts of dq.
    3. The far field's gradients of the summaries, and from there to keys and values.

    Args:
        problem: sizes.
        do: gradient of o.
        q, k, v, calibration, o, lse, chosen: what `forward` was given and gave.
    Returns:
        Gradients of q, k, v and calibration.
    """
    config, heads, width, dense = problem.config, k.shape[0] * k.shape[2], q.shape[3], problem.num_dense
    dcalibration = torch.zeros_like(calibration)
    do = do.contiguous()
    if not problem.num_sparse:
        dq, dk, dv = prefix_backward(do, q, k, v, o, lse, problem.scale)
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), dcalibration
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    prefix_k, prefix_v = k[:, :0], v[:, :0]
    if dense:
        own_do, own_q, own_k, own_v, own_o, own_lse = (x[:, :dense] for x in (do, q, k, v, o, lse))
        dq[:, :dense], prefix_k, prefix_v = prefix_backward(
            own_do, own_q, own_k, own_v, own_o, own_lse, problem.scale
        )  # fmt: skip
    delta = _row_products(do, o)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    local_backward(problem, q, k, v, do, lse, delta, (prefix_k, prefix_v), dk, dv)
    summaries = block_moments(k, v, config.unit, problem.num_blocks, config.state != "none")
    field = far_field(summaries, problem.per_block, q.dtype)
    far_rows = FarRows(*(torch.empty_like(lse) for _ in range(3)))
    at_once = problem.heads_at_once(heads, width * q.element_size())
    part_q = q.new_empty(at_once, problem.num_sparse * problem.group, config.top_k + 1, width)
    for first in range(0, heads, at_once):
        here = range(first, min(heads, first + at_once))
        if problem.gaps:
            part_q.zero_()  # parts that nothing is written to
        if config.top_k:
            pairs = sort_pairs(chosen, problem.group, here, problem.num_blocks, rows=1024)
            pairs_backward(problem, pairs, first, q, k, v, do, lse, delta, part_q, dk, dv)
        scalars = fields_backward(
            problem, here, q, k, v, field, calibration, chosen, do, lse, delta, part_q, far_rows
        )  # fmt: skip
        key_heads = torch.arange(first, here.stop, device=q.device) % k.shape[2]
        dcalibration.view(k.shape[2], problem.group, 5).index_add_(0, key_heads, scalars)
        _sum_parts(problem, here, part_q, dq)
    if config.far == "drop":
        return dq, dk.to(k.dtype), dv.to(v.dtype), dcalibration
    gradients = summaries_backward(problem, q, field, calibration, chosen, do, far_rows)
    return dq, *moments_backward(config.unit, k, v, summaries, gradients, dk, dv), dcalibration


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y over the last axis, in float32 and without a float32 copy; both contiguous."""
    sums = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    rows = 32
    _multiply[(triton.cdiv(sums.numel(), rows),)](
        x, y, sums, sums.numel(), D=x.shape[3], DP=padded(x.shape[3]), ROWS=rows
    )
    return sums


def _sum_parts(problem: Problem, heads_here: range, part_q: Tensor, dq: Tensor) -> None:
    """Add up the parts of dq."""
    rows, width, num_queries = 8, part_q.shape[3], problem.num_sparse * problem.group
    _add[(triton.cdiv(num_queries, rows), len(heads_here))](
        part_q, dq, num_queries, problem.num_queries, problem.num_dense, heads_here.start,
        dq.shape[2] // problem.group, G=problem.group, PARTS=part_q.shape[2], D=width, DP=padded(width), ROWS=rows,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(x, y, sums, num_rows, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    held = (row < num_rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    left, right = tl.load(x + at, mask=held, other=0.0), tl.load(y + at, mask=held, other=0.0)
    tl.store(sums + row, tl.sum(left.to(tl.float32) * right.to(tl.float32), 1), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows", "num_queries", "first_query", "first_head", "heads"])
def _add(
    parts, out, num_rows, num_queries, first_query, first_head, heads,
    G: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    held = (row < num_rows)[:, None] & (d < D)[None, :]
    part = (tl.program_id(1).to(tl.int64) * num_rows + row) * PARTS
    total = tl.zeros([ROWS, DP], tl.float32)
    for j in range(PARTS):
        total += tl.load(parts + (part + j)[:, None] * D + d[None, :], mask=held, other=0.0).to(tl.float32)
    z = (first_head + tl.program_id(1)).to(tl.int64)
    to = (z // heads * num_queries + first_query + row // G) * (heads * G) + z % heads * G + row % G
    tl.store(out + to[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=held)
