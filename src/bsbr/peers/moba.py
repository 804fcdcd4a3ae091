"""Mixture of block attention: retrieval by mean key, and nothing of the blocks not read."""

from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 8,
    scale: float | None = None,
    q_start: int = 0,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to the own block and to the `top_k` past blocks whose mean key fits the query best.

    Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv 2502.13189). Here `top_k`
    counts past blocks; the own block is always read.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D].
        v: values, [B, T, H, Dv].
        block_size: tokens of a block.
        top_k: past blocks each query head reads.
        scale, q_start, lengths, dropout_p: as for `bsbr.ops.bsbr_attention`.
    Returns:
        o, [B, Tq, HQ, Dv].

    Example:
        >>> import torch
        >>> moba_attention(*torch.randn(3, 1, 9, 2, 4), block_size=2, top_k=1).shape
        torch.Size([1, 9, 2, 4])
    """
    config = BSBRConfig(block_size=block_size, top_k=top_k, far="drop", dense_below=0)
    o = bsbr_attention(q, k, v, config, scale=scale, q_start=q_start, lengths=lengths, dropout_p=dropout_p)
    assert isinstance(o, Tensor)
    return o
