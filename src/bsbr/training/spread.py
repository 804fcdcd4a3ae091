"""Spreading `top_k` over key heads by need: some look far and wide, others hardly beyond their own block."""

import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.training.calibration_fit import attention_output
from bsbr.training.calibration_sample import Sample

_TIMES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4, 6, 8)
"""Numbers that a head may get, as multiples of `top_k`; few, since heads with the same number work together."""


def candidate_counts(top_k: int, num_blocks: int) -> tuple[int, ...]:
    """Return the numbers of blocks that a head may get.

    Args:
        top_k: their mean.
        num_blocks: past blocks at the end of a window of the calibration; more than half of them cannot be judged.
    Returns:
        Ascending numbers from 0; `top_k` is one of them.

    Example:
        >>> candidate_counts(4, 64)
        (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    """
    most = max(top_k, num_blocks // 2)
    return tuple(sorted({0, *(min(most, int(top_k * times)) for times in _TIMES)}))


@torch.no_grad()
def error_curve(sample: Sample, config: BSBRConfig, calibration: Tensor, counts: Sequence[int]) -> Tensor:
    """Measure the error of each key head for each number of blocks it could read.

    The error of a query head is its squared error over its squared norm, times the square root of its share of the
    layer's squared norm: between what matters to the head and what matters to the layer (docs/log.md compares).

    Args:
        sample: from `take_sample`, of all heads of the layer or some.
        config: the settings.
        calibration: scalars, [HQ, 5].
        counts: numbers of blocks, ascending.
    Returns:
        Errors that do not rise with the number, [len(counts), H].
    """
    norm = sample.target.square().sum((0, 2, 3))
    curve = []
    for count in counts:
        o = attention_output(sample, replace(config, top_k=count, top_k_per_head=None), calibration)
        error = (o - sample.target).square().sum((0, 2, 3)) / norm
        curve.append((error * norm.sqrt()).view(sample.key_heads, -1).sum(1))
    return torch.stack(curve).cummin(0).values


def spread(curves: Sequence[Tensor], counts: Sequence[int], top_k: int) -> list[tuple[int, ...]]:
    """Give each key head the number of blocks that makes the sum of errors small, at a mean of at most `top_k`.

    Source: greedy allocation by largest gain per block, over steps of each head's curve to any later point, so that a
    flat start does not hide a gain behind it.

    Args:
        curves: for each layer errors of its key heads, [len(counts), H], not rising.
        counts: numbers of blocks, ascending.
        top_k: mean number.
    Returns:
        For each layer the number of each key head.

    Example:
        >>> spread([torch.tensor([[9.0, 1.0], [4.0, 1.0], [1.0, 1.0]])], (0, 1, 2), 1)
        [(2, 0)]
    """
    errors = [curve.T.tolist() for curve in curves]  # by layer, then head
    place = [[0] * len(layer) for layer in errors]
    left = sum(map(len, errors)) * (top_k - counts[0])

    def push(layer: int, head: int) -> None:
        own, now = errors[layer][head], place[layer][head]
        steps = [((own[now] - own[to]) / (counts[to] - counts[now]), -to) for to in range(now + 1, len(counts))]
        if steps and max(steps)[0] > 0:
            gain, to = max(steps)
            heapq.heappush(heap, (-gain, layer, head, -to))

    heap: list[tuple[float, int, int, int]] = []
    for layer, own in enumerate(errors):
        for head in range(len(own)):
            push(layer, head)
    while heap:
        _, layer, head, to = heapq.heappop(heap)
        cost = counts[to] - counts[place[layer][head]]
        if cost <= left:
            left -= cost
            place[layer][head] = to
            push(layer, head)
    return [tuple(counts[number] for number in layer) for layer in place]
