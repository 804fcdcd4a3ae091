"""Keys and values of each row's own local block and of the one before it."""

import torch
from torch import Tensor

from bsbr.ops.pieces import Piece, row_numbers
from bsbr.ops.stores import take_rows


class OwnBlocks:
    """The last two local blocks of each row: a row's block n stands in half n % 2.

    The one before the own is kept so that a row can go back by a few tokens, as assisted decoding does.

    Args:
        k: keys whose rows, heads, width, dtype and device are taken, [B, T, H, D].
        v: values, [B, T, H, Dv].
        block_size: tokens of a local block.
    """

    def __init__(self, k: Tensor, v: Tensor, block_size: int) -> None:
        self.block_size = block_size
        with torch.inference_mode(False):
            self.k, self.v = (
                torch.zeros(x.shape[0], x.shape[2], 2 * block_size, x.shape[3], dtype=x.dtype, device=x.device)
                for x in (k, v)
            )

    def put(self, row: int, block: int, k: Tensor, v: Tensor) -> None:
        """Set the first tokens of one block of one row.

        Args:
            row: the row.
            block: number of the local block.
            k: [H, n, D]; v: [H, n, Dv].
        """
        start = block % 2 * self.block_size
        self.k[row, :, start : start + k.shape[1]] = k
        self.v[row, :, start : start + k.shape[1]] = v

    def add(self, piece: Piece, rows: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the tokens of a piece and return what its rows' own blocks then hold.

        Args:
            piece: which rows, and where they are.
            rows: the rows as a tensor; None means all.
            k: [R, S, H, D]; v: [R, S, H, Dv].
        Returns:
            Keys [R, H, W, D] and values [R, H, W, Dv], W the most that a row's block holds; and what of them a query
            may not see, [R * H or 1, S, W], None where each sees all.
        """
        size, steps = self.block_size, k.shape[1]
        width = max(start % size for start in piece.places) + steps
        if piece.even:
            half = piece.places[0] // size % 2 * size
            into, held = slice(half + width - steps, half + width), slice(half, half + width)
            for own, new in ((self.k, k), (self.v, v)):
                own[slice(None) if rows is None else rows, :, into] = new.transpose(1, 2)
            found_k, found_v = (x[:, :, held] if rows is None else x[rows, :, held] for x in (self.k, self.v))
            later = torch.ones(1, steps, width, dtype=torch.bool, device=k.device).triu_(width - steps + 1)
            return found_k, found_v, None if steps == 1 else later
        number, starts = (row_numbers(x, k.device)[:, None] for x in (piece.rows, piece.places))
        step, key = torch.arange(steps, device=k.device), torch.arange(width, device=k.device)
        halves, place = starts // size % 2 * size, starts % size + step
        for own, new in ((self.k, k), (self.v, v)):
            own[number, :, halves + place] = new
        found_k, found_v = (x[number, :, halves + key].transpose(1, 2) for x in (self.k, self.v))
        return found_k, found_v, (key > place[..., None]).repeat_interleave(k.shape[2], 0)

    def finished(self, rows: slice, block: int) -> tuple[Tensor, Tensor]:
        """Return a whole local block of some rows.

        Args:
            rows: the rows.
            block: number of the local block, the own or the one before.
        Returns:
            Keys [R, H, block_size, D] and values [R, H, block_size, Dv].
        """
        start = block % 2 * self.block_size
        k, v = (x[rows, :, start : start + self.block_size] for x in (self.k, self.v))
        return k, v

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order.

        Args:
            rows: [R] row numbers; one may come more than once.
        """
        self.k, self.v = take_rows(self.k, rows), take_rows(self.v, rows)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.k.nbytes + self.v.nbytes
