"""Which positions a figure is about: all, exposed to the approximation, by place, key tokens."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

KEY_TOKEN_NATS = 1.0
MARGINS = (0.0, 0.1, 0.3, 0.6, 1.0)


def first_exposed(*, block_size: int, top_k: int, retrieval_block_size: int | None = None, dense_below: int = 0) -> int:
    """First position of a query that had at least one earlier block not read exactly.

    A query reads its own block exactly and `top_k` retrieval blocks before it. So the first exposed query
    opens the first block that has more than `top_k` retrieval blocks before it.

    Args:
        block_size: tokens of a block.
        top_k: retrieval blocks read exactly.
        retrieval_block_size: tokens of a retrieval block; None means `block_size`.
        dense_below: queries below this position are exact.
    Returns:
        A position; every position from there on is exposed.

    Example:
        >>> first_exposed(block_size=128, top_k=2)
        384
        >>> first_exposed(block_size=128, top_k=0)
        128
    """
    unit = retrieval_block_size or block_size
    return max(dense_below, block_size * (top_k * unit // block_size + 1))


def position_edges(window: int, *, first: int = 256) -> list[int]:
    """Edges of position buckets that double: 0, 256, 512, 1024 ... up to the window.

    Args:
        window: longest context.
        first: end of the first bucket.
    Returns:
        Rising edges; the last one is >= window.

    Example:
        >>> position_edges(1000)
        [0, 256, 512, 1024]
    """
    edges = [0, first]
    while edges[-1] < window:
        edges.append(edges[-1] * 2)
    return edges


def bucket_masks(
    positions: Tensor,
    *,
    window: int,
    exposed_from: int | None,
    margin: Tensor | None = None,
    key_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Say for each scored position which buckets it belongs to.

    Args:
        positions: positions of the queries in their window, [T], int64.
        window: longest context, for the edges.
        exposed_from: first exposed position (`first_exposed`); None where nothing is approximated.
        margin: the original's probability of its first token less its second, [T].
        key_tokens: which tokens need long context, [T], bool.
    Returns:
        Boolean masks [T]: "all"; "exposed" and "not exposed"; "0-256" and so on; "margin 0.0-0.1" and so on;
        "key tokens". Without the argument a bucket needs, it is absent.

    Example:
        >>> {name: int(mask.sum()) for name, mask in bucket_masks(
        ...     torch.arange(300), window=300, exposed_from=200).items()}
        {'all': 300, 'exposed': 100, 'not exposed': 200, '0-256': 256, '256-512': 44}
    """
    masks = {"all": torch.ones_like(positions, dtype=torch.bool)}
    if exposed_from is not None:
        masks["exposed"] = positions >= exposed_from
        masks["not exposed"] = positions < exposed_from
    edges = position_edges(window)
    for low, high in itertools.pairwise(edges):
        masks[f"{low}-{high}"] = (positions >= low) & (positions < high)
    if margin is not None:
        for least, most in itertools.pairwise(MARGINS):
            below = margin <= most if most == MARGINS[-1] else margin < most
            masks[f"margin {least}-{most}"] = (margin >= least) & below
    if key_tokens is not None:
        masks["key tokens"] = key_tokens
    return masks


def sum_by_bucket(values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Sum every metric over every bucket in float64.

    Args:
        values: metric name to vector [T].
        masks: from `bucket_masks`.
    Returns:
        Bucket to {"n": positions, metric: sum}; empty buckets are absent.

    Example:
        >>> sum_by_bucket({"kl": torch.tensor([1.0, 2.0])}, {"all": torch.tensor([True, True])})
        {'all': {'n': 2, 'kl': 3.0}}
    """
    result: dict[str, dict[str, float]] = {}
    for bucket, mask in masks.items():
        n = int(mask.sum())
        if n:
            # One vector at a time: columns of one table are summed in an order that depends on how many there are.
            sums = {name: float(vector[mask].double().sum()) for name, vector in values.items()}
            result[bucket] = {"n": n, **sums}
    return result
