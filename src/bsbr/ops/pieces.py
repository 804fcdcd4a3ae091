"""In which pieces a call on a cache is worked on: in each, every row stays inside one of its local blocks."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.schedule import dense_until

_QUERIES = 128
"""Queries of a row that are worked on at once: bounds the block scores held."""


class Piece(NamedTuple):
    """Some columns of a call, for some rows."""

    start: int
    """First column."""
    stop: int
    """Column after the last."""
    rows: tuple[int, ...]
    """Rows that take part, ascending."""
    places: tuple[int, ...]
    """Position of the first query of each of these rows."""
    dense: bool
    """The queries read their whole past exactly."""

    @property
    def even(self) -> bool:
        """Every row is at the same position."""
        return min(self.places) == max(self.places)


@lru_cache(maxsize=16)  # every layer of a model asks for the same
def cut(
    lengths: tuple[int, ...], counts: tuple[int, ...], config: BSBRConfig, most: int | None = None
) -> tuple[Piece, ...]:
    """Cut a call into pieces.

    Args:
        lengths: tokens that each row has already.
        counts: tokens that each row gets.
        config: the settings.
        most: queries of a row beyond `dense_until` that kernels take at once; since kernels are compiled for each
            number, they are then a power of two. None where it does not matter.
    Returns:
        The pieces, in the order in which they must be worked on.

    Example:
        >>> config = BSBRConfig(block_size=4, top_k=0, dense_below=0)
        >>> [(piece.start, piece.stop) for piece in cut((6,), (5,), config)]
        [(0, 2), (2, 5)]
        >>> [(piece.start, piece.stop) for piece in cut((6,), (5,), config, most=8)]
        [(0, 2), (2, 4), (4, 5)]
    """
    return tuple(_cut(lengths, counts, config, most))


def _cut(lengths: tuple[int, ...], counts: tuple[int, ...], config: BSBRConfig, most: int | None) -> Iterator[Piece]:
    size, dense, start = config.block_size, dense_until(config), 0
    while start < max(counts):
        active = [row for row, count in enumerate(counts) if count > start]
        step = _QUERIES
        for row in active:
            place = lengths[row] + start
            step = min(step, counts[row] - start, size - place % size)
            if place < dense:
                step = min(step, dense - place)
        if most is not None and any(lengths[row] + start >= dense for row in active):
            step = 1 << min(step, most).bit_length() - 1
        for exact in (True, False):
            rows = [row for row in active if (lengths[row] + start < dense) is exact]
            if rows:
                yield Piece(start, start + step, tuple(rows), tuple(lengths[row] + start for row in rows), exact)
        start += step


@lru_cache(maxsize=64)
def row_numbers(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Put numbers on a device, once for all layers.

    Args:
        rows: the numbers.
        device: where to.
    Returns:
        [R], int64.
    """
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)
