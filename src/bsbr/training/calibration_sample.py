"""What calibration needs of one layer: everything the scalars do not change, at sampled queries.

Shapes: W windows of text, HQ query heads of H key heads, N past retrieval blocks, S sampled queries of a window;
scores are block-major, [W, HQ, N, S], as in `bsbr.ops.far`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.summaries import Summaries, summarize


class Sample(NamedTuple):
    """All that the attention of the sampled queries is made of, in float32."""

    mean_score: Tensor
    """q.mu of each block, [W, HQ, N, S]."""
    var_score: Tensor
    """Half of (q*q).var, [W, HQ, N, S]."""
    past: Tensor
    """0 where a block is past, -inf elsewhere, [W, 1, N, S]; apart from the scores, whose gradients stay finite."""
    block_lse: Tensor
    """Exact log-mass of each block, [W, HQ, N, S]."""
    block_o: Tensor
    """Exact output of each block, [W, HQ, S, N, Dv]."""
    local_lse: Tensor
    """Exact log-mass of the own block, [W, HQ, S]."""
    local_o: Tensor
    """Exact output of the own block, [W, HQ, S, Dv]."""
    mean_v: Tensor
    """Mean value of each block, [W, HQ, N, Dv]."""
    state_o: Tensor | None
    """What q reads of the states: of their mean [W, HQ, S, Dv] for state="global", else of each [W, HQ, S, N, Dv]."""
    last_scores: tuple[Tensor, Tensor] | None
    """For state="block", mean and variance score of the last query of the previous local block, [W, HQ, N, S] each."""
    target: Tensor
    """Output of exact attention over the whole past, [W, HQ, S, Dv]."""
    key_heads: int
    """H."""


def sample_positions(start: int, length: int, windows: int, queries: int, seed: int) -> Tensor:
    """Choose query positions, one at random in each of equal shares of the sparse region.

    Args:
        start: first position that may be chosen.
        length: tokens of a window.
        windows: W.
        queries: positions of each window; fewer where the region is smaller.
        seed: of the choice.
    Returns:
        Ascending positions, [W, S] int64.

    Example:
        >>> sample_positions(8, 16, 1, 100, seed=0).tolist()
        [[8, 9, 10, 11, 12, 13, 14, 15]]
    """
    queries = min(queries, length - start)
    share = (length - start) / queries
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand(windows, queries, generator=generator, dtype=torch.float64)
    return (start + (torch.arange(queries) + offset) * share).long().clamp_(max=length - 1)


def take_sample(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, config: BSBRConfig, scale: float) -> Sample:
    """Compute once what no scalar changes.

    Args:
        q: queries, [W, HQ, T, D].
        k: keys, [W, H, T, D]; H divides HQ.
        v: values, [W, H, T, Dv].
        positions: of the sampled queries, all of them sparse, [W, S].
        config: the settings.
        scale: factor on q.k.
    Returns:
        The sample.
    """
    size, per_block = config.block_size, config.block_size // config.unit
    own = positions // size  # local block of each query, [W, S]
    num_blocks = int(own.max()) * per_block
    k, v = k.float(), v.float()
    past_k, past_v = (x[:, :, : num_blocks * config.unit] for x in (k, v))
    summaries = summarize(past_k, past_v, config.unit)
    is_past = torch.arange(num_blocks, device=k.device)[:, None] < (own * per_block)[:, None, None]  # [W, 1, N, S]
    past = torch.zeros(is_past.shape, device=k.device).masked_fill_(~is_past, -math.inf)

    chosen = _at(q, positions, k.shape[1]) * scale  # [W, H, G, S, D]
    block_lse, block_o = _attend_blocks(chosen, past_k, past_v, config.unit)
    block_lse = block_lse + past
    local_lse, local_o = _attend_local(chosen, k, v, positions, size)
    lse = torch.logaddexp(local_lse, block_lse.logsumexp(2))
    share = (block_lse - lse[:, :, None]).exp()
    target = (local_lse - lse).exp()[..., None] * local_o + torch.einsum("whns,whsnv->whsv", share, block_o)
    last_scores = None
    if config.state == "block":
        last_scores = _scores(_at(q, own * size - 1, k.shape[1]) * scale, summaries)
    return Sample(
        *_scores(chosen, summaries), past, block_lse, block_o, local_lse, local_o,
        summaries.mean_v.repeat_interleave(chosen.shape[2], 1), _read_states(config, chosen, summaries, own),
        last_scores, target, k.shape[1],
    )  # fmt: skip


def _at(q: Tensor, positions: Tensor, key_heads: int) -> Tensor:
    """Queries at the positions of each window, by key head, in float32: [W, H, G, S, D]."""
    index = positions[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
    return q.gather(2, index).float().unflatten(1, (key_heads, -1))


def _scores(q: Tensor, summaries: Summaries) -> tuple[Tensor, Tensor]:
    """q.mu and half of (q*q).var, [W, HQ, N, S] each."""
    mean, var = (x[:, :, None] @ y.mT for x, y in ((summaries.mean_k, q), (summaries.var_k / 2, q * q)))
    return mean.flatten(1, 2), var.flatten(1, 2)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Attend to each block apart: lse [W, HQ, N, S] and o [W, HQ, S, N, Dv]."""
    lse, o = [], []
    for block_k, block_v in zip(k.split(unit, 2), v.split(unit, 2), strict=True):
        scores = q @ block_k[:, :, None].mT  # [W, H, G, S, unit]
        lse.append(scores.logsumexp(-1))
        o.append((scores - lse[-1][..., None]).exp_() @ block_v[:, :, None])
    return torch.stack(lse, 3).flatten(1, 2), torch.stack(o, 4).flatten(1, 2)


def _attend_local(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Attend causally to the own block: lse [W, HQ, S] and o [W, HQ, S, Dv]."""
    lse, o = q.new_empty(q.shape[:-1]), q.new_empty(*q.shape[:-1], v.shape[-1])
    for w, block, rows in _by_block(positions // size):
        keys = slice(block * size, min((block + 1) * size, k.shape[2]))
        scores = q[w, :, :, rows] @ k[w, :, None, keys].mT  # [H, G, rows, keys]
        future = torch.arange(keys.start, keys.stop, device=k.device) > positions[w, rows, None]
        scores.masked_fill_(future, -math.inf)
        lse[w, :, :, rows] = scores.logsumexp(-1)
        o[w, :, :, rows] = scores.softmax(-1) @ v[w, :, None, keys]
    return lse.flatten(1, 2), o.flatten(1, 2)


def _read_states(config: BSBRConfig, q: Tensor, summaries: Summaries, own: Tensor) -> Tensor | None:
    if config.state == "none":
        return None
    states = summaries.states[:, :, None]  # [W, H, 1, N, D, Dv]
    if config.state != "global":
        return torch.stack([(q @ states[:, :, :, b]).flatten(1, 2) for b in range(states.shape[3])], 3)
    o = q.new_empty(*q.shape[:-1], states.shape[-1])
    for w, block, rows in _by_block(own):
        mean = states[w, :, :, : block * (config.block_size // config.unit)].mean(2)
        o[w, :, :, rows] = q[w, :, :, rows] @ mean
    return o.flatten(1, 2)


def _by_block(own: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Each window, each local block in which it has sampled queries, and where these stand among the S."""
    for w, row in enumerate(own.tolist()):
        start = 0
        for stop in range(1, len(row) + 1):
            if stop == len(row) or row[stop] != row[start]:
                yield w, row[start], slice(start, stop)
                start = stop
