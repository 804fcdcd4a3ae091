"""Full causal softmax attention, the baseline, by PyTorch's own kernel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.peers.settings import PeerConfig


@dataclass(frozen=True, kw_only=True)
class FullConfig(PeerConfig):
    """Full attention in the shell of the other peers, with the same documents and padding: it has no settings.

    Example:
        >>> FullConfig().to_dict()
        {}
    """

    mixer: ClassVar[str] = "full"


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, q_start: int = 0, dropout_p: float = 0.0
) -> Tensor:
    """Attend to every key up to the query's own position.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762).

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D]; H divides HQ, heads are not repeated.
        v: values, [B, T, H, Dv].
        scale: factor on q.k; None means D ** -0.5.
        q_start: position of the first query; q_start + Tq equals T.
        dropout_p: probability of dropping an attention weight.
    Returns:
        o, [B, Tq, HQ, Dv].

    Example:
        >>> x = torch.randn(1, 5, 2, 4)
        >>> torch.allclose(full_attention(x, x, x)[:, 0], x[:, 0])
        True
    """
    mask = None
    if q_start:  # the kernel's own causal mask starts at key 0
        position = torch.arange(k.shape[1], device=q.device)
        mask = position <= position[q_start:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return o.transpose(1, 2)
