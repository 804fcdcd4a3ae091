"""Calibrating one layer: in parts that fit into memory, heads that read the same number of blocks together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.schedule import dense_until
from bsbr.ops.shares import Share, shares_of, take_share
from bsbr.training.calibration_fit import fit_scalars
from bsbr.training.calibration_sample import Sample, sample_positions, take_sample
from bsbr.training.observe import one_thread
from bsbr.training.spread import error_curve

_ELEMENTS = 1 << 26
"""Elements of the largest tensor of a sample."""


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
    every = Share(tuple(range(k.shape[1])), config)
    for share in [every] if config.top_k_per_head is None else shares_of(config):
        for heads, sample in _samples(share, sampling, q, k, v, scale):
            fitted = fit_scalars(sample, share.config, steps=steps).calibration.to(scalars)
            scalars.unflatten(0, (k.shape[1], -1))[list(heads)] = fitted.unflatten(0, (len(heads), -1))


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
    for heads, sample in _samples(Share(tuple(range(k.shape[1])), config), sampling, q, k, v, scale):
        own = take_share(scalars, heads, k.shape[1], 0)
        curves.append(error_curve(sample, config, own, counts))
        norms.append(sample.target.square().sum())
    return torch.cat(curves, 1) / torch.stack(norms).sum().sqrt()


def _samples(
    share: Share, sampling: Sampling, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Iterator[tuple[tuple[int, ...], Sample]]:
    """Key heads, and a sample of them; none where too little is sparse."""
    config, key_heads = share.config, k.shape[1]
    start = max(sampling.start, dense_until(config))
    if start + config.block_size > sampling.length:
        return
    queries = -(-sampling.queries_per_head // sampling.windows)
    positions = sample_positions(start, sampling.length, sampling.windows, queries, sampling.seed).to(q.device)
    per_head = q.shape[1] // key_heads * positions.numel() * (sampling.length // config.unit) * v.shape[-1]
    part = max(1, _ELEMENTS // per_head)
    for first in range(0, len(share.heads), part):
        heads = share.heads[first : first + part]
        with one_thread():
            own = [take_share(x, heads, key_heads, 1) for x in (q, k, v)]
            yield heads, take_sample(own[0], own[1], own[2], positions, config, scale)
