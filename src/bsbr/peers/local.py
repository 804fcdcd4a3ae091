"""Local attention: the own block alone, the control that says what the past is worth."""

from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 128,
    scale: float | None = None,
    q_start: int = 0,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to the keys of the query's own block, up to its own position.

    Source: BSBR without retrieval: `BSBRConfig(top_k=0, far="drop", dense_below=0)`.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D].
        v: values, [B, T, H, Dv].
        block_size: tokens of a block.
        scale, q_start, lengths, dropout_p: as for `bsbr.ops.bsbr_attention`.
    Returns:
        o, [B, Tq, HQ, Dv].

    Example:
        >>> import torch
        >>> x = torch.randn(1, 5, 2, 4)
        >>> torch.allclose(local_attention(x, x, x, block_size=2)[:, 4], x[:, 4])
        True
    """
    config = BSBRConfig(block_size=block_size, top_k=0, far="drop", dense_below=0)
    o = bsbr_attention(q, k, v, config, scale=scale, q_start=q_start, lengths=lengths, dropout_p=dropout_p)
    assert isinstance(o, Tensor)
    return o
