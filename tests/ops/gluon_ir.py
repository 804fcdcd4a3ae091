"""Runs Gluon kernels as Triton lowers them, on a CPU: what `tests.ops.triton_ir` does, with shared memory and barriers.

Layouts are left out: a tensor here has its elements, whatever thread holds them. What a copy brings is there only once
its barrier was waited for, in the phase that the kernel says; until then its place holds what is no number.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from tests.ops.triton_ir import BFloat, Op, Pointer, Program, parse


class Descriptor(NamedTuple):
    """A tensor that tiles are copied from."""

    memory: np.ndarray | BFloat
    shape: tuple[int, ...]
    block: tuple[int, ...]

    def tile(self, at: tuple[int, ...]) -> np.ndarray:
        """A tile of it, with zeros outside of the tensor."""
        places, inside = np.zeros(self.block, np.int64), np.ones(self.block, np.bool_)
        for axis, (start, size, whole) in enumerate(zip(at, self.block, self.shape, strict=True)):
            along = np.arange(start, start + size).reshape([-1 if i == axis else 1 for i in range(len(self.block))])
            places, inside = places * whole + along, inside & (along >= 0) & (along < whole)
        return np.where(inside, self.memory[np.where(inside, places, 0)], 0)


class Barrier:
    """How often what was waited for was there, and copies on their way."""

    def __init__(self) -> None:
        self.phase, self.expected, self.copies = 0, 0, []

    def wait(self, parity: int) -> None:
        """Let copies arrive; the program would hang here if the phase it waits for does not end."""
        if self.expected and sum(tile.size * size for _, tile, size in self.copies) == self.expected:
            for to, tile, _ in self.copies:
                to[...] = tile
            self.phase, self.expected, self.copies = self.phase + 1, 0, []
        assert self.phase % 2 != parity, "nothing arrives"


def without_layouts(ir: str) -> str:
    """Types without layouts, and shared memory as tensors."""
    out, at = [], 0
    for found in re.finditer(r"(?:tensor|!ttg\.memdesc)<", ir):
        if found.start() < at:
            continue
        depth, end, comma = 1, found.end(), None
        while depth:
            depth += {"<": 1, ">": -1}.get(ir[end], 0) if ir[end - 1 : end + 1] != "->" else 0
            if ir[end] == "," and depth == 1 and comma is None:
                comma = end
            end += 1
        out += [ir[at : found.start()], "tensor<", ir[found.end() : comma or end - 1], ">"]
        at = end
    return "".join(out) + ir[at:]


def lower(ir: str) -> list[Op]:
    """The operations of a kernel in Triton's IR for GPUs."""
    return parse(without_layouts(ir))


class GluonProgram(Program):
    """One program of a grid."""

    def _tensor(self, name: str, before: str, values: tuple[Any, ...], kinds: list[Any]) -> tuple[Any, ...]:
        element, shape = kinds[-1] if kinds else (None, None)
        if name == "ttg.convert_layout":
            return values
        if name == "ttg.local_alloc":
            return (np.array(values[0]) if values else self._new(element, shape),)
        if name == "ttg.memdesc_index":
            return (values[0][int(values[1])],)
        if name == "ttg.memdesc_subslice":
            starts = [int(x) for x in re.search(r"\[([\d, ]+)\]", before)[1].split(",")]  # type: ignore[index]
            return (values[0][tuple(slice(a, a + n) for a, n in zip(starts, shape, strict=True))],)
        if name == "ttg.memdesc_trans":
            return super()._tensor("tt.trans", before, values, kinds)
        if name == "ttng.warp_group_dot":
            product = np.asarray(values[0], np.float64) @ np.asarray(values[1], np.float64)
            return ((product + (values[2] if len(values) < 4 or values[3] else 0)).astype(np.float32),)
        if name == "ttng.warp_group_dot_wait":
            return values
        if name == "ttng.async_tma_copy_global_to_local":
            source, *at, to, barrier, there = values
            if there:
                to[...] = np.nan
                barrier[0].copies.append((to, source.tile(tuple(int(x) for x in at)), 2))
            return ()
        if name == "ttng.barrier_expect":
            if values[1]:
                values[0][0].expected = int(re.search(r", (\d+),", before)[1])  # type: ignore[index]
            return ()
        if name == "ttng.wait_barrier":
            values[0][0].wait(int(values[1]))
            return ()
        if name in ("ttng.init_barrier", "ttng.inval_barrier", "ttng.fence_async_shared"):
            return ()
        return super()._tensor(name, before, values, kinds)

    def _new(self, element: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Shared memory that nothing was written to."""
        if element is np.int64:  # barriers
            return np.array([[Barrier()] for _ in range(shape[0])], object)
        return np.full(shape, np.nan, element)


__all__ = ["Descriptor", "GluonProgram", "Pointer", "lower"]
