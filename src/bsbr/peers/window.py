"""Sliding-window attention: each query reads the same number of latest keys, wherever it stands."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.peers.settings import PeerConfig


@dataclass(frozen=True, kw_only=True)
class WindowConfig(PeerConfig):
    """Sliding-window attention.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> WindowConfig().window
        512
    """

    mixer: ClassVar[str] = "window"

    window: int = 512
    """Keys that a query reads, its own included."""

    def __post_init__(self) -> None:
        self._require(window=1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 512,
    scale: float | None = None,
    q_start: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to the `window` latest keys, the query's own included.

    Source: Beltagy et al., "Longformer" (arXiv 2004.05150), the causal form that Mistral uses (arXiv 2310.06825).

    1. Queries are cut into blocks of `window` tokens. Such a block reads its own keys and those of the block before.
    2. All blocks but the first are rows of one call of PyTorch's attention, under one mask [window, 2 * window]: memory
       is linear in the tokens, and twice the least work is done.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D]; H divides HQ.
        v: values, [B, T, H, Dv].
        window: keys that a query reads.
        scale: factor on q.k; None means D ** -0.5.
        q_start: position of the first query; q_start + Tq equals T.
        dropout_p: probability of dropping an attention weight.
    Returns:
        o, [B, Tq, HQ, Dv].

    Example:
        >>> x = torch.randn(1, 9, 2, 4)
        >>> torch.allclose(window_attention(x, x, x, window=1), x)
        True
    """
    queries, size = q.shape[1], min(window, q.shape[1])
    first = max(0, q_start - window + 1)  # earliest key that the first query reads
    heads = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads, 2) for x in (k, v))  # no kernel of PyTorch has both a mask and grouped heads
    o = _read(q[:, :size], k[:, first : q_start + size], v[:, first : q_start + size], window, scale, dropout_p)
    if size == queries:
        return o
    blocks = -(-(queries - size) // window)
    missing = (0, 0, 0, 0, 0, (blocks + 1) * window - queries)
    rest = F.pad(q[:, size:], missing).unflatten(1, (blocks, window)).flatten(0, 1)
    k, v = (F.pad(x[:, q_start:], missing).unflatten(1, (blocks + 1, window)) for x in (k, v))
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1) for x in (k, v))  # [B * blocks, 2 * window, HQ, D]
    late = _read(rest, k, v, window, scale, dropout_p).unflatten(0, (-1, blocks)).flatten(1, 2)
    return torch.cat([o, late[:, : queries - size]], 1)


def _read(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, dropout_p: float) -> Tensor:
    """Attend from the last positions of the keys, each query to its window."""
    queries, keys = q.shape[1], k.shape[1]
    mask = None
    if queries != keys or keys > window:
        distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
        mask = (distance >= 0) & (distance < window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None, scale=scale
    )
    return o.transpose(1, 2)
