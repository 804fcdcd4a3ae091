"""Summaries of past blocks that are added to when a local block is finished, and never computed again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.pieces import Piece, row_numbers
from bsbr.ops.stores import take_rows, with_room
from bsbr.ops.summaries import summarize

SUMMARISED = 64
"""Local blocks to summarise at once: bounds the memory of their first-order states."""


class RunningSummaries:
    """What is known of the finished blocks of each row: of each a summary, of all one sum of states.

    Sums are kept as of the own block and as of the one before it, in half n % 2 for block n, so that going back by a
    block subtracts nothing.

    Args:
        k: keys whose rows, heads, width and device are taken, [B, T, H, D].
        v: values, [B, T, H, Dv].
        config: the settings; the state is "global" or "none".
    """

    def __init__(self, k: Tensor, v: Tensor, config: BSBRConfig) -> None:
        self.config, self._device = config, k.device
        self._per_block = config.block_size // config.unit
        self._tensors: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        if config.top_k or config.far != "drop":  # mean keys, and the variances after them
            sizes["meta"] = (0, k.shape[3] * (2 if config.far == "moments" else 1))
        if config.far != "drop":
            sizes["mean_v"] = (0, v.shape[3])
        if config.state == "global":
            sizes["states"] = (2, k.shape[3], v.shape[3])
        wide = torch.promote_types(k.dtype, torch.float32)
        with torch.inference_mode(False):
            for name, size in sizes.items():
                self._tensors[name] = torch.zeros(k.shape[0], k.shape[2], *size, dtype=wide, device=k.device)

    def add(self, rows: slice, block: int, k: Tensor, v: Tensor, blocks: Sequence[int]) -> None:
        """Summarise finished local blocks.

        Args:
            rows: rows they belong to.
            block: number of the first.
            k: [R, H, n * block_size, D]; v: [R, H, n * block_size, Dv].
            blocks: finished local blocks that each of the rows then has; those after them are padding.
        """
        if not self._tensors:
            return
        found = summarize(k, v, self.config.unit)
        meta = torch.cat([found.mean_k, found.var_k], -1) if self.config.far == "moments" else found.mean_k
        span = slice(block * self._per_block, block * self._per_block + meta.shape[2])
        for name, value in (("meta", meta), ("mean_v", found.mean_v)):
            if name in self._tensors:
                self._tensors[name] = with_room(self._tensors[name], span.stop, self._per_block)
                self._tensors[name][rows, :, span] = value
        self._add_states(rows, block, found.states, blocks)

    def sum_again(self, row: int, block: int, k: Tensor, v: Tensor) -> None:
        """Make the sums of one row those of an earlier block.

        Args:
            row: the row.
            block: number of its own local block.
            k: its keys from the start on, [H, T, D]; v: its values, [H, T, Dv].
        """
        if "states" not in self._tensors:
            return
        self._tensors["states"][row].zero_()
        size = self.config.block_size
        for start in range(0, block, SUMMARISED):
            span = slice(start * size, min(start + SUMMARISED, block) * size)
            found = summarize(k[None, :, span], v[None, :, span], self.config.unit).states
            self._add_states(slice(row, row + 1), start, found, [block])

    def _add_states(self, rows: slice, block: int, states: Tensor, blocks: Sequence[int]) -> None:
        """Add states of retrieval blocks, [R, H, N, D, Dv], to the sums as of each own block and the one before."""
        if "states" not in self._tensors:
            return
        sums, states = self._tensors["states"][rows], states.unflatten(2, (-1, self._per_block)).sum(3)
        if states.shape[2] == 1 and min(blocks) == block + 1:  # the sum as of the next block is this one's and one more
            torch.add(sums[:, :, block % 2], states[:, :, 0], out=sums[:, :, (block + 1) % 2])
            return
        number = torch.arange(block, block + states.shape[2], device=states.device)
        count = row_numbers(tuple(blocks), states.device)
        for back in (0, 1):
            counted = (number < (count - back)[:, None]).to(states.dtype)
            part = torch.einsum("bn,bhndv->bhdv", counted, states)
            for row, own in enumerate(blocks):
                sums[row, :, (own - back) % 2] += part[row]

    def before(
        self, piece: Piece, rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return what the rows of a piece know of the blocks before their own.

        Args:
            piece: which rows, and where they are.
            rows: the rows as a tensor; None means all.
        Returns:
            The first four fields of `bsbr.ops.decode.Past`.
        """
        blocks = tuple(start // self.config.block_size for start in piece.places)
        count = max(blocks) * self._per_block
        found = {name: x if rows is None else x[rows] for name, x in self._tensors.items()} if count else {}
        meta, mean_v = (
            found[name][:, :, :count].flatten(0, 1) if name in found else None for name in ("meta", "mean_v")
        )
        absent = state = None
        own = row_numbers(blocks, self._device)
        if meta is not None and not piece.even:
            absent = torch.arange(count, device=self._device) >= own[:, None] * self._per_block
            absent = absent.repeat_interleave(found["meta"].shape[1], 0)
        if "states" in found and piece.even:
            state = (found["states"][:, :, blocks[0] % 2] / count).flatten(0, 1)
        elif "states" in found:
            sums = found["states"][torch.arange(len(own), device=self._device), :, own % 2]
            state = (sums / (own * self._per_block).clamp(min=1)[:, None, None, None]).flatten(0, 1)
        return meta, mean_v, state, absent

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what kernels read: mean keys (and variances), mean values and sums of states, where kept."""
        return self._tensors.get("meta"), self._tensors.get("mean_v"), self._tensors.get("states")

    def reserve(self, blocks: int) -> None:
        """Make room for summaries of this many retrieval blocks."""
        for name in ("meta", "mean_v"):
            if name in self._tensors:
                self._tensors[name] = with_room(self._tensors[name], blocks, self._per_block)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order.

        Args:
            rows: [R] row numbers; one may come more than once.
        """
        self._tensors = {name: take_rows(x, rows) for name, x in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return sum(x.nbytes for x in self._tensors.values())
