"""The definition of the attention, in float64, as the equations read; everything else is compared with it."""

import math

import torch
from torch import Tensor

from bsbr.config import BSBRConfig


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    *,
    scale: float | None = None,
    q_start: int = 0,
    lengths: Tensor | None = None,
    calibration: Tensor | None = None,
    block_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute block sparse attention with block retrieval as it is defined, in float64.

    Source: docs/method.md (cumulant expansion of softmax attention over a block). For a scaled query q and a
    past block b of n keys with mean key mu, key variance var, mean value vbar and centred state F:

    1. The block's log-mass is estimated as m_b = log n + a + sigma q.mu + lambda/2 (q*q).var.
    2. The `top_k` past blocks of largest m are read exactly (`top_k_per_head` of them where that is given), ties to
       the lower index, or the latest ones for selection="recent"; the own local block too.
    3. Every other past block is one entry of log-mass m_b and value gamma vbar_b + beta q^T Fbar.
    4. One softmax runs over the exact keys and the entries together.

    Queries at positions below `dense_below` read their whole past exactly.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k, v: keys [B, T, H, D] and values [B, T, H, Dv]; H divides HQ.
        config: the settings.
        scale: factor on q.k; None means D ** -0.5.
        q_start: position of the first query.
        lengths: real keys of each row, [B]; later ones are padding. None means T.
        calibration: per head (bias a, mean sigma, variance lambda, value gamma, state beta), [HQ, 5].
        block_indices: the selection to use instead of step 2, [B, Tq, HQ, S], padded with -1.
    Returns:
        o [B, Tq, HQ, Dv] float64, lse [B, Tq, HQ] float64 (-inf and o = 0 for padded queries), and the
        block_indices used [B, Tq, HQ, max_top_k] int64, ascending, padded with -1.

    Example:
        >>> q = torch.randn(1, 9, 2, 4)
        >>> o, lse, block_indices = reference_attention(q, q, q, BSBRConfig(block_size=4, top_k=1, dense_below=0))
        >>> o.shape, block_indices[0, 8, 0].numel()
        (torch.Size([1, 9, 2, 4]), 1)
    """
    (_, num_queries, num_heads, width), num_keys = q.shape, k.shape[1]
    group, unit = num_heads // k.shape[2], config.unit
    q = q.double().transpose(1, 2) * (width**-0.5 if scale is None else scale)  # [B, HQ, Tq, D]
    position = torch.arange(num_keys, device=q.device)
    if lengths is not None:  # padded keys count for nothing, whatever they hold
        padded = (position >= lengths[:, None])[:, :, None, None]
        k, v = k.masked_fill(padded, 0), v.masked_fill(padded, 0)
    k, v = (x.double().repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))  # [B, HQ, T, D]
    a, sigma, lam, gamma, beta = _columns(calibration, num_heads, q)

    own = q_start + torch.arange(num_queries, device=q.device)  # position of each query
    num_blocks = num_keys // unit
    past_count = own // config.block_size * (config.block_size // unit)
    past = torch.arange(num_blocks, device=q.device) < past_count[:, None]  # [Tq, N]
    dense = own < config.dense_below

    blocked_k = k[:, :, : num_blocks * unit].unflatten(2, (num_blocks, unit))  # [B, HQ, N, unit, D]
    blocked_v = v[:, :, : num_blocks * unit].unflatten(2, (num_blocks, unit))
    mean_k, mean_v = blocked_k.mean(3), blocked_v.mean(3)
    centred_k = blocked_k - mean_k[:, :, :, None]
    block_states = centred_k.mT @ (blocked_v - mean_v[:, :, :, None]) / unit  # [B, HQ, N, D, Dv]

    mass = math.log(unit) + a + sigma * (q @ mean_k.mT)
    if config.far == "moments":
        mass = mass + lam / 2 * (q * q @ centred_k.square().mean(3).mT)
    past_mass = mass.masked_fill(~past, -math.inf)  # [B, HQ, Tq, N]
    if block_indices is None:
        block_indices = _select(past_mass.detach(), config, group)
    chosen = _one_hot(block_indices.to(q.device), num_blocks).transpose(1, 2) & past  # [B, HQ, Tq, N]

    in_block = chosen.repeat_interleave(unit, 3)
    in_block = torch.nn.functional.pad(in_block, (0, num_keys - in_block.shape[3]))
    local = position // config.block_size == (own // config.block_size)[:, None]
    causal = position <= own[:, None]
    read = causal & (local | in_block | dense[:, None])
    scores = (q @ k.mT).masked_fill(~read, -math.inf)  # [B, HQ, Tq, T]
    is_far = past & ~chosen & ~dense[:, None] & (config.far != "drop")
    weights = torch.cat([scores, mass.masked_fill(~is_far, -math.inf)], -1)
    lse = weights.logsumexp(-1)
    exact, far = (weights - lse[..., None]).exp().split([num_keys, num_blocks], -1)

    o = exact @ v + gamma * (far @ mean_v)
    if config.state == "token":
        o = o + beta * torch.einsum("bhtn,bhtd,bhndv->bhtv", far, q, block_states)
    elif config.state != "none":
        read_state = _retrieved_state(config, block_states, mass, past, own, q_start)  # [B, HQ, Tq, D, Dv]
        o = o + beta * far.sum(-1, keepdim=True) * torch.einsum("bhtd,bhtdv->bhtv", q, read_state)
    o, lse = o.transpose(1, 2), lse.transpose(1, 2)
    if lengths is not None:
        outside = own >= lengths[:, None]
        o = o.masked_fill(outside[:, :, None, None], 0)
        lse = lse.masked_fill(outside[:, :, None], -math.inf)
    return o, lse, block_indices


def _columns(calibration: Tensor | None, num_heads: int, like: Tensor) -> list[Tensor]:
    """The five scalars, each [HQ, 1, 1]."""
    if calibration is None:
        calibration = like.new_tensor([0.0, 1.0, 1.0, 1.0, 1.0]).expand(num_heads, 5)
    return [calibration[:, i, None, None].double() for i in range(5)]


def _select(mass: Tensor, config: BSBRConfig, group: int) -> Tensor:
    """The past blocks of largest mass, ties to the lower index: [B, Tq, HQ, max_top_k], padded with -1."""
    if config.selection == "recent":
        number = torch.arange(mass.shape[-1], device=mass.device, dtype=mass.dtype)
        mass = torch.where(mass == -math.inf, mass, number)
    if config.selection == "group":  # the heads of a key head agree on the largest of their block probabilities
        share = (mass - mass.logsumexp(-1, keepdim=True)).nan_to_num(nan=-math.inf)
        mass = share.unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
    count = min(config.max_top_k, mass.shape[-1])
    value, index = (x[..., :count] for x in mass.sort(dim=-1, descending=True, stable=True))
    per_head = torch.tensor(config.top_k_per_head or [config.top_k], device=mass.device)
    per_head = per_head.repeat_interleave(mass.shape[1] // len(per_head))[:, None, None]  # [HQ, 1, 1]
    none = (value == -math.inf) | (torch.arange(count, device=mass.device) >= per_head)
    index = index.masked_fill(none, mass.shape[-1]).sort(-1).values
    index = torch.where(index == mass.shape[-1], -1, index)
    return torch.nn.functional.pad(index, (0, config.max_top_k - count), value=-1).transpose(1, 2)


def _one_hot(block_indices: Tensor, num_blocks: int) -> Tensor:
    """[..., S] indices padded with -1 -> [..., N] bool."""
    shape = (*block_indices.shape[:-1], num_blocks + 1)
    hot = torch.zeros(shape, dtype=torch.bool, device=block_indices.device)
    return hot.scatter_(-1, block_indices + 1, True)[..., 1:]


def _retrieved_state(
    config: BSBRConfig, block_states: Tensor, mass: Tensor, past: Tensor, own: Tensor, q_start: int
) -> Tensor:
    """What each query reads of the states: their mean over past blocks, or their softmax mean by the last query
    of the previous local block, at which every past block is complete. [B, HQ, Tq, D, Dv]"""
    if config.state == "global":
        weight = past.double() / past.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("tn,bhndv->bhtdv", weight, block_states)
    if q_start:
        raise ValueError('state="block" needs every query from position 0, got q_start > 0: use state="global"')
    last = (own // config.block_size * config.block_size - 1).clamp(min=0)
    weight = mass[:, :, last].masked_fill(~past, -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhtn,bhndv->bhtdv", weight, block_states)
