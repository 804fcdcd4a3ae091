"""Key heads that read different numbers of blocks: those with the same number are one call, or one cache, of their own.

Most other parts of `bsbr.ops` then know one `top_k` only; GPU kernels take numbers of one power of two together. A key
head never needs another one's keys, values, summaries or choices, so nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig

_ONE_CALL = 1 << 15
"""Tokens up to which a call of kernels takes all heads, whatever they read."""


class Share(NamedTuple):
    """Key heads that are one call, or one cache."""

    heads: tuple[int, ...]
    """Their numbers, ascending."""
    config: BSBRConfig
    """The settings, with their number, or its next power of two, as `top_k`."""


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
        Share(heads, replace(config, top_k=number, top_k_per_head=None)) for number, heads in _heads_by(counts).items()
    ]


def shares_of_kernels(config: BSBRConfig, tokens: int) -> list[Share]:
    """Return the key heads that kernels take together: those whose numbers of blocks have the same next power of two.

    That power is their `top_k`: a kernel is written out for it and compiled once for each. Of a short text, which costs
    less to work on than to launch, all heads are taken together.

    Args:
        config: the settings, with a `top_k_per_head`.
        tokens: queries of the text.
    Returns:
        The shares, fewest blocks first; together they have every key head once. Their settings keep the numbers.

    Example:
        >>> config = BSBRConfig(top_k_per_head=(4, 0, 3))
        >>> [(share.heads, share.config.top_k) for share in shares_of_kernels(config, 1 << 20)]
        [((1,), 0), ((0, 2), 4)]
        >>> [(share.heads, share.config.top_k) for share in shares_of_kernels(config, 4096)]
        [((0, 1, 2), 4)]
    """
    counts = config.top_k_per_head or ()
    powers = [1 << (count - 1).bit_length() if count else 0 for count in counts]
    if tokens <= _ONE_CALL:
        powers = [max(powers)] * len(powers)
    shares = []
    for power, heads in _heads_by(powers).items():
        own_counts = tuple(counts[head] for head in heads)
        same = all(count == power for count in own_counts)
        shares.append(Share(heads, replace(config, top_k=power, top_k_per_head=None if same else own_counts)))
    return shares


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
    index = _query_heads(heads, x.shape[dim] // key_heads)
    return x.index_select(dim, on_device(index, x.device))


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
    index = _query_heads([head for own in heads for head in own], group)
    order = tuple(sorted(range(len(index)), key=index.__getitem__))
    return torch.cat(list(parts), dim).index_select(dim, on_device(order, parts[0].device))


def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Put a few numbers on a device, once: a copy from the host would wait for the GPU, and no CUDA graph can hold it.

    For numbers that settings give, which are few; `bsbr.ops.pieces.row_numbers` forgets those of calls long ago.

    Args:
        numbers: integers.
        device: where to.
    Returns:
        The same tensor each time, [N] int64.

    Example:
        >>> on_device((2, 3), torch.device("cpu")).tolist()
        [2, 3]
    """
    return torch.tensor(numbers, device=device) if torch.compiler.is_compiling() else _kept(numbers, device)


@cache
def _kept(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _heads_by(numbers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The heads that have each number, least number first."""
    return {number: tuple(head for head, own in enumerate(numbers) if own == number) for number in sorted(set(numbers))}


def _query_heads(heads: Sequence[int], group: int) -> tuple[int, ...]:
    """Numbers of the query heads of key heads."""
    return tuple(head * group + member for head in heads for member in range(group))
