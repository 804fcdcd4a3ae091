"""Linear attention: keys and values summed into one state of constant size, read through a positive feature map."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.peers.settings import PeerConfig

CHUNK = 64
"""Tokens that are worked on by one product of matrices."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig(PeerConfig):
    """Linear attention with the feature map elu(x) + 1: it has no settings.

    Example:
        >>> LinearConfig().mixer
        'linear'
    """

    mixer: ClassVar[str] = "linear"


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, q_start: int = 0) -> Tensor:
    """Average the values of all keys up to the query's position, weighed by phi(q).phi(k), phi(x) = elu(x) + 1.

    Source: Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236).

    1. Within a chunk of 64 tokens, the weights are formed and applied.
    2. Of the chunks before, the running sum of phi(k) v^T is read, a column of ones in v giving the sum of weights.

    Sums are in float32 (float64 for float64 input) whatever the dtype of the input.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D]; H divides HQ.
        v: values, [B, T, H, Dv].
        q_start: position of the first query; q_start + Tq equals T.
    Returns:
        o, [B, Tq, HQ, Dv], in the dtype of q.

    Example:
        >>> x = torch.randn(1, 5, 2, 4)
        >>> torch.allclose(linear_attention(x, x, x)[:, 0], x[:, 0], atol=1e-6)
        True
    """
    wide, tokens, key_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1], k.shape[2]
    ones = v.new_ones(v.shape[:3], dtype=wide)[..., None]
    features = F.pad(_features(q.to(wide)), (0, 0, 0, 0, q_start, 0))
    queries = chunks(features).unflatten(1, (key_heads, -1))  # [B, H, G, N, C, D]
    keys, values = chunks(_features(k.to(wide))), chunks(torch.cat([v.to(wide), ones], -1))  # [B, H, N, C, ...]
    states = (keys.mT @ values).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)[:, :, None]
    weights = (queries @ keys[:, :, None].mT).tril()
    read = weights @ values[:, :, None] + queries @ states
    read = read.flatten(1, 2).flatten(2, 3)[:, :, q_start:tokens].transpose(1, 2)  # [B, Tq, HQ, Dv + 1]
    return (read[..., :-1] / read[..., -1:].clamp(min=torch.finfo(wide).tiny)).to(q.dtype)


def chunks(x: Tensor) -> Tensor:
    """Cut tokens into chunks, the last one filled with zeros.

    Args:
        x: [B, T, H, ...].
    Returns:
        [B, H, N, CHUNK, ...].

    Example:
        >>> chunks(torch.ones(1, 65, 2, 3)).shape
        torch.Size([1, 2, 2, 64, 3])
    """
    missing = -x.shape[1] % CHUNK
    x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x
    return x.unflatten(1, (-1, CHUNK)).movedim(3, 1)


def _features(x: Tensor) -> Tensor:
    """elu(x) + 1 without the cancellation that gives 0 below -17."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
