"""Ways to sum up a block of keys and values, under one form: two scores, a value and a correction for each block."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK, RANK = 128, 8


class Layer(NamedTuple):
    """One layer's window: S sampled queries (scaled) of HQ heads, and all keys and values, repeated to these heads."""

    q: Tensor
    """[HQ, S, D]"""
    k: Tensor
    """[HQ, T, D]"""
    v: Tensor
    """[HQ, T, Dv]"""
    at: Tensor
    """Position of each query, [S]."""
    before: Tensor
    """The last query of the previous local block of each query, [HQ, S, D]."""


class Entries(NamedTuple):
    """What stands for a past block of n keys: log-mass log n + a + sigma m1 + lambda m2, value gamma v + beta c."""

    m1: Tensor
    """First-order score, [HQ, S, N]."""
    m2: Tensor
    """Second-order score, [HQ, S, N]; 0 where none is kept."""
    value: Tensor
    """Mean value, [HQ, 1 or S, N, Dv]."""
    correction: Tensor
    """What the query reads of the states, [HQ, S, N, Dv] or [HQ, S, 1, Dv]; 0 where none is kept."""
    numbers: float
    """Numbers kept of a block, of one key head; a state kept once for all blocks counts 0."""
    log_count: float
    """log n."""


class Method(NamedTuple):
    """One row of the table."""

    unit: int
    make: Callable[[Layer, int], Entries]
    drops: bool = False


def blocks_of(x: Tensor, unit: int) -> Tensor:
    """[HQ, T, D] -> [HQ, N, unit, D]."""
    return x[:, : x.shape[1] // unit * unit].unflatten(1, (-1, unit))


def moments(layer: Layer, unit: int, *, variance: bool, state: str) -> Entries:
    """Mean key and value, variance of the keys, and a first-order state, as the operation keeps them."""
    k, v = blocks_of(layer.k, unit), blocks_of(layer.v, unit)
    mean_k, mean_v, width = k.mean(2), v.mean(2), k.shape[-1]
    centred = k - mean_k[:, :, None]
    m1 = layer.q @ mean_k.mT
    spread = centred.square().mean(2).mT
    m2 = layer.q.square() @ spread / 2 if variance else torch.zeros_like(m1)
    numbers = 2 * width + width * variance
    correction = torch.zeros(1)
    if state != "none":
        states = centred.mT @ (v - mean_v[:, :, None]) / unit  # [HQ, N, D, Dv]
        if state == "rank":
            u, s, w = torch.linalg.svd(states, full_matrices=False)
            states = (u[..., :RANK] * s[..., None, :RANK]) @ w[..., :RANK, :]
            numbers += 2 * RANK * width
        elif state != "global":
            numbers += width * width
        correction = torch.einsum("hsd,hndv->hsnv", layer.q, states)
    if state in ("global", "block"):
        past = is_past(layer, unit)
        weight = past.float() / past.sum(-1, keepdim=True)
        if state == "block":  # chosen by the last query of the previous block, at which every past block is complete
            score = layer.before @ mean_k.mT + layer.before.square() @ spread / 2
            weight = score.masked_fill(~past, -math.inf).softmax(-1)
        correction = (weight[..., None] * correction).sum(2, keepdim=True)
    return Entries(m1, m2, mean_v[:, None], correction, numbers, math.log(unit))


def clusters(layer: Layer, unit: int, count: int) -> Entries:
    """Several mean keys and values per block, by k-means of the keys; joined into one entry of their summed mass."""
    k, v = blocks_of(layer.k, unit), blocks_of(layer.v, unit)
    centre = k[:, :, :: unit // count]  # [HQ, N, C, D]
    for _ in range(10):
        nearest = torch.cdist(k, centre).argmin(-1)  # [HQ, N, unit]
        member = nn.functional.one_hot(nearest, count).float()
        size = member.sum(2)[..., None]
        centre = member.mT @ k / size.clamp(min=1)
    mean_v = member.mT @ v / size.clamp(min=1)
    score = torch.einsum("hsd,hncd->hsnc", layer.q, centre) + size.log()[:, None, :, :, 0]
    mass = score.logsumexp(-1)
    value = torch.einsum("hsnc,hncv->hsnv", (score - mass[..., None]).exp(), mean_v)
    numbers = count * (2 * k.shape[-1] + 1)
    return Entries(mass - math.log(unit), torch.zeros_like(mass), value, torch.zeros(1), numbers, math.log(unit))


def table(block: int) -> dict[str, Method]:
    """Every row: name, unit of retrieval and summary."""

    def kept(variance: bool, state: str) -> Callable[[Layer, int], Entries]:
        return lambda layer, unit: moments(layer, unit, variance=variance, state=state)

    small = block // 4
    return {
        "drop": Method(block, kept(False, "none"), drops=True),
        "mean": Method(block, kept(False, "none")),
        "variance": Method(block, kept(True, "none")),
        "moments, global state": Method(block, kept(True, "global")),
        "moments, block state": Method(block, kept(True, "block")),
        "moments, token state": Method(block, kept(True, "token")),
        f"moments, token state of rank {RANK}": Method(block, kept(True, "rank")),
        "4 key clusters": Method(block, partial(clusters, count=4)),
        "8 key clusters": Method(block, partial(clusters, count=8)),
        f"units of {small}: drop": Method(small, kept(False, "none"), drops=True),
        f"units of {small}: mean": Method(small, kept(False, "none")),
        f"units of {small}: moments, global state": Method(small, kept(True, "global")),
        f"units of {small // 2}: mean": Method(small // 2, kept(False, "none")),
    }


def is_past(layer: Layer, unit: int) -> Tensor:
    """Blocks before the query's own local block, [S, N]; the block is BLOCK tokens."""
    own = layer.at // BLOCK * BLOCK
    return (torch.arange(layer.k.shape[1] // unit) + 1) * unit <= own[:, None]
