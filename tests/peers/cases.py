"""Inputs and the attention that peers are compared with."""

import torch
import torch.nn.functional as F


def draw(tokens, seed=0, heads=4, width=6):
    """Queries of `heads` heads, keys and values of two, in two rows."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, tokens, heads, width, generator=generator),
        *torch.randn(2, 2, tokens, 2, width, generator=generator),
    )


def plain(q, k, v, read):
    """Softmax attention where `read` [T, T] says, heads repeated."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=read).transpose(1, 2)
