"""The forward pass: which kernels run, in which order, on which workspace."""

import torch
from torch import Tensor

from bsbr.ops.triton.dense import attend_prefix
from bsbr.ops.triton.merge import merge_parts
from bsbr.ops.triton.pairs import sort_pairs
from bsbr.ops.triton.past import attend_past
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.retrieved import attend_pairs
from bsbr.ops.triton.summaries import block_moments, far_field


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    block_indices: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output of all queries.

    1. Queries before `sparse_start` attend to their whole past by PyTorch's own kernel.
    2. Summaries, then all key heads that the workspace allows at a time: the choice of blocks with far and local field,
       pairs sorted by block, partial results pair by pair, and the merge.

    Args:
        problem: sizes.
        q: [B, Tq, HQ, D]; k, v: [B, T, H, D].
        calibration: [HQ, 5] float32.
        block_indices: the selection to use, [B, Tq, HQ, top_k], or None.
        counts: blocks that a query of each key head reads, [H] int64, where these differ.
    Returns:
        o [B, Tq, HQ, D]; lse [B, Tq, HQ] float32; chosen blocks of the sparse queries [B, S, HQ, top_k] int32.
    """
    config, (batch, _, num_heads, width) = problem.config, q.shape
    dense = problem.num_dense
    if not problem.num_sparse:
        o, lse = attend_prefix(q, k, v, problem.scale)
        return o.contiguous(), lse.contiguous(), torch.empty(batch, 0, num_heads, 0, dtype=torch.int32, device=q.device)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if dense:
        o[:, :dense], lse[:, :dense] = attend_prefix(q[:, :dense], k[:, :dense], v[:, :dense], problem.scale)
    given = block_indices is not None
    if block_indices is None:
        chosen = torch.empty(batch, problem.num_sparse, num_heads, config.top_k, dtype=torch.int32, device=q.device)
    else:
        chosen = block_indices[:, dense:].int().contiguous()
    summaries = block_moments(k, v, config.unit, problem.num_blocks, config.state != "none")
    field = far_field(summaries, problem.per_block, q.dtype)
    del summaries
    heads = batch * k.shape[2]
    at_once, parts = problem.heads_at_once(heads, width * q.element_size()), problem.parts
    part_o = q.new_empty(at_once, problem.num_sparse * problem.group, parts, width)
    part_lse = lse.new_empty(part_o.shape[:3])
    for first in range(0, heads, at_once):
        here = range(first, min(heads, first + at_once))
        if problem.gaps:
            part_lse.fill_(-torch.inf)  # parts that nothing is written to
        attend_past(problem, here, (q, k, v), field, calibration, chosen, given, counts, part_o, part_lse)
        if config.top_k:
            pairs = sort_pairs(chosen, problem.group, here, problem.num_blocks, rows=1024)
            attend_pairs(problem, pairs, first, q, k, v, part_o, part_lse)
        merge_parts(problem, here, part_o, part_lse, o, lse)
    return o, lse, chosen
