"""The queries that read their whole past: PyTorch's own kernels."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bsbr.ops.tiles import attend, attend_backward


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole text, differentiable: one call of PyTorch's, and nothing before or after it.

    Args:
        q: [B, T, HQ, D]; k, v: [B, T, H, D], 16-bit and on a GPU.
        scale: factor on q.k.
    Returns:
        o [B, T, HQ, D] in the dtype of q.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if _on_hopper(q) else SDPBackend.FLASH_ATTENTION):
        q, k, v = _heads_first(q, k, v)
        o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return o.transpose(1, 2)


def attend_prefix(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of the first tokens, [B, P, heads, D]; returns o in that layout and lse [B, P, HQ]."""
    if _on_hopper(q):  # twice as fast as the next one there
        o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, True, scale=scale
        )[:2]  # fmt: skip
        return o.transpose(1, 2), lse.view(q.shape[0], q.shape[2], -1).transpose(1, 2)
    if has_flash(q):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            *_heads_first(q, k, v), 0.0, True, scale=scale
        )[:2]  # fmt: skip
        return o.transpose(1, 2), lse.transpose(1, 2)
    o, lse = attend(*_by_key_head(q, k, v), scale, 0)
    return _back(o, q), _back(lse, q)


def prefix_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of `attend_prefix`, in its layout."""
    if _on_hopper(q):
        length, unused = q.shape[1], torch.zeros(2, dtype=torch.int64, device=q.device)
        own_lse = lse.transpose(1, 2).contiguous()[..., None]
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(do, q, k, v, o), own_lse, unused[0], unused[1], None, None, None, length, length, 0.0, True,
            scale=scale,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in gradients)  # type: ignore[return-value]
    if has_flash(q):
        length, unused = q.shape[1], torch.zeros(2, dtype=torch.uint64, device=q.device)
        own_lse = lse.transpose(1, 2).contiguous()
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *_heads_first(do, q, k, v, o), own_lse, None, None, length, length, 0.0, True, unused, unused[0],
            scale=scale,
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in gradients)  # type: ignore[return-value]
    folded_q, folded_k, folded_v = _by_key_head(q, k, v)
    folded_do, folded_o, folded_lse = (_by_key_head(x, k, v)[0] for x in (do, o, lse))
    dq, dk, dv = attend_backward(folded_do, folded_q, folded_k, folded_v, folded_o, folded_lse, scale, 0)
    return _back(dq, q), *(x.unflatten(0, (k.shape[0], -1)).transpose(1, 2) for x in (dk, dv))


def has_flash(q: Tensor) -> bool:
    """Whether PyTorch has a fused kernel for such queries on their device."""
    return q.is_cuda and q.element_size() == 2


def _on_hopper(q: Tensor) -> bool:
    return has_flash(q) and q.shape[3] <= 128 and torch.cuda.get_device_capability(q.device)[0] == 9


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [Z, G, P, ...], k and v [Z, P, D]."""
    folded = q.unflatten(2, (k.shape[2], -1)).movedim(1, 3).flatten(0, 1)
    return folded, *(x.transpose(1, 2).flatten(0, 1) for x in (k, v))


def _back(x: Tensor, q: Tensor) -> Tensor:
    """[Z, G, P, ...] -> [B, P, HQ, ...]."""
    return x.unflatten(0, (q.shape[0], -1)).flatten(1, 2).transpose(1, 2)
