"""Which past blocks a query reads: the top_k of largest estimated mass, ties to the lower index, or the latest."""

import math

import torch
from torch import Tensor

from bsbr.config import BSBRConfig, Selection


def select_blocks(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Choose the `top_k` blocks of largest score for every query.

    Exactly equal scores go to the lower block index, so a choice never depends on how memory is laid out. The best
    are taken one by one along contiguous queries, which a CPU vectorises, where `torch.topk` goes row by row; a GPU
    sorts.

    Args:
        scores: [Z, G, N, S], -inf for a block that is not past; at least `top_k` others for every query. Those of
            the chosen blocks are overwritten with -inf.
        top_k: blocks to choose, 1 to N.
        selection: "head" chooses for each of the G query heads, "group" once for all of them, by the largest
            of their block probabilities; "recent" takes the latest past blocks, whatever their scores.
    Returns:
        Block indices, [Z, G, top_k, S] int64, best first.

    Example:
        >>> select_blocks(torch.tensor([3.0, 1.0, 3.0, 4.0]).view(1, 1, 4, 1), 2, "head").flatten().tolist()
        [3, 0]
    """
    if selection == "recent":
        turns = torch.arange(top_k, device=scores.device)[:, None]
        chosen = latest_of(scores) - turns
        scores.scatter_(-2, chosen, -math.inf)
        return chosen
    if selection == "group" and scores.shape[1] > 1:
        shared = (scores - scores.logsumexp(-2, keepdim=True)).amax(1, keepdim=True)
        chosen = _take_best(shared, top_k).expand(-1, scores.shape[1], -1, -1)
        scores.scatter_(-2, chosen, -math.inf)
        return chosen
    return _take_best(scores, top_k)


def latest_of(scores: Tensor) -> Tensor:
    """Return the last past block of every query.

    Args:
        scores: [..., N, S], -inf for a block that is not past.
    Returns:
        Block indices, [..., 1, S] int64.

    Example:
        >>> latest_of(torch.tensor([0.5, -1.0, -math.inf])[:, None]).item()
        1
    """
    number = torch.arange(scores.shape[-2], device=scores.device)[:, None]
    return torch.where(scores == -math.inf, -1, number).amax(-2, keepdim=True)


def past_blocks(position: Tensor, config: BSBRConfig) -> Tensor:
    """Return how many retrieval blocks are past at each position.

    Args:
        position: any shape, integers.
        config: the settings.
    Returns:
        Their numbers, of the same shape.

    Example:
        >>> past_blocks(torch.tensor([3, 4, 11]), BSBRConfig(block_size=4, top_k=1)).tolist()
        [0, 1, 2]
    """
    return position // config.block_size * (config.block_size // config.unit)


def recent_blocks(q: Tensor, config: BSBRConfig, q_start: int = 0) -> Tensor:
    """Return the latest past blocks of every query, as `block_indices` of `bsbr_attention`.

    Args:
        q: queries, [B, Tq, HQ, D].
        config: the settings.
        q_start: position of the first query.
    Returns:
        Block indices, [B, Tq, HQ, top_k] int64, ascending, -1 where fewer are past; a view of [Tq, top_k] numbers.

    Example:
        >>> recent_blocks(torch.zeros(1, 9, 1, 4), BSBRConfig(block_size=4, top_k=1))[0, :, 0, 0].tolist()
        [-1, -1, -1, -1, 0, 0, 0, 0, 1]
    """
    position = torch.arange(q_start, q_start + q.shape[1], device=q.device)
    past = past_blocks(position, config)[:, None]
    index = (past - config.top_k).clamp(min=0) + torch.arange(config.top_k, device=q.device)
    index = index.masked_fill(index >= past, -1)
    return index[None, :, None].expand(q.shape[0], -1, q.shape[2], -1)


def _sort_best(scores: Tensor, top_k: int) -> Tensor:
    """The same by one stable sort: on a GPU each of the many passes below would be several launches."""
    chosen = scores.sort(dim=-2, descending=True, stable=True).indices[..., :top_k, :]
    scores.scatter_(-2, chosen, -math.inf)
    return chosen


def _take_best(scores: Tensor, top_k: int) -> Tensor:
    """The best one after the other, each replaced by -inf.

    A maximum and comparisons that give 0 and 1 as floats are vectorised; a maximum with indices is not.
    """
    if scores.is_cuda:
        return _sort_best(scores, top_k)
    count = scores.shape[-2]
    earliness = torch.arange(count, 0, -1, dtype=scores.dtype, device=scores.device)[:, None]
    equal, taken = torch.empty_like(scores), []
    for turn in range(top_k):
        top = scores.amax(-2, keepdim=True)
        if not turn and bool(top.isnan().any()):  # no number comes first, as in a sort, and so shows
            chosen = _take_best(scores.masked_fill(scores.isnan(), math.inf), top_k)
            scores.scatter_(-2, chosen, -math.inf)
            return chosen
        torch.eq(scores, top, out=equal)
        first = count - equal.mul_(earliness).amax(-2, keepdim=True)  # of equals
        taken.append(first.long())
        scores.scatter_(-2, taken[-1], -math.inf)
    return torch.cat(taken, -2)
