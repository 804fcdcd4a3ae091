"""Kernels for what is kept of a past block, and for the running mean of the first-order states."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.summaries import Summaries


class FarField(NamedTuple):
    """What routing and the far field read, in the dtypes of their products."""

    centred_k: Tensor
    """Mean keys less that of block 0, which leaves 16-bit products their digits, [Z, N, D]."""
    var_k: Tensor
    """Key variances, [Z, N, D], bfloat16 for 16-bit input: squares may not fit in float16."""
    mean_v: Tensor
    """[Z, N, D]."""
    first_k: Tensor
    """Mean key of block 0, [Z, D] float32."""
    states: Tensor
    """What each local block reads of the states, [Z, C, D, D]; without states [Z, 0, D, D]."""


def far_field(summaries: Summaries, per_block: int, dtype: torch.dtype) -> FarField:
    """Prepare summaries for tensor cores.

    Args:
        summaries: from `block_moments`, of at least one block.
        per_block: retrieval blocks in a local block.
        dtype: of the queries.
    Returns:
        The far field.
    """
    mean_k, var_k, mean_v, states = summaries
    centred_k = mean_k - mean_k[:, :1]
    read = running_states(states, per_block) if states.shape[1] else states
    return FarField(centred_k.to(dtype), var_k.to(states.dtype), mean_v.to(dtype), mean_k[:, 0].contiguous(), read)


def block_moments(k: Tensor, v: Tensor, unit: int, num_blocks: int, with_states: bool) -> Summaries:
    """Summarise the first `num_blocks` blocks of `unit` keys.

    Source: `bsbr.ops.summaries.summarize`; the products of the states run on tensor cores in the dtype of k.

    Args:
        k, v: keys and values, [B, T, H, D].
        unit: keys of a block, a power of two of at least 16.
        num_blocks: blocks to summarise.
        with_states: compute first-order states too; they are empty otherwise.
    Returns:
        Means and variances in float32, [Z, N, D]; states [Z, N, D, D] in bfloat16 for 16-bit input.
    """
    batch, _, heads, width = k.shape
    mean_k, var_k, mean_v = (
        torch.empty(batch * heads, num_blocks, width, dtype=torch.float32, device=k.device) for _ in range(3)
    )
    states = torch.empty(
        batch * heads, num_blocks if with_states else 0, width, width, dtype=state_dtype(k), device=k.device
    )
    if num_blocks:
        _moments[(num_blocks, batch * heads)](
            k, v, mean_k, var_k, mean_v, states, *k.stride()[:3], *v.stride()[:3], heads, num_blocks,
            UNIT=unit, D=width, DP=padded(width), STATES=with_states, num_warps=8 if width > 64 else 4,
        )  # fmt: skip
    return Summaries(mean_k, var_k, mean_v, states)


def running_states(states: Tensor, per_block: int) -> Tensor:
    """Compute what the queries of each local block read of the states: their mean over past blocks.

    Args:
        states: [Z, N, D, D].
        per_block: retrieval blocks in a local block; divides N.
    Returns:
        [Z, N / per_block + 1, D, D] in the dtype of states; the first local block reads zeros.
    """
    heads, num_blocks, width, _ = states.shape
    read = states.new_empty(heads, num_blocks // per_block + 1, width, width)
    elements, tile = width * width, 64
    _running_mean[(triton.cdiv(elements, tile), heads)](
        states, read, num_blocks, elements, PER_BLOCK=per_block, ROWS=32, TILE=tile, num_warps=4
    )
    return read


def state_dtype(k: Tensor) -> torch.dtype:
    """The dtype of states: bfloat16 for 16-bit keys, whose products may not fit in float16."""
    return torch.float32 if k.dtype == torch.float32 else torch.bfloat16


def padded(width: int) -> int:
    """Head width rounded up to what a kernel's tile can have."""
    return max(16, triton.next_power_of_2(width))


@triton.jit(do_not_specialize=["heads", "num_blocks"])
def _moments(
    k, v, mean_k, var_k, mean_v, states, kb, kt, kh, vb, vt, vh, heads, num_blocks,
    UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    block, z = tl.program_id(0), tl.program_id(1)
    token = (block * UNIT + tl.arange(0, UNIT)).to(tl.int64)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    row, head = (z // heads).to(tl.int64), z % heads
    own_k = tl.load(k + row * kb + head * kh + token[:, None] * kt + d[None, :], mask=inside, other=0.0)
    own_v = tl.load(v + row * vb + head * vh + token[:, None] * vt + d[None, :], mask=inside, other=0.0)
    wide_k, wide_v = own_k.to(tl.float32), own_v.to(tl.float32)
    mu, vbar = tl.sum(wide_k, 0) / UNIT, tl.sum(wide_v, 0) / UNIT
    centred = wide_k - mu[None, :]
    out = (z * num_blocks + block).to(tl.int64) * D + d
    tl.store(mean_k + out, mu, mask=d < D)
    tl.store(var_k + out, tl.sum(centred * centred, 0) / UNIT, mask=d < D)
    tl.store(mean_v + out, vbar, mask=d < D)
    if STATES:
        element = states.dtype.element_ty
        left, right = centred.to(element), (wide_v - vbar[None, :]).to(element)
        state = tl.dot(tl.trans(left), right, input_precision="ieee") / UNIT
        to = states + (z * num_blocks + block).to(tl.int64) * D * D + d[:, None] * D + d[None, :]
        tl.store(to, state.to(element), mask=inside & (d < D)[:, None])


@triton.jit(do_not_specialize=["num_blocks"])
def _running_mean(
    states, read, num_blocks, elements, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    z = tl.program_id(1).to(tl.int64)
    inside = element < elements
    into = read + z * (num_blocks // PER_BLOCK + 1) * elements
    tl.store(into + element, tl.zeros([TILE], read.dtype.element_ty), mask=inside)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, num_blocks, ROWS):
        n = start + tl.arange(0, ROWS)
        held = (n < num_blocks)[:, None] & inside[None, :]
        part = tl.load(states + (z * num_blocks + n[:, None]) * elements + element[None, :], mask=held, other=0.0)
        part = part.to(tl.float32)
        mean = (total[None, :] + tl.cumsum(part, 0)) / (n + 1)[:, None]
        last = ((n + 1) % PER_BLOCK == 0)[:, None]  # of its local block: the next one reads the mean up to here
        to = into + ((n + 1) // PER_BLOCK).to(tl.int64)[:, None] * elements + element[None, :]
        tl.store(to, mean.to(read.dtype.element_ty), mask=held & last)
        total += tl.sum(part, 0)
