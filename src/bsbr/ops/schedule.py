"""In which order and in which pieces the chunked backend works; nothing here changes what it computes."""

import math
from typing import NamedTuple

from bsbr.config import BSBRConfig
from bsbr.ops.tiles import Dropout

_SCORES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Block scores held at once: a segment's should stay in a CPU core's cache, and keep a GPU busy."""


class Plan(NamedTuple):
    """What one call computes, apart from tensors."""

    config: BSBRConfig
    scale: float
    q_start: int
    num_queries: int
    dropout: Dropout

    @property
    def stop(self) -> int:
        """Position after the last query."""
        return self.q_start + self.num_queries

    @property
    def sparse_start(self) -> int:
        """Position of the first sparse query; the ones before it read their whole past."""
        return min(self.stop, max(self.q_start, dense_until(self.config)))

    @property
    def num_dense(self) -> int:
        """Queries that read their whole past."""
        return self.sparse_start - self.q_start

    @property
    def num_past(self) -> int:
        """Keys before the local block of the last query: those that are summarised and retrieved."""
        return (self.stop - 1) // self.config.block_size * self.config.block_size

    def segments(self, heads: int, device: str) -> list["Segment"]:
        """Cut the sparse positions into runs of whole local blocks, or parts of one, as large as the device likes.

        Args:
            heads: query heads worked on together.
            device: type of the device.
        Returns:
            Segments in order; together they cover the sparse positions.
        """
        size, unit = self.config.block_size, self.config.unit
        segments, start, most = [], self.sparse_start, _SCORES.get(device, _SCORES["cpu"])
        while start < self.stop:
            if start % size or self.stop - start < size:
                stop = min(self.stop, (start // size + 1) * size)
            else:
                # c blocks such that heads * c * size queries times the blocks past at their end fit
                half, room = start / 2 / size, most * unit / (heads * size * size)
                wanted = max(1, int(math.sqrt(half * half + room) - half))
                stop = start + min(wanted, (self.stop - start) // size) * size
            segments.append(Segment(start, stop, self))
            start = stop
        return segments


class Segment(NamedTuple):
    """A run of whole local blocks, or part of one."""

    start: int
    stop: int
    plan: Plan

    @property
    def blocks(self) -> range:
        """Its local blocks."""
        size = self.plan.config.block_size
        return range(self.start // size, (self.stop - 1) // size + 1)

    @property
    def first(self) -> int:
        """Place of the first query in its local block."""
        return self.start % self.plan.config.block_size

    @property
    def keys(self) -> slice:
        """Positions of the keys of its local blocks, as far as its queries may see."""
        return slice(self.start - self.first, self.stop)

    @property
    def rows(self) -> slice:
        """Its queries, counted from the first sparse one."""
        return slice(self.start - self.plan.sparse_start, self.stop - self.plan.sparse_start)


def dense_until(config: BSBRConfig) -> int:
    """Return the position below which the attention is exact: a query with at most `top_k` past blocks reads all.

    Args:
        config: the settings.
    Returns:
        Queries at positions before this one read their whole past exactly.

    Example:
        >>> dense_until(BSBRConfig(block_size=128, top_k=2, dense_below=0))
        384
    """
    least = config.top_k if config.top_k_per_head is None else min(config.top_k_per_head)
    full = (least * config.unit // config.block_size + 1) * config.block_size
    return max(config.dense_below, full)
