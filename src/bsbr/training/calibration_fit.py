"""Fitting the five scalars of each head of one layer to the output of exact attention, at sampled queries."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.routing import latest_of
from bsbr.ops.summaries import UNCALIBRATED
from bsbr.training.calibration_sample import Sample

_LEARNING_RATE = 0.1

_TINY = 1e-30
"""What the sum of no weights counts as, relative to the largest."""


class Fit(NamedTuple):
    """The outcome for each query head."""

    calibration: Tensor
    """The scalars kept, [HQ, 5]."""
    before: Tensor
    """Relative squared error at the held-out queries, uncalibrated, [HQ]; heads that choose together share one."""
    after: Tensor
    """The same with the scalars kept; never larger, [HQ]."""


def attention_output(sample: Sample, config: BSBRConfig, calibration: Tensor, counts: Tensor | None = None) -> Tensor:
    """Compute block sparse attention at the sampled queries, differentiable in the scalars.

    Source: docs/method.md; equal to `bsbr.ops.reference` at the same positions, the choice of blocks included.

    Args:
        sample: from `take_sample`.
        config: the settings.
        calibration: [HQ, 5].
        counts: blocks that each query head reads, [HQ]; None means `top_k`.
    Returns:
        [W, HQ, S, Dv].
    """
    gamma, beta = calibration[:, None, None, 3:].unbind(-1)  # [HQ, 1, 1] each, for [W, HQ, S, Dv]
    mass = _mass(config, calibration, sample.mean_score, sample.var_score) + sample.past
    lse, exact_o, read = _exact_fields(sample, config, mass.detach(), counts)
    if config.far == "drop":
        return exact_o
    far = mass if read is None else mass.masked_fill(read, -math.inf)
    # a head that reads every block has no far field left: its maximum is kept finite, or gradients would not be
    top = far.detach().amax(2).clamp_min(torch.finfo(far.dtype).min)
    total = torch.logaddexp(lse, top + (far - top[:, :, None]).exp().sum(2).clamp_min(_TINY).log())
    weights = (far - total[:, :, None]).exp()  # [W, HQ, N, S]
    o = (lse - total).exp()[..., None] * exact_o + gamma * (weights.mT @ sample.mean_v)
    if sample.state_o is None:
        return o
    if config.state == "token":
        return o + beta * torch.einsum("whns,whsnv->whsv", weights, sample.state_o)
    state_o = sample.state_o
    if sample.last_scores is not None:
        share = (_mass(config, calibration, *sample.last_scores) + sample.past).softmax(2)
        state_o = torch.einsum("whns,whsnv->whsv", share, state_o)
    return o + beta * weights.sum(2)[..., None] * state_o


@torch.enable_grad()
def fit_scalars(sample: Sample, config: BSBRConfig, *, steps: int = 200, counts: Tensor | None = None) -> Fit:
    """Fit the five scalars of each query head to exact attention.

    1. The loss of a head is its squared error over the squared norm of the exact outputs, on every other query.
    2. Each head starts at the best of a small grid of variance and state scales: where keys share a large common part,
       or vary along few directions, the diagonal variance overshoots by so much that no gradient leads back from 1.
    3. `steps` steps of Adam follow; the blocks are chosen anew at each.
    4. Of the values that beat the uncalibrated ones on the other queries, each head keeps those with the least error
       on all; without any, it stays uncalibrated. The other queries alone would often pick an early step by chance.

    Args:
        sample: from `take_sample`.
        config: the settings, with a far field.
        steps: steps of Adam.
        counts: blocks that each query head reads, [HQ]; None means `top_k`.
    Returns:
        The scalars, and the error on the queries that were not fitted.
    """
    uncalibrated = sample.target.new_tensor(UNCALIBRATED).repeat(sample.target.shape[1], 1)
    with torch.no_grad():
        before = _relative_errors(sample, config, uncalibrated, counts)[1]
        start = _best_start(sample, config, uncalibrated, counts)
    scalars = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([scalars], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, after, least = uncalibrated, before, torch.full_like(before, math.inf)
    for step in range(steps + 1):
        fitted, held_out = _relative_errors(sample, config, scalars, counts)
        total = (fitted + held_out).detach()
        better = (held_out.detach() < before) & (total < least)
        least = torch.where(better, total, least)
        after = torch.where(better, held_out.detach(), after)
        best = torch.where(better[:, None], scalars.detach(), best)
        if step < steps:
            optimizer.zero_grad()
            fitted.sum().backward()
            optimizer.step()
            schedule.step()
    return Fit(best, before, after)


_GRID = ((1.0, 1.0), (0.5, 1.0), (0.1, 1.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.5), (0.0, 0.0))
"""Scales of variance and state that a head may start from."""


def _best_start(sample: Sample, config: BSBRConfig, uncalibrated: Tensor, counts: Tensor | None) -> Tensor:
    """The point of the grid that does best on the queries to fit, head by head, [HQ, 5]."""
    starts = []
    for var_scale, state_scale in _GRID:
        start = uncalibrated.clone()
        start[:, 2], start[:, 4] = var_scale, state_scale
        starts.append(start)
    errors = torch.stack([_relative_errors(sample, config, start, counts)[0] for start in starts])
    return torch.stack(starts)[errors.argmin(0), torch.arange(uncalibrated.shape[0])]


def _relative_errors(
    sample: Sample, config: BSBRConfig, calibration: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared error over squared norm, of the queries to fit and of those held out, [HQ] each.

    Heads that choose their blocks together depend on each other's scalars: each of them has their mean error.
    """
    error = (attention_output(sample, config, calibration, counts) - sample.target).square().sum(-1)
    norm = sample.target.square().sum(-1)
    fitted, held_out = (error[..., i::2].sum((0, 2)) / norm[..., i::2].sum((0, 2)) for i in (0, 1))
    if config.selection == "group":
        fitted, held_out = (_shared(x, sample.key_heads) for x in (fitted, held_out))
    return fitted, held_out


def _shared(error: Tensor, key_heads: int) -> Tensor:
    groups = error.view(key_heads, -1)
    return groups.mean(1, keepdim=True).expand_as(groups).flatten()


def _mass(config: BSBRConfig, calibration: Tensor, mean_score: Tensor, var_score: Tensor) -> Tensor:
    """log n + a + sigma q.mu + lambda/2 (q*q).var from the two scores, [W, HQ, N, S]."""
    bias, mean_scale, var_scale = calibration[:, None, None, :3].unbind(-1)
    mass = mean_scale * mean_score + (bias + math.log(config.unit))
    return mass + var_scale * var_score if config.far == "moments" else mass


def _exact_fields(
    sample: Sample, config: BSBRConfig, mass: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Local and retrieved field together: lse [W, HQ, S], o [W, HQ, S, Dv]; and whether a block is read, as `mass`."""
    most = config.top_k if counts is None else int(counts.max())
    if not most:
        return sample.local_lse, sample.local_o, None
    index, kept = _choose(mass, most, counts, config, sample.key_heads)
    parts = sample.block_lse.gather(2, index).masked_fill(~kept, -math.inf)
    lse = torch.logaddexp(sample.local_lse, parts.logsumexp(2))
    o = (sample.local_lse - lse).exp()[..., None] * sample.local_o
    weights = (parts - lse[:, :, None]).exp()
    # the outputs of all blocks are what takes most memory: only those of chosen blocks are read
    block_o = sample.block_o.take_along_dim(index.mT[..., None], 3)
    read = torch.zeros_like(mass, dtype=torch.bool).scatter_(2, index, kept)
    return lse, o + torch.einsum("whks,whskv->whsv", weights, block_o), read


def _choose(
    mass: Tensor, most: int, counts: Tensor | None, config: BSBRConfig, key_heads: int
) -> tuple[Tensor, Tensor]:
    """Blocks each query may read, best first, and whether it does, [W, HQ, K, S] each."""
    if config.selection == "group":
        share = (mass - mass.logsumexp(2, keepdim=True)).unflatten(1, (key_heads, -1))
        mass = share.amax(2, keepdim=True).expand_as(share).flatten(1, 2)
    if config.selection == "recent":
        index = (latest_of(mass) - torch.arange(min(most, mass.shape[2]), device=mass.device)[:, None]).clamp(min=0)
    else:
        index = mass.topk(min(most, mass.shape[2]), dim=2).indices  # best first
    kept = torch.ones_like(index, dtype=torch.bool)
    if counts is not None:
        kept &= torch.arange(index.shape[2], device=mass.device)[:, None] < counts.to(mass.device)[:, None, None]
    return index, kept
