"""Buckets: what is exposed to the approximation is counted from the definition of the attention."""

import pytest
import torch

from bsbr.evaluation.buckets import bucket_masks, first_exposed, position_edges, sum_by_bucket


@pytest.mark.parametrize(("block_size", "parts"), [(1, 1), (4, 1), (4, 2), (6, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("dense_below", [0, 13, 40])
def test_first_exposed_is_the_first_with_an_unread_block(
    block_size: int, parts: int, top_k: int, dense_below: int
) -> None:
    unit = block_size // parts
    exposed = [
        position >= dense_below and (position // block_size) * block_size // unit > top_k for position in range(200)
    ]
    first = first_exposed(block_size=block_size, top_k=top_k, retrieval_block_size=unit, dense_below=dense_below)
    assert first == exposed.index(True)
    assert all(exposed[first:])


def test_position_buckets_tile_the_window() -> None:
    positions = torch.arange(1000)
    masks = bucket_masks(positions, window=1000, exposed_from=300)
    places = [mask for name, mask in masks.items() if name[0].isdigit()]
    assert torch.equal(torch.stack(places).sum(0), torch.ones(1000, dtype=torch.long))
    assert torch.equal(masks["exposed"], positions >= 300)
    assert torch.equal(masks["exposed"], ~masks["not exposed"])
    assert position_edges(256) == [0, 256]


def test_margin_buckets_tile_the_positions() -> None:
    margin = torch.linspace(0, 1, 101, dtype=torch.float64)
    masks = bucket_masks(torch.arange(101), window=101, exposed_from=None, margin=margin)
    margins = [mask for name, mask in masks.items() if name.startswith("margin")]
    assert torch.equal(torch.stack(margins).sum(0), torch.ones(101, dtype=torch.long))
    assert "exposed" not in masks


def test_sums_are_of_the_bucket_and_empty_buckets_are_absent() -> None:
    values = {"kl": torch.arange(4.0), "nll": torch.ones(4)}
    masks = {
        "all": torch.ones(4, dtype=torch.bool),
        "late": torch.arange(4) > 1,
        "none": torch.zeros(4).bool(),
    }
    found = sum_by_bucket(values, masks)
    assert found == {"all": {"n": 4, "kl": 6.0, "nll": 4.0}, "late": {"n": 2, "kl": 5.0, "nll": 2.0}}
