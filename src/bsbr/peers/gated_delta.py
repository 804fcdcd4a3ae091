"""Gated DeltaNet: a state of constant size that forgets by a learned gate and corrects what a key stood for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.peers.linear import chunks
from bsbr.peers.settings import PeerConfig, Shape

TAPS = 4
"""Tokens that the short convolutions see, the own one included."""

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(PeerConfig):
    """Gated DeltaNet.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> GatedDeltaConfig(seed=3).seed
        3
    """

    mixer: ClassVar[str] = "gated_delta"

    seed: int = 0
    """Chooses the random projections that no pretrained model has."""

    def __post_init__(self) -> None:
        self._require(seed=0)


def gated_delta_weights(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the first values of what a layer learns beside its q, k, v and output projections.

    Source: the initial values of Gated DeltaNet's authors (github.com/fla-org/flash-linear-attention), Mamba 2's for
    the decay: rates from 1 to 16, steps from 0.001 to 0.1.

    Args:
        shape: the sizes of the attention.
        generator: of random numbers, on the CPU.
    Returns:
        Tensors by name.

    Example:
        >>> sorted(gated_delta_weights(Shape(16, 4, 2, 8), torch.Generator().manual_seed(0)))
        ['beta', 'conv_k', 'conv_q', 'conv_v', 'decay', 'gate', 'norm', 'rate', 'step']
    """
    hidden, heads, key_heads, width = shape

    def uniform(rows: int, inputs: int) -> Tensor:
        return (torch.rand(rows, inputs, generator=generator) * 2 - 1) * inputs**-0.5

    step = torch.exp(torch.rand(key_heads, generator=generator) * 4.605 - 6.908)  # log-uniform, 0.001 to 0.1
    return {
        "beta": uniform(key_heads, hidden),
        "decay": uniform(key_heads, hidden),
        "step": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
        "rate": torch.log(1 + 15 * torch.rand(key_heads, generator=generator)),
        "conv_q": uniform(heads * width, TAPS).unflatten(0, (heads, width)),
        "conv_k": uniform(key_heads * width, TAPS).unflatten(0, (key_heads, width)),
        "conv_v": uniform(key_heads * width, TAPS).unflatten(0, (key_heads, width)),
        "gate": uniform(heads * width, hidden),
        "norm": torch.ones(width),
    }


def gated_delta_layer(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Mix tokens as a Gated DeltaNet layer does, between its projections.

    Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464).

    1. q, k and v pass a causal convolution of 4 tokens for each channel and SiLU; q and k are made unit vectors.
    2. beta = sigmoid(W x) and the log of the decay, -exp(rate) * softplus(W x + step), are read off the hidden state x.
    3. `gated_delta_attention`.
    4. The output of each head is normalised by its root mean square and multiplied by SiLU(W x).

    Query heads that share a key head read the same state.

    Args:
        q: queries, [B, T, HQ, D], without rotary positions.
        k: keys, [B, T, H, D]; v: values, [B, T, H, D].
        hidden: the layer's input, [B, T, hidden].
        weights: as from `gated_delta_weights`.
    Returns:
        o, [B, T, HQ, D], in the dtype of q.

    Example:
        >>> shape = Shape(16, 4, 2, 8)
        >>> weights = gated_delta_weights(shape, torch.Generator().manual_seed(0))
        >>> q, kv = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8)
        >>> gated_delta_layer(q, kv, kv, torch.randn(1, 9, 16), weights).shape
        torch.Size([1, 9, 4, 8])
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    small = {name: x.to(wide) for name, x in weights.items() if name != "gate"}
    q, k, v = (_convolved(x.to(wide), small[f"conv_{name}"]) for name, x in zip("qkv", (q, k, v), strict=True))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
    read = hidden.to(wide)
    beta = F.linear(read, small["beta"]).sigmoid()
    log_decay = -small["rate"].exp() * _softplus(F.linear(read, small["decay"]) + small["step"])
    kernel = _fla_kernel() if q.is_cuda and not torch.compiler.is_compiling() else None  # it would break the graph
    if kernel is None:
        o = gated_delta_attention(q, k, v, log_decay, beta)
    else:
        group = q.shape[2] // k.shape[2]
        k, v, log_decay, beta = (x.repeat_interleave(group, 2) for x in (k, v, log_decay, beta))
        low = torch.bfloat16 if dtype == torch.float32 else dtype  # the kernel multiplies in half precision
        o = kernel(q.to(low), k.to(low), v.to(low), g=log_decay, beta=beta, scale=1.0)[0].to(wide)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + _EPS) * small["norm"]
    gate = F.silu(F.linear(hidden, weights["gate"].to(hidden.dtype)))
    return o.to(dtype) * gate.unflatten(-1, o.shape[2:])


def gated_delta_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Read with q a state S that follows S = a S + b k (v - a S^T k)^T from token to token.

    Source: Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464), section 3.3: within a chunk, the
    product of the updates is one triangular system (the WY form).

    1. In each chunk of 64 tokens, what each key adds is u = u0 - W S, S the state before the chunk; u0 and W come from
       one triangular solve.
    2. A chunk's update of the state is affine in it: D x D and D x Dv matrices that are joined in pairs, pairs of pairs
       and so on, in 2 log2(chunks) steps in place of one step a chunk.
    3. A query reads the decayed S and the u of its own chunk.

    All is in float32 (float64 for float64 input); exponents are never positive. S is stable for keys of length 1 and
    beta from 0 to 2.

    Args:
        q: queries, [B, T, HQ, D].
        k: keys, [B, T, H, D]; H divides HQ.
        v: values, [B, T, H, Dv].
        log_decay: log a, [B, T, H], not above 0.
        beta: b, [B, T, H].
    Returns:
        o = S^T q after the token's own update, [B, T, HQ, Dv], in the dtype of q.

    Example:
        >>> k, v = torch.eye(4)[None, :3, None], torch.randn(1, 3, 1, 2)
        >>> o = gated_delta_attention(k, k, v, torch.zeros(1, 3, 1), torch.ones(1, 3, 1))
        >>> torch.allclose(o, v)  # each key is looked up right after it was written
        True
    """
    dtype, wide, tokens = q.dtype, torch.promote_types(q.dtype, torch.float32), k.shape[1]
    queries = chunks(q.to(wide)).unflatten(1, (k.shape[2], -1))  # [B, H, G, N, C, D]
    keys, values = chunks(k.to(wide)), chunks(v.to(wide))  # [B, H, N, C, D]
    decay = chunks(log_decay.to(wide)).cumsum(-1)[..., None]  # [B, H, N, C, 1], from the chunk's start
    strength = chunks(beta.to(wide))[..., None]
    later = torch.ones(keys.shape[3], keys.shape[3], dtype=torch.bool, device=q.device).triu(1)
    gap = (decay - decay.mT).masked_fill(later, -torch.inf).exp()  # [.., i, j]: decay from j to i
    system = (strength * keys) @ keys.mT * gap
    right = torch.cat([values, keys * decay.exp()], -1) * strength
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, forgotten = solved.split([v.shape[3], k.shape[3]], -1)  # u0 [.., C, Dv] and W [.., C, D]
    end = decay[..., -1:, :]
    kept = (keys * (end - decay).exp()).mT  # [.., D, C]
    identity = torch.eye(k.shape[3], dtype=wide, device=q.device)
    states = _states(end.exp() * identity - kept @ forgotten, kept @ fresh)
    added = (fresh - forgotten @ states)[:, :, None]
    weights = queries @ keys[:, :, None].mT * gap[:, :, None]
    o = weights @ added + (queries * decay[:, :, None].exp()) @ states[:, :, None]
    return o.flatten(1, 2).flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(dtype)


def _states(step: Tensor, add: Tensor) -> Tensor:
    """The state before each chunk, where a chunk makes step @ S + add of S, from S = 0: [B, H, N, D, Dv]."""
    count = step.shape[2]
    if count == 1:
        return torch.zeros_like(add)
    if count % 2:
        step, add = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (step, add))
    first, second = ((step[:, :, i::2], add[:, :, i::2]) for i in (0, 1))
    before = _states(second[0] @ first[0], second[0] @ first[1] + second[1])  # of each pair
    between = first[0] @ before + first[1]
    return torch.stack([before, between], 3).flatten(2, 3)[:, :, :count]


def _convolved(x: Tensor, taps: Tensor) -> Tensor:
    """SiLU of a causal convolution along the tokens of [B, T, H, D], by weights [H, D, TAPS] of each channel."""
    padded = F.pad(x, (0, 0, 0, 0, TAPS - 1, 0))
    mixed = sum(padded[:, i : i + x.shape[1]] * taps[..., i] for i in range(TAPS))
    assert isinstance(mixed, Tensor)
    return F.silu(mixed)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own has a gradient whose strides a compiled graph gets wrong (2.13)."""
    return torch.logaddexp(x, x.new_zeros(()))


@lru_cache
def _fla_kernel() -> Callable[..., Any] | None:
    """flash-linear-attention's kernel, or None where it is not installed."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule
