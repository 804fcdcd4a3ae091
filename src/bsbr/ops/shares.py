"""Key heads that read different numbers of blocks: those with the same number are one call, or one cache, of their own.

Every other part of `bsbr.ops` then knows one `top_k` only. A key head never needs another one's keys, values, summaries
or choices, so nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig


class Share(NamedTuple):
    """Key heads that read the same number of blocks."""

    heads: tuple[int, ...]
    """Their numbers, ascending."""
    config: BSBRConfig
    """The settings, with their number as `top_k`."""


def shares_of(config: BSBRConfig) -> list[Share]:
    """Return the key heads of each number of blocks.

    Args:
        config: the settings, with a `top_k_per_head`.
    Returns:
        The shares, fewest blocks first; together they have every key head once.

    Example:
        >>> [(share.heads, share.config.top_k) for share in shares_of(BSBRConfig(top_k_per_head=(4, 1, 4)))]
        [((1,), 1), ((0, 2), 4)]
    """
    counts = config.top_k_per_head or ()
    return [
        Share(
            tuple(head for head, count in enumerate(counts) if count == number),
            replace(config, top_k=number, top_k_per_head=None),
        )
        for number in sorted(set(counts))
    ]


def take_share(x: Tensor, heads: Sequence[int], key_heads: int, dim: int = 2) -> Tensor:
    """Take the part of a tensor that belongs to some key heads.

    Args:
        x: a tensor whose axis `dim` runs over key heads, or over the query heads of each key head in turn.
        heads: key heads.
        key_heads: key heads in all.
        dim: the axis.
    Returns:
        Their part; x itself where it is all of them.

    Example:
        >>> take_share(torch.arange(6), (1,), 3, dim=0).tolist()
        [2, 3]
    """
    if len(heads) == key_heads:
        return x
    index = _query_heads(heads, x.shape[dim] // key_heads, x.device)
    return x.index_select(dim, index)


def join_shares(parts: Sequence[Tensor], heads: Sequence[Sequence[int]], dim: int = 2) -> Tensor:
    """Put parts back in the order of their heads.

    Args:
        parts: one tensor for each share, as `take_share` takes them.
        heads: key heads of each.
        dim: the axis of the heads.
    Returns:
        One tensor.

    Example:
        >>> join_shares([torch.tensor([2, 3]), torch.tensor([0, 1])], [(1,), (0,)], dim=0).tolist()
        [0, 1, 2, 3]
    """
    if len(parts) == 1:
        return parts[0]
    group = parts[0].shape[dim] // len(heads[0])
    order = _query_heads([head for own in heads for head in own], group, parts[0].device)
    return torch.cat(list(parts), dim).index_select(dim, order.argsort())


def _query_heads(heads: Sequence[int], group: int, device: torch.device) -> Tensor:
    """Numbers of the query heads of key heads."""
    first = torch.tensor(heads, device=device)[:, None] * group
    return (first + torch.arange(group, device=device)).flatten()
