"""Which past blocks a query reads: the top_k of largest estimated mass, ties to the lower index."""

import math

import torch
from torch import Tensor

from bsbr.config import Selection


_GROUP = 8
"""Blocks looked at together: a maximum over groups and one inside a group are less work than one over all blocks."""


def select_blocks(scores: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Choose the `top_k` blocks of largest score for every query.

    Exactly equal scores go to the lower block index, so a choice never depends on how memory is laid out. The best
    are taken one by one along contiguous queries, which a CPU vectorises, where `torch.topk` goes row by row.

    Args:
        scores: [Z, G, N, S], -inf for a block that is not past; at least `top_k` others for every query.
        top_k: blocks to choose, 1 to N.
        selection: "head" chooses for each of the G query heads, "group" once for all of them, by the largest
            of their block probabilities.
    Returns:
        Block indices, [Z, G, top_k, S] int64, best first.

    Example:
        >>> select_blocks(torch.tensor([3.0, 1.0, 3.0, 4.0]).view(1, 1, 4, 1), 2, "head").flatten().tolist()
        [3, 0]
    """
    if selection == "group" and scores.shape[1] > 1:
        shared = (scores - scores.logsumexp(-2, keepdim=True)).amax(1, keepdim=True)
        return _select(shared, top_k).expand(-1, scores.shape[1], -1, -1)
    return _select(scores, top_k)


def _select(scores: Tensor, top_k: int) -> Tensor:
    missing = -scores.shape[-2] % _GROUP
    rest = torch.nn.functional.pad(scores, (0, 0, 0, missing), value=-math.inf).unflatten(-2, (-1, _GROUP))
    best = rest.amax(-2)  # of each group, [Z, G, N / 8, S]
    chosen = []
    for _ in range(top_k):
        group = best.max(-2, keepdim=True).indices  # the first of equals, [Z, G, 1, S]
        members = rest.gather(-3, group.unsqueeze(-2).expand(-1, -1, -1, _GROUP, -1)).squeeze(-3)
        member = members.max(-2, keepdim=True).indices
        chosen.append(group * _GROUP + member)
        rest.flatten(-3, -2).scatter_(-2, chosen[-1], -math.inf)
        best.scatter_(-2, group, members.scatter_(-2, member, -math.inf).amax(-2, keepdim=True))
    return torch.cat(chosen, -2)
