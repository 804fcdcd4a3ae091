"""Keys and values of the past local blocks of a sequence, kept to be read again: all of them, or the latest."""

import torch
from torch import Tensor

_SPARE = 16
"""A tensor grows by one part in this many: copying stays a small share of the work, and so does unused memory."""


def with_room(x: Tensor, length: int, step: int) -> Tensor:
    """Give a tensor room for at least `length` entries along axis 2; what is added is 0.

    Args:
        x: [B, H, capacity, ...].
        length: entries that must fit.
        step: the capacity becomes a multiple of this.
    Returns:
        x itself where it fits, else a larger copy.

    Example:
        >>> with_room(torch.ones(1, 1, 4, 2), 5, 4).shape
        torch.Size([1, 1, 8, 2])
    """
    capacity = x.shape[2]
    if length <= capacity:
        return x
    capacity = -(-max(length, capacity + capacity // _SPARE) // step) * step
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
        larger = torch.zeros(*x.shape[:2], capacity, *x.shape[3:], dtype=x.dtype, device=x.device, pin_memory=_pins(x))
    larger[:, :, : x.shape[2]] = x
    return larger


def _pins(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_pinned() if torch.cuda.is_available() else False


class Store:
    """Keys and values by retrieval block, written by whole local blocks.

    Args:
        k: keys whose rows, heads, width, dtype and device are taken, [B, T, H, D].
        v: values, [B, T, H, Dv].
        unit: tokens of a retrieval block.
        block_size: tokens of a local block.
        on_host: keep them in the host's memory (pinned where there is a GPU) and send what is read to the device.
        room: tokens that fit at first; None means a local block.
    """

    def __init__(
        self, k: Tensor, v: Tensor, unit: int, block_size: int, on_host: bool, room: int | None = None
    ) -> None:
        self.device, self.unit, self.block_size = k.device, unit, block_size
        place = torch.device("cpu") if on_host else k.device
        pin = place != k.device
        with torch.inference_mode(False):
            self.k, self.v = (
                torch.zeros(
                    x.shape[0], x.shape[2], room or block_size, x.shape[3], dtype=x.dtype, device=place, pin_memory=pin
                )
                for x in (k, v)
            )

    def write(self, rows: slice, start: int, k: Tensor, v: Tensor) -> None:
        """Keep keys and values.

        Args:
            rows: rows they belong to.
            start: position of the first.
            k: [R, H, n, D]; v: [R, H, n, Dv]; n is a multiple of the local block.
        """
        stop = start + k.shape[2]
        self.reserve(stop)
        self.k[rows, :, start:stop], self.v[rows, :, start:stop] = k, v

    def reserve(self, tokens: int) -> None:
        """Make room for this many tokens."""
        self.k, self.v = (with_room(x, tokens, self.block_size) for x in (self.k, self.v))

    def fetch(self, head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Read retrieval blocks.

        Args:
            head: row * H + key head, any shape.
            block: number of the retrieval block, the same shape.
        Returns:
            Keys [..., unit, D] and values [..., unit, Dv] on the device.
        """
        index = (head * (self.k.shape[2] // self.unit) + block).flatten().to(self.k.device)
        return self._read(self.k, index, block), self._read(self.v, index, block)

    def _read(self, x: Tensor, index: Tensor, block: Tensor) -> Tensor:
        blocks = x.view(-1, self.unit * x.shape[3])
        if x.device == self.device:
            found = blocks.index_select(0, index)
        else:  # from pinned into pinned memory, so that the copy does not stop the host
            found = torch.empty(len(index), blocks.shape[1], dtype=x.dtype, pin_memory=True)
            torch.index_select(blocks, 0, index, out=found)
            found = found.to(self.device, non_blocking=True)
        return found.view(*block.shape, self.unit, x.shape[3])

    def prefix(self, stop: int) -> tuple[Tensor, Tensor]:
        """Read everything before a position.

        Args:
            stop: the position.
        Returns:
            Keys [B, H, stop, D] and values [B, H, stop, Dv] on the device; the store's own memory where it is there.
        """
        k, v = (x[:, :, :stop].to(self.device) for x in (self.k, self.v))
        return k, v

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order.

        Args:
            rows: [R] row numbers; one may come more than once.
        """
        self.k, self.v = (take_rows(x, rows) for x in (self.k, self.v))


class RecentStore(Store):
    """A `Store` of the latest local blocks only: local block n stands in place n % (number of places).

    Args:
        k: keys whose rows, heads, width, dtype and device are taken, [B, T, H, D].
        v: values, [B, T, H, Dv].
        unit: tokens of a retrieval block.
        block_size: tokens of a local block.
        latest: retrieval blocks before the own local block that are read. One local block more is kept, so that a row
            can go back by a block, as `OwnBlocks` can.
    """

    def __init__(self, k: Tensor, v: Tensor, unit: int, block_size: int, latest: int) -> None:
        self.places = -(-latest * unit // block_size) + 1
        super().__init__(k, v, unit, block_size, on_host=False, room=self.places * block_size)

    def write(self, rows: slice, start: int, k: Tensor, v: Tensor) -> None:
        """Keep the latest of keys and values; see `Store.write`."""
        size, stop = self.block_size, start + k.shape[2]
        for block in range(max(start, stop - self.places * size), stop, size):
            into = block // size % self.places * size
            for held, new in ((self.k, k), (self.v, v)):
                held[rows, :, into : into + size] = new[:, :, block - start : block - start + size]

    def reserve(self, tokens: int) -> None:
        """Do nothing: a window does not grow."""

    def fetch(self, head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Read retrieval blocks of the window; see `Store.fetch`."""
        return super().fetch(head, block % (self.places * self.block_size // self.unit))


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of a tensor, to the same memory (pinned or not) it is in.

    Args:
        x: [B, ...].
        rows: [R] row numbers.
    Returns:
        [R, ...].

    Example:
        >>> take_rows(torch.tensor([5, 6]), torch.tensor([1, 1])).tolist()
        [6, 6]
    """
    with torch.inference_mode(False):
        taken = x.index_select(0, rows.to(x.device))
        return taken.pin_memory() if _pins(x) else taken
