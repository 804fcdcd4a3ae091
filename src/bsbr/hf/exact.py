"""A layer's own exact attention, for layers that stay as they are and for a model that teaches or is compared with."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

EXACT = "bsbr_exact"
"""Name under which transformers finds `exact_attention`, for stock models too."""


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

    PyTorch's own attention has no sinks: with `s_aux` it is the family's eager attention, as in the stock model. Its
    kernels for float32 on a GPU want as many key heads as query heads, and otherwise it forms the whole [Q, KV] matrix:
    there key heads are repeated.

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
        if query.is_cuda and query.dtype == torch.float32 and attention_mask is None:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            o = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, scale=scaling, is_causal=query.shape[2] > 1
            )
            return o.transpose(1, 2).contiguous(), None
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


def prepare_dense(model: Any) -> Any:
    """Let a stock model on a GPU attend by `exact_attention`; in float32 with grouped heads it is many times as fast.

    Args:
        model: a transformers model whose attention is PyTorch's; another one stays as it is.
    Returns:
        The same model.
    """
    if model.device.type == "cuda" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(EXACT)
    return model


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, sdpa_mask)
