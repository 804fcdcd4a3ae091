"""Softmax attention on many small dense tiles at once, with its log-sum-exp, forward and backward.

On a CPU in float32, bfloat16 and float16 the work is PyTorch's own fused kernel; everywhere else, in float64 and
with dropout it is two matrix products, in float32 or better.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Scores held at once by the plain path: bounds its memory whatever the number of tiles."""


class Dropout(NamedTuple):
    """Dropout of attention weights that a backward pass can repeat."""

    p: float
    """Probability of dropping a weight; 0 switches dropout off."""
    seed: int
    """Start of the random stream; each place that drops weights adds its own offset."""

    def mask(self, like: Tensor, offset: int) -> Tensor:
        """Return factors 0 or 1 / (1 - p) in the shape of `like`, the same for the same offset."""
        generator = torch.Generator(device=like.device).manual_seed(self.seed + offset)
        keep = torch.rand(like.shape, generator=generator, device=like.device) >= self.p
        return keep.to(like.dtype) / (1 - self.p)


NO_DROPOUT = Dropout(0.0, 0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: int | None, dropout: Dropout = NO_DROPOUT, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Attend within each tile.

    Args:
        q: queries, [Z, G, S, D].
        k: keys, [Z, R, D], shared by the G heads.
        v: values, [Z, R, Dv].
        scale: factor on q.k.
        first: query s sees keys 0 to first + s; None means all of them.
        dropout: dropout of the weights; lse is not affected.
        offset: which stream of the dropout to use.
    Returns:
        o [Z, G, S, Dv] in the dtype of q, and lse [Z, G, S] in float32 or better.

    Example:
        >>> x = torch.randn(3, 1, 8, 4)
        >>> o, lse = attend(x, x[:, 0], x[:, 0], 0.5, first=0)
        >>> torch.allclose(o[:, :, 0], x[:, :, 0])
        True
    """
    if _fused(q, v, dropout):
        is_causal, mask = _fused_mask(q, k, first)
        return torch._scaled_dot_product_flash_attention_for_cpu(
            q, k[:, None], v[:, None], 0.0, is_causal, attn_mask=mask, scale=scale
        )
    o, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_accumulator(q))
    for part in _parts(q, k):
        scores = _scores(q[part], k[part], scale, first)
        lse[part] = scores.logsumexp(-1)
        weights = scores.sub_(lse[part].unsqueeze(-1)).exp_()
        if dropout.p:
            weights *= dropout.mask(weights, offset + part.start)
        o[part] = weights @ v[part, None].to(weights.dtype)
    return o, lse


def attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    first: int | None,
    dropout: Dropout = NO_DROPOUT,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the tiles' share of a softmax that may run over more keys than theirs.

    Source: Dao et al., FlashAttention (arXiv 2205.14135), with o and lse of the whole softmax: then the sum of
    the parts' gradients is the gradient of the whole.

    Args:
        do: gradient of o, [Z, G, S, Dv].
        q, k, v, scale, first, dropout, offset: as given to `attend`.
        o: output of the whole softmax, [Z, G, S, Dv].
        lse: its log-sum-exp, [Z, G, S]; +inf makes a query contribute nothing.
    Returns:
        dq [Z, G, S, D], dk [Z, R, D], dv [Z, R, Dv], in the dtype of q or of lse.

    Example:
        >>> x = torch.randn(3, 1, 8, 4)
        >>> o, lse = attend(x, x[:, 0], x[:, 0], 0.5, first=0)
        >>> dq, dk, dv = attend_backward(torch.ones_like(o), x, x[:, 0], x[:, 0], o, lse, 0.5, first=0)
        >>> torch.allclose(dv.sum(), o.new_tensor(o.numel()))
        True
    """
    if _fused(q, v, dropout):
        wide_k, wide_v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
        is_causal, mask = _fused_mask(q, k, first)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, wide_k, wide_v, o, lse, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return dq, dk.sum(1), dv.sum(1)
    do, q, k, v, o = (x.to(lse.dtype) for x in (do, q, k, v, o))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (do * o).sum(-1, keepdim=True)
    for part in _parts(q, k):
        weights = _scores(q[part], k[part], scale, first).sub_(lse[part].unsqueeze(-1)).exp_()
        dweights = do[part] @ v[part, None].mT
        kept = weights
        if dropout.p:
            mask = dropout.mask(weights, offset + part.start)
            kept, dweights = weights * mask, dweights * mask
        dv[part] = (kept.mT @ do[part]).sum(1)
        dscores = (weights * (dweights - delta[part])).mul_(scale)
        dq[part] = dscores @ k[part, None]
        dk[part] = (dscores.mT @ q[part]).sum(1)
    return dq, dk, dv


def _fused(q: Tensor, v: Tensor, dropout: Dropout) -> bool:
    return q.device.type == "cpu" and q.dtype != torch.float64 and q.shape[-1] == v.shape[-1] and not dropout.p


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    most = _ELEMENTS.get(q.device.type, _ELEMENTS["cpu"])
    step = max(1, most // max(1, q.shape[1] * q.shape[2] * k.shape[1]))
    return [slice(i, min(i + step, q.shape[0])) for i in range(0, q.shape[0], step)]


def _later(q: Tensor, k: Tensor, first: int) -> Tensor:
    """True where a key comes after what the query may see, [S, R]."""
    return torch.ones(q.shape[2], k.shape[1], dtype=torch.bool, device=q.device).triu_(first + 1)


def _fused_mask(q: Tensor, k: Tensor, first: int | None) -> tuple[bool, Tensor | None]:
    """How the fused kernel is told `first`: it aligns causal queries with key 0 and takes masks in q's dtype."""
    if first is None or first >= k.shape[1] - 1:
        return False, None
    if first == 0:
        return True, None
    return False, q.new_zeros(q.shape[2], k.shape[1]).masked_fill_(_later(q, k, first), -math.inf)


def _scores(q: Tensor, k: Tensor, scale: float, first: int | None) -> Tensor:
    dtype = _accumulator(q)
    scores = (q.to(dtype) @ k[:, None].to(dtype).mT).mul_(scale)
    return scores if first is None else scores.masked_fill_(_later(q, k, first), -math.inf)
