"""The attention and mask functions that transformers finds under the name "bsbr".

This is the one place where tensors change between transformers' [B, H, T, D] and the ops' [B, T, H, D].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from bsbr.errors import UserError
from bsbr.hf.cache import BSBRLayer, layer_of
from bsbr.hf.exact import exact_attention
from bsbr.hf.families import NAME, bypass_message, dispatches
from bsbr.hf.mixers import Call, Mixer, attend, layer_settings
from bsbr.hf.parameters import take_hidden
from bsbr.hf.segments import Group, attend_by_document, layout

_CHANGES_SCORES = ("softcap", "position_bias")


def bsbr_attention_forward(
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
    """Attend as the model's config says; called by transformers in every attention module.

    1. A sliding-window layer stays as it was; a layer that the config leaves out reads its whole past.
    2. Keys that a BSBRCache gave out go back to it, with the queries.
    3. While the whole past is read exactly, it is PyTorch's own attention, without a copy.
    4. Otherwise the mixer runs on [B, T, H, D]; a mask is first turned into documents that start at position 0.

    Args:
        module: the attention module; its config, and what it learned in `module.bsbr`.
        query: [B, HQ, Q, D], the last Q positions of the keys.
        key: [B, H, KV, D], the cache's included; value: [B, H, KV, Dv].
        attention_mask: as made by `bsbr_mask`, or None.
        scaling: factor on q.k.
        dropout: probability of dropping an attention weight.
        s_aux: the layer's sinks, [HQ], of families that have them.
        kwargs: what the family passes besides; what would change the result is refused.
    Returns:
        o [B, Q, HQ, Dv], and None for the weights, which nobody computes.
    Raises:
        NotImplementedError: the call asks for something that block sparse attention does not do here.
    """
    run = _forward if query.is_cuda else _forward_uncompiled
    return run(module, query, key, value, attention_mask, scaling, dropout, s_aux, kwargs)


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float, s_aux: Tensor | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:  # fmt: skip
    if kwargs.get("sliding_window") is not None:
        return exact_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, s_aux=s_aux, **kwargs
        )
    layer = layer_of(key)
    past = 0 if layer is None else layer.get_seq_length()
    mixer, settings = layer_settings(module.config, module.layer_idx)  # type: ignore[arg-type]
    _refuse(module, past + key.shape[2], attention_mask, kwargs | ({} if mixer.knows_sinks else {"sinks": s_aux}))
    parameters: nn.Module | None = getattr(module, NAME, None)
    hidden = take_hidden(parameters)
    if layer is not None:
        cached = mixer._replace(attend=partial(_attend_cached, layer, attention_mask))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        call = Call(q, k, v, hidden, scaling, past, None, dropout, s_aux)
        return attend(call, cached, settings, parameters).to(query.dtype).contiguous(), None
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and s_aux is None and queries in (1, keys) and keys <= mixer.exact_until(settings):
        return exact_attention(module, query, key, value, None, scaling=scaling, dropout=dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    run = partial(_attend, mixer, settings, parameters, scaling, dropout, s_aux)
    if attention_mask is None:
        o = run(keys - queries, None, q, k, v, hidden)
    else:

        def attend_group(group: Group, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
            return run(group.q_start, group.lengths, q, k, v, hidden)

        o = attend_by_document(layout(attention_mask, queries), q, k, v, hidden, attend_group)
    return o.to(query.dtype).contiguous(), None


_forward_uncompiled = torch.compiler.disable(_forward)
"""On a CPU: `torch.compile` would unroll the loops over pieces, for minutes, and cannot see into the C code."""


def _attend_cached(layer: BSBRLayer, mask: Tensor | None, call: Call, settings: Any, parameters: Any) -> Tensor:
    if call.dropout_p:
        raise NotImplementedError("a BSBRCache has no dropout: call model.eval(), or use DynamicCache to train")
    calibration = None if parameters is None else parameters.calibration
    return layer.attend(call.q, call.k, call.v, mask, call.scale, calibration, call.sinks)


def _attend(
    mixer: Mixer,
    settings: Any,
    parameters: nn.Module | None,
    scale: float,
    dropout_p: float,
    sinks: Tensor | None,
    q_start: int,
    lengths: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
) -> Tensor:
    return attend(Call(q, k, v, hidden, scale, q_start, lengths, dropout_p, sinks), mixer, settings, parameters)


def _refuse(module: nn.Module, keys: int, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    for name in (*_CHANGES_SCORES, "sinks"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"bsbr attention has no {name}: use this model with its own attention")
    if not (getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]):
        raise NotImplementedError("bsbr attention is causal: bidirectional and cross attention are not supported")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("bsbr attention computes no attention weights: leave output_attentions off")
    if mask is None:
        return
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            "bsbr attention takes a 2-D attention_mask, [rows, tokens], 1 for a token and 0 for padding; "
            f"got {mask.dim()}-D {list(mask.shape)} {mask.dtype}"
        )
    if mask.shape[3] != keys:
        raise NotImplementedError(f"the attention mask is for {mask.shape[3]} keys, got {keys}")


def bsbr_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Say which document each key belongs to; called by transformers once per forward pass.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: of the call; q_offset is a tensor for a static cache.
        mask_function: which (row, head, query, key) may see each other, by index; carries packed documents.
        attention_mask: [B, tokens so far], True for real tokens; None means all.
        allow_is_causal_skip: False where the mask function is more than causal.
        use_vmap: True where the caller added a mask function of its own.
        device: of the mask.
        config: the model's.
        local_size: the window, for a sliding layer.
        kwargs: passed on for a sliding layer.
    Returns:
        int32 [B, 1, 1, KV] as `bsbr.hf.segments` describes it, or None where every key is real and in one document.
    Raises:
        UserError: the model's family asks for a mask but would never call the attention function.
        NotImplementedError: a mask that is not causal attention within documents.
    """
    if config is not None and not dispatches(config.model_type):
        raise UserError(bypass_message(config.model_type))
    if local_size is not None:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size=local_size,  # type: ignore[arg-type]
            allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, device=device, config=config, **kwargs,
        )  # fmt: skip
    if use_vmap:
        raise NotImplementedError("bsbr attention takes no mask functions of the caller's own")
    written = q_offset + q_length - kv_offset
    static = isinstance(written, Tensor) or written < kv_length
    document = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if attention_mask is not None:
        given = attention_mask[:, kv_offset : kv_offset + kv_length].int()
        document.zero_()[:, : given.shape[1]] = given
    elif static:
        pass
    elif allow_is_causal_skip or q_length != kv_length:
        return None
    elif q_length > 1:
        document = _documents(document, mask_function)
    if static:
        slot = torch.arange(kv_length, device=device)
        return torch.where(slot < written, document, -1)[:, None, None]
    return document[:, None, None] if bool((document != 1).any()) else None


def _documents(ones: Tensor, mask_function: Callable[..., Any]) -> Tensor:
    """Number the documents of a packed batch: where a token does not see the one before it, the next one starts."""
    batch, tokens = ones.shape
    row = torch.arange(batch, device=ones.device)[:, None]
    here, before = (torch.arange(first, tokens - 1 + first, device=ones.device)[None] for first in (1, 0))
    head = torch.zeros_like(row)
    if bool(mask_function(row, head, before, here).any()):
        raise NotImplementedError("bsbr attention is causal: tokens that see later ones are not supported")
    joined = mask_function(row, head, here, before).expand(batch, -1)
    ones[:, 1:] += (~joined).cumsum(1).int()
    return ones


AttentionInterface.register(NAME, bsbr_attention_forward)
AttentionMaskInterface.register(NAME, bsbr_mask)
