"""No attention at all: each token passes its own value on. The floor that no attention can be faster than."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bsbr.peers.settings import PeerConfig


@dataclass(frozen=True, kw_only=True)
class ValueOnlyConfig(PeerConfig):
    """Each token's attention output is its own value: it has no settings.

    Example:
        >>> ValueOnlyConfig.from_dict(ValueOnlyConfig().to_dict()).mixer
        'value_only'
    """

    mixer: ClassVar[str] = "value_only"


def value_only_attention(q: Tensor, v: Tensor, *, q_start: int = 0) -> Tensor:
    """Return each query's own value, repeated to the query heads.

    Args:
        q: queries, [B, Tq, HQ, D]; only their number is read.
        v: values, [B, T, H, Dv]; H divides HQ.
        q_start: position of the first query; q_start + Tq equals T.
    Returns:
        o, [B, Tq, HQ, Dv].

    Example:
        >>> import torch
        >>> v = torch.randn(1, 5, 2, 4)
        >>> torch.equal(value_only_attention(torch.randn(1, 1, 2, 8), v, q_start=4), v[:, 4:])
        True
    """
    return v[:, q_start:].repeat_interleave(q.shape[2] // v.shape[2], 2)
