"""A layer's own exact attention, for layers that stay as they are and for a model that teaches."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attend as the stock model does; called like any attention function of transformers.

    PyTorch's own attention has no sinks: with `s_aux` it is the family's eager attention, as in the stock model.

    Args:
        module: the attention module.
        query: [B, HQ, Q, D]; key: [B, H, KV, D]; value: [B, H, KV, Dv].
        attention_mask: True where a query sees a key, [B, 1, Q, KV]; None means causal.
        scaling: factor on q.k.
        dropout: probability of dropping an attention weight.
        s_aux: the sinks, [HQ], or None.
        kwargs: what the family passes besides.
    Returns:
        o [B, Q, HQ, Dv], and the weights or None.
    """
    if s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is None:
        queries, keys = query.shape[2], key.shape[2]
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    added = torch.zeros_like(attention_mask, dtype=query.dtype)
    added.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, added, scaling=scaling, dropout=dropout, **kwargs)
