"""Which blocks each backend chooses, and which choices are right."""

import math

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.chunked import _forward
from bsbr.ops.groups import cut_heads
from bsbr.ops.native.forward import native_forward
from bsbr.ops.schedule import Plan, dense_until
from bsbr.ops.tiles import NO_DROPOUT

ROUNDING = {"reference": 2.0**-52, "chunked": 2.0**-23, "native": 2.0**-23, "triton": 2.0**-14}
"""Relative rounding of a backend's block scores in float32; kernels give up to 9 bits to the block's number."""


def choices(
    backend: str, q: Tensor, k: Tensor, v: Tensor, config: BSBRConfig, calibration: Tensor, q_start: int = 0
) -> Tensor:
    """Blocks that a backend reads for its sparse queries, ascending, [B, S, HQ, top_k]; -1, first, where a head of a
    call of kernels reads fewer."""
    scale, wide = q.shape[-1] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    plan = Plan(config, scale, q_start, q.shape[1], NO_DROPOUT)
    with torch.no_grad():
        if backend == "chunked":
            parts = _forward(plan, None, q, k, v, calibration.to(wide))[2]
            found = torch.empty(
                q.shape[0], k.shape[2], q.shape[2] // k.shape[2], *parts[0].shape[2:], dtype=torch.int64
            )
            for (rows, heads), part in zip(cut_heads(q, k), parts, strict=True):
                found[rows, heads] = part.unflatten(0, (-1, heads.stop - heads.start))[:, : k.shape[2]]
            found = found.flatten(1, 2)
        elif backend == "native":
            found = native_forward(plan, q, k, v, calibration.float(), None)[2]
        else:
            from bsbr.ops.triton.forward import forward
            from bsbr.ops.triton.problem import make_problem

            problem = make_problem(q, k, config, scale, q_start)
            numbers = config.top_k_per_head
            counts = None if numbers is None else torch.tensor(numbers, device=q.device)
            return forward(problem, q, k, v, calibration.float(), None, counts)[2].long().sort(-1).values
    return found.permute(0, 3, 1, 2).sort(-1).values


def masses(q: Tensor, k: Tensor, config: BSBRConfig, calibration: Tensor, q_start: int = 0) -> tuple[Tensor, Tensor]:
    """Log-mass of each block for each sparse query in float64, -inf where it is not past; and the sum of the absolute
    values of its terms. [B, S, HQ, N]"""
    unit, group = config.unit, q.shape[2] // k.shape[2]
    count, dense = k.shape[1] // unit, max(0, dense_until(config) - q_start)
    q = q[:, dense:].double() * q.shape[-1] ** -0.5
    blocks = k[:, : count * unit].double().unflatten(1, (count, unit)).repeat_interleave(group, 3)  # [B, N, u, HQ, D]
    mean, scalars = blocks.mean(2), calibration.double()
    bias, sigma, lam = (scalars[:, i, None] for i in range(3))
    mass = math.log(unit) + bias + sigma * torch.einsum("bshd,bnhd->bshn", q, mean)
    size = math.log(unit) + bias.abs() + sigma.abs() * torch.einsum("bshd,bnhd->bshn", q.abs(), blocks.abs().mean(2))
    if config.far == "moments":
        var = (blocks - mean[:, :, None]).square().mean(2)
        square = torch.einsum("bshd,bnhd->bshn", q * q, var) / 2
        mass, size = mass + lam * square, size + lam.abs() * square
    own = q_start + dense + torch.arange(q.shape[1])
    past = torch.arange(count) < (own // config.block_size * (config.block_size // unit))[:, None]
    return mass.masked_fill(~past[:, None], -math.inf), size


def wrong_choices(found: Tensor, mass: Tensor, size: Tensor, top_k: int, rounding: float) -> tuple[int, int]:
    """Count queries whose choice is wrong, and those where it is another one that rounding explains.

    A choice is right if it is the one of largest mass, ties to the lower index. Another one is explained if no block it
    left out is better than one it took by more than rounding of their scores.
    """
    if not top_k or not found.numel():
        return 0, 0
    order = mass.sort(dim=-1, descending=True, stable=True).indices[..., :top_k].sort(-1).values
    differs = (order != found).any(-1)
    if not differs.any():
        return 0, 0
    taken = torch.zeros(mass.shape, dtype=torch.bool).scatter(-1, found.clamp(0, mass.shape[-1] - 1), True)
    error = 8 * rounding * (1 + size)
    worst = (mass + error).masked_fill(~taken, math.inf).amin(-1)
    best = (mass - error).masked_fill(taken, -math.inf).amax(-1)
    valid = (found >= 0).all(-1) & (found < mass.shape[-1]).all(-1) & (taken.sum(-1) == top_k)
    explained = differs & valid & (best <= worst)
    return int((differs & ~explained).sum()), int(explained.sum())


def later_copies(found: Tensor, which: Tensor) -> int:
    """Count queries that take a block but not an earlier copy of it, whose score is the same number.

    Args:
        found: choices, [B, S, HQ, top_k].
        which: the kind of each block, [N]; blocks of one kind hold the same keys.
    """
    taken = torch.zeros(*found.shape[:-1], len(which), dtype=torch.bool).scatter(-1, found, True)
    wrong = torch.zeros(found.shape[:-1], dtype=torch.bool)
    for kind in which.unique():
        of_kind = taken[..., which == kind]
        wrong |= (of_kind[..., 1:] & ~of_kind[..., :-1]).any(-1)
    return int(wrong.sum())


def exact_scores(q: Tensor, k: Tensor, config: BSBRConfig) -> Tensor:
    """Scores of blocks as integers, for integer queries and keys of a width that is a power of four, uncalibrated.

    They are in the order of the log-masses, and equal where these are: [B, S, HQ, N], past blocks only, others lowest.
    """
    unit, group, inverse = config.unit, q.shape[2] // k.shape[2], math.isqrt(q.shape[-1])
    count = k.shape[1] // unit
    q = q[:, dense_until(config) :].long()
    blocks = k[:, : count * unit].long().unflatten(1, (count, unit)).repeat_interleave(group, 3)
    total = blocks.sum(2)
    score = 2 * unit * inverse * _products(q, total)
    if config.far == "moments":
        score = score + _products(q * q, unit * blocks.square().sum(2) - total.square())
    own = dense_until(config) + torch.arange(q.shape[1])
    past = torch.arange(count) < (own // config.block_size * (config.block_size // unit))[:, None]
    return score.masked_fill(~past[:, None], torch.iinfo(torch.int64).min)


def _products(q: Tensor, blocks: Tensor) -> Tensor:
    """[B, S, HQ, D] and [B, N, HQ, D] -> [B, S, HQ, N]; integers have no matrix product of their own here."""
    return (q[:, :, None] * blocks[:, None]).sum(-1).transpose(2, 3)
