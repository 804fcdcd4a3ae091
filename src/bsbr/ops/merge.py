"""Joining softmax attentions over disjoint sets of keys."""

import torch
from torch import Tensor


def merge_attn_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two softmax attentions over disjoint sets of keys into one.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).

    1. Take lse = log(exp(lse_a) + exp(lse_b)).
    2. Weigh each output by exp(lse_part - lse), and add.

    A part with lse -inf is empty and changes nothing; if both are, o is 0 and lse is -inf.

    Args:
        o_a, o_b: partial outputs, [..., Dv].
        lse_a, lse_b: natural log of the summed exp of scaled scores, [...], float32 or float64.
    Returns:
        o [..., Dv] in the dtype of o_a, and lse [...].
    Raises:
        ValueError: the shapes of the two parts differ.

    Example:
        >>> o, lse, none = torch.ones(1, 2, 4, 8), torch.zeros(1, 2, 4), torch.full((1, 2, 4), -torch.inf)
        >>> torch.equal(merge_attn_states(o, lse, torch.zeros_like(o), none)[0], o)
        True
    """
    if o_a.shape != o_b.shape or lse_a.shape != lse_b.shape:
        raise ValueError(
            f"parts must have equal shapes, got {list(o_a.shape)} and {list(o_b.shape)}: "
            "merge outputs of the same queries"
        )
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # -inf - -inf would be nan
    weight_a, weight_b = ((part - finite).exp_().unsqueeze(-1) for part in (lse_a, lse_b))
    return (weight_a * o_a).addcmul_(weight_b, o_b).to(o_a.dtype), lse
