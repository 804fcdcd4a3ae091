"""Attention sinks: one more logit for each head under the softmax, with a value of zero."""

import torch
from torch import Tensor


def add_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Put a sink under the softmax of an attention that was computed without it.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), as gpt-oss
    learns them. Exact for any attention that knows its log-sum-exp: the sink takes the share
    exp(sink) / (exp(lse) + exp(sink)) of every weight and gives nothing.

    Args:
        o: output without sinks, [B, Tq, HQ, Dv].
        lse: its log-sum-exp, [B, Tq, HQ].
        sinks: a logit for each head, [HQ].
    Returns:
        The output in the dtype of o, and the log-sum-exp with the sink.

    Example:
        >>> o, lse = add_sinks(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1), torch.zeros(1))
        >>> o.flatten().tolist(), torch.equal(lse.exp(), torch.full((1, 1, 1), 2.0))
        ([0.5, 0.5], True)
    """
    sinks = sinks.to(lse.dtype)
    share = (lse - sinks).sigmoid()[..., None]
    return (o * share).to(o.dtype), torch.logaddexp(lse, sinks)


def sinks_gradient(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of the sinks; all other gradients are those of the attention itself with this o and lse.

    Args:
        do: gradient of the output, [B, Tq, HQ, Dv].
        o, lse: as `add_sinks` returned them.
        sinks: [HQ].
    Returns:
        The gradient, [HQ], in the dtype of sinks.

    Example:
        >>> o, lse = add_sinks(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1))
        >>> round(sinks_gradient(torch.ones(1, 1, 1, 1), o, lse, torch.zeros(1)).item(), 6)
        -0.25
    """
    share = (sinks.to(lse.dtype) - lse).exp()
    return -(share * (do.to(lse.dtype) * o).sum(-1)).sum((0, 1)).to(sinks.dtype)
