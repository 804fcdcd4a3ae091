"""Blocks go where they take the most error away, and never more of them than there are."""

import itertools

import pytest
import torch

from bsbr.training.spread import candidate_counts, spread


def error(curves: list[torch.Tensor], counts: tuple[int, ...], rows: list[tuple[int, ...]]) -> float:
    return sum(
        float(curve[counts.index(count), head])
        for curve, row in zip(curves, rows, strict=True)
        for head, count in enumerate(row)
    )


@pytest.mark.parametrize("seed", range(20))
def test_convex_curves_are_spread_as_well_as_can_be(seed: int) -> None:
    """With steps of one block and falling gains, greedy is optimal: compare with every way there is."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    curves = [torch.cat([g.flip(0).cumsum(0).flip(0), torch.zeros(1, 2, dtype=torch.float64)]) for g in gains]
    counts = (0, 1, 2, 3)
    found = spread(curves, counts, 1)
    assert sum(map(sum, found)) <= 4
    ways = itertools.product(counts, repeat=4)
    best = min(error(curves, counts, [way[:2], way[2:]]) for way in ways if sum(way) <= 4)
    assert error(curves, counts, found) == pytest.approx(best, abs=1e-12)


def test_a_gain_behind_a_flat_start_is_found() -> None:
    curve = torch.tensor([[5.0, 5.0], [5.0, 4.5], [0.0, 4.4]])
    assert spread([curve], (0, 1, 2), 1) == [(2, 0)]


def test_nothing_is_spent_where_nothing_is_gained() -> None:
    assert spread([torch.zeros(3, 2)], (0, 2, 4), 2) == [(0, 0)]


@pytest.mark.parametrize(("top_k", "blocks"), [(1, 2), (2, 8), (8, 64), (32, 256), (32, 33)])
def test_candidates_hold_the_mean_and_end_in_time(top_k: int, blocks: int) -> None:
    counts = candidate_counts(top_k, blocks)
    assert counts[0] == 0
    assert top_k in counts
    assert list(counts) == sorted(set(counts))
    assert counts[-1] <= max(top_k, blocks // 2)
