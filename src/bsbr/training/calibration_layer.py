"""Calibrating one layer, in parts that fit into memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.schedule import dense_until
from bsbr.ops.shares import take_share
from bsbr.training.calibration_fit import fit_scalars
from bsbr.training.calibration_sample import Sample, sample_positions, take_sample
from bsbr.training.observe import one_thread
from bsbr.training.spread import error_curve

_ELEMENTS = 1 << 26
"""Elements of the largest tensor of a sample."""

_NOTHING = 1e-9
"""Relative squared error of a head that reads everything: there is nothing to fit."""


class Sampling(NamedTuple):
    """Where queries are sampled."""

    start: int
    """First position at which they may be."""
    length: int
    """Tokens of a window."""
    windows: int
    """Number of windows."""
    queries_per_head: int
    """Over all windows."""
    seed: int
    """Of the choice."""


def fit_layer(
    scalars: Tensor, sampling: Sampling, q: Tensor, k: Tensor, v: Tensor, scale: float, config: BSBRConfig, steps: int
) -> None:
    """Fit the scalars of a layer's heads.

    Heads that read so many blocks that nothing in a window is sparse keep theirs.

    Args:
        scalars: [HQ, 5], written in place.
        sampling: where queries are sampled.
        q: queries, [W, HQ, T, D].
        k: keys, [W, H, T, D]; v: values, [W, H, T, Dv].
        scale: factor on q.k.
        config: the layer's settings, with a far field.
        steps: steps of Adam.
    """
    group = q.shape[1] // k.shape[1]
    uniform = replace(config, top_k_per_head=None)
    for heads, sample in _samples(uniform, sampling, q, k, v, scale):
        counts = None
        if config.top_k_per_head is not None:
            counts = torch.tensor([config.top_k_per_head[head] for head in heads]).repeat_interleave(group)
        fit = fit_scalars(sample, uniform, steps=steps, counts=counts)
        own = scalars.unflatten(0, (k.shape[1], -1))
        before = own[list(heads)].flatten(0, 1)
        fitted = torch.where(fit.before[:, None] > _NOTHING, fit.calibration.to(scalars), before)
        own[list(heads)] = fitted.unflatten(0, (len(heads), -1))


def judge_layer(
    scalars: Tensor,
    sampling: Sampling,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    config: BSBRConfig,
    counts: Sequence[int],
) -> Tensor:
    """Measure the errors of a layer's key heads for other numbers of blocks.

    Args:
        scalars: [HQ, 5], fitted for `top_k`.
        sampling, q, k, v, scale: as for `fit_layer`.
        config: the layer's settings, without a `top_k_per_head`.
        counts: numbers of blocks, ascending.
    Returns:
        Errors relative to the layer, as `bsbr.training.spread` describes them, [len(counts), H].
    """
    curves, norms = [], []
    for heads, sample in _samples(config, sampling, q, k, v, scale):
        own = take_share(scalars, heads, k.shape[1], 0)
        curves.append(error_curve(sample, config, own, counts))
        norms.append(sample.target.square().sum())
    return torch.cat(curves, 1) / torch.stack(norms).sum().sqrt()


def _samples(
    config: BSBRConfig, sampling: Sampling, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Iterator[tuple[tuple[int, ...], Sample]]:
    """Key heads, and a sample of them; none where too little is sparse."""
    key_heads = k.shape[1]
    start = max(sampling.start, dense_until(config))
    if start + config.block_size > sampling.length:
        return
    queries = -(-sampling.queries_per_head // sampling.windows)
    positions = sample_positions(start, sampling.length, sampling.windows, queries, sampling.seed).to(q.device)
    per_head = q.shape[1] // key_heads * positions.numel() * (sampling.length // config.unit) * v.shape[-1]
    part = max(1, _ELEMENTS // per_head)
    for first in range(0, key_heads, part):
        heads = tuple(range(first, min(first + part, key_heads)))
        with one_thread():
            own = [take_share(x, heads, key_heads, 1) for x in (q, k, v)]
            yield heads, take_sample(own[0], own[1], own[2], positions, config, scale)
