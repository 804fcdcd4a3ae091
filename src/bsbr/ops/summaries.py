"""What is kept of a past block: counts are the unit's, so a summary is two means, a variance and a state."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

CALIBRATION = ("bias", "mean_scale", "var_scale", "value_scale", "state_scale")
"""The five scalars of a head, in the order of the last axis of a calibration tensor."""

UNCALIBRATED = (0.0, 1.0, 1.0, 1.0, 1.0)
"""Their values before calibration: the plain second-order expansion."""


def uncalibrated(heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the scalars of uncalibrated heads on their device: a copy from the host would not fit into a CUDA graph.

    Args:
        heads: query heads.
        dtype, device: of the tensor.
    Returns:
        [heads, 5] contiguous.

    Example:
        >>> uncalibrated(1, torch.float32, torch.device("cpu")).tolist()
        [[0.0, 1.0, 1.0, 1.0, 1.0]]
    """
    scalars = torch.ones(heads, len(UNCALIBRATED), dtype=dtype, device=device)
    for place, value in enumerate(UNCALIBRATED):
        if value != 1:
            scalars[:, place] = value
    return scalars


_ELEMENTS = 1 << 17
"""Elements of keys summarised at once: they should stay in a CPU core's cache."""


class Summaries(NamedTuple):
    """Summaries of the complete retrieval blocks, in float32 or better; Z stands for any leading axes."""

    mean_k: Tensor
    """Mean key, [Z, N, D]."""
    var_k: Tensor
    """Variance of the keys per channel, [Z, N, D]."""
    mean_v: Tensor
    """Mean value, [Z, N, Dv]."""
    states: Tensor
    """Centred first-order state, mean of (k - mean_k)(v - mean_v)^T, [Z, N, D, Dv]."""


def summarize(k: Tensor, v: Tensor, unit: int) -> Summaries:
    """Summarise every complete block of `unit` keys.

    Source: docs/method.md; the cumulants of the keys under a query, to second order.

    Variances are taken about the mean, never as a difference of squares, so that keys with a large common part
    keep their digits.

    Args:
        k: keys, [Z, T, D].
        v: values, [Z, T, Dv].
        unit: tokens of a block; tokens after the last complete block are left out.
    Returns:
        Summaries of N = T // unit blocks, float32 (float64 for float64 input), differentiable.

    Example:
        >>> summarize(torch.ones(1, 9, 4), torch.ones(1, 9, 4), 4).mean_k.shape
        torch.Size([1, 2, 4])
    """
    num_blocks = k.shape[-2] // unit
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v = (x[..., : num_blocks * unit, :].unflatten(-2, (num_blocks, unit)) for x in (k, v))
    step = num_blocks if k.is_cuda else max(1, _ELEMENTS * num_blocks // max(1, k.numel()))
    parts = [_moments(*part, dtype) for part in zip(k.split(step, -3), v.split(step, -3), strict=True)]
    mean_k, var_k, mean_v, states = zip(*parts, strict=True)
    return Summaries(torch.cat(mean_k, -2), torch.cat(var_k, -2), torch.cat(mean_v, -2), torch.cat(states, -3))


def _moments(k: Tensor, v: Tensor, dtype: torch.dtype) -> Summaries:
    """Summaries of blocks, [..., N, unit, D]."""
    k, v = k.to(dtype), v.to(dtype)
    mean_k, mean_v = k.mean(-2), v.mean(-2)
    centred_k = k - mean_k.unsqueeze(-2)
    states = centred_k.mT @ (v - mean_v.unsqueeze(-2))
    return Summaries(mean_k, centred_k.square().mean(-2), mean_v, states / k.shape[-2])


def log_mass(q: Tensor, mean_k: Tensor, var_k: Tensor | None, unit: int, calibration: Tensor, scale: float) -> Tensor:
    """Estimate the log of the softmax mass of each block for each query, block-major.

    Source: docs/method.md; log n + a + sigma q.mu + lambda/2 (q*q).var for scaled q. The scale is put on the
    summaries, which are fewer than the queries.

    Blocks come before queries in the result, so that sums, maxima and masks over blocks run along contiguous
    queries: on a CPU this is several times faster than the other order.

    Args:
        q: queries, not scaled, [Z, G, S, D], in the dtype of the summaries.
        mean_k: [Z, N, D].
        var_k: [Z, N, D], or None for the first-order estimate.
        unit: keys in a block.
        calibration: [Z, G, 5].
        scale: factor on q.
    Returns:
        [Z, G, N, S].

    Example:
        >>> one = torch.ones(1, 1, 3, 4)
        >>> log_mass(one, one[0], None, 8, torch.tensor([[UNCALIBRATED]]), 1.0).shape
        torch.Size([1, 1, 3, 3])
    """
    bias, mean_scale, var_scale = calibration.flatten(0, 1)[:, None, None, :3].unbind(-1)  # [Z * G, 1, 1]
    flat_q = q.flatten(0, 1).mT
    mean_k = mean_k.repeat_interleave(q.shape[1], 0)
    mass = torch.baddbmm(bias + math.log(unit), scale * mean_scale * mean_k, flat_q)  # [Z * G, N, S]
    if var_k is not None:
        var_k = var_k.repeat_interleave(q.shape[1], 0)
        mass = mass.baddbmm_(scale * scale * var_scale / 2 * var_k, flat_q.square())
    return mass.unflatten(0, q.shape[:2])
