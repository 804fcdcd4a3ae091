"""What decoding keeps of a text: its last two local blocks, a summary of each past block, past keys and values."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.attention import bsbr_attention
from bsbr.ops.decode import Past, decode_attention, decode_exact
from bsbr.ops.pieces import Piece, cut, row_numbers
from bsbr.ops.stores import Store, take_rows, with_room
from bsbr.ops.summaries import UNCALIBRATED, summarize

Mode = Literal["full", "offload", "states"]
MODES: tuple[Mode, ...] = ("full", "offload", "states")

_SUMMARISED = 64
"""Local blocks that are summarised at once: bounds the memory of their first-order states."""


def check_mode(config: BSBRConfig, mode: Mode) -> None:
    """Refuse a mode of the cache that cannot give what the settings ask for.

    Args:
        config: the settings.
        mode: "full", "offload" or "states".
    Raises:
        ValueError: no such mode, or it and the settings do not fit.

    Example:
        >>> check_mode(BSBRConfig(top_k=0, dense_below=0), "states")
    """
    if mode not in MODES:
        raise ValueError(f"cache must be one of {', '.join(MODES)}, got {mode!r}")
    if config.state in ("block", "token"):
        raise ValueError(
            f'a BSBR cache keeps no state="{config.state}": use state="global" or transformers\' own cache'
        )
    if mode == "states" and (config.top_k or config.dense_below > config.block_size):
        raise ValueError(
            'cache "states" keeps no past keys and values, which '
            + (f"top_k {config.top_k} reads" if config.top_k else f"dense_below {config.dense_below} reads")
            + ': convert with top_k 0 and dense_below 0, or use cache "full" or "offload"'
        )


class BlockCache:
    """The cache of one layer: give it each new part of a text, and it attends to all that came before.

    Rows start at position 0 and may have different lengths. Key and value buffers grow by a sixteenth; summaries and
    the running sum of first-order states are finished when a local block is.

    Args:
        config: the settings.
        mode: "full" keeps past keys and values on the device, "offload" on the host, "states" drops them.

    Example:
        >>> cache = BlockCache(BSBRConfig(block_size=4, top_k=1, dense_below=0))
        >>> q, k, v = torch.randn(3, 1, 11, 2, 8)
        >>> cache.attend(q[:, :10], k[:, :10], v[:, :10], scale=0.3).shape, cache.lengths
        (torch.Size([1, 10, 2, 8]), [10])
        >>> cache.attend(q[:, 10:], k[:, 10:], v[:, 10:], scale=0.3).shape
        torch.Size([1, 1, 2, 8])
    """

    def __init__(self, config: BSBRConfig, mode: Mode = "full") -> None:
        check_mode(config, mode)
        self.config, self.mode = config, mode
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lengths: list[int] = []
        self._floors: list[int] = []  # lowest local block that each row's own keys and sums can go back to
        self._tensors: dict[str, Tensor] = {}
        self._store: Store | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        calibration: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Add tokens to each row and attend from them.

        Args:
            q: queries of the new tokens, [B, T, HQ, D].
            k: their keys, [B, T, H, D]; v: their values, [B, T, H, Dv].
            scale: factor on q.k.
            calibration: [HQ, 5]; None means uncalibrated.
            counts: tokens of each row; what comes later is padding. None means T.
        Returns:
            o [B, T, HQ, Dv] in the dtype of q, 0 for padding; with gradients only from the first tokens.
        """
        counts = tuple(counts) if counts is not None else (q.shape[1],) * q.shape[0]
        if not self.lengths:
            self._start(k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        if calibration is None:
            calibration = q.new_tensor(UNCALIBRATED, dtype=wide).expand(q.shape[2], 5)
        if max(self.lengths) == 0:
            return self._first(q, k, v, scale, calibration, counts)
        with torch.no_grad():
            o = q.new_zeros(*q.shape[:3], v.shape[3])
            by_head = calibration.to(wide).unflatten(0, (k.shape[2], -1))
            for piece in cut(tuple(self.lengths), counts, self.config):
                self._piece(piece, q, k, v, o, scale, by_head)
        return o

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Take in a text whose attention is known already, in place of what the cache held.

        Args:
            k: keys, [B, T, H, D]; v: values, [B, T, H, Dv].
        """
        self._start(k, v)
        self._fill(k.detach().transpose(1, 2), v.detach().transpose(1, 2), (k.shape[1],) * k.shape[0])

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the end of each row.

        Args:
            lengths: tokens that each row keeps.
        Raises:
            ValueError: the blocks that are cut into have been dropped.
        """
        if not max(lengths):
            return self.reset()
        size = self.config.block_size
        deep = [row for row, length in enumerate(lengths) if length // size < self._floors[row]]
        if deep and self._store is None:
            raise ValueError(
                'cache "states" has dropped the keys of blocks before the last two, so it cannot go back further: '
                'use cache "full"'
            )
        for row in deep:
            self._rebuild(row, lengths[row] // size)
        self.lengths = list(lengths)
        return None

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, as beam search asks for.

        Args:
            rows: [R] row numbers; one may come more than once.
        """
        chosen = rows.tolist()
        self.lengths, self._floors = ([x[row] for row in chosen] for x in (self.lengths, self._floors))
        self._tensors = {name: take_rows(x, rows) for name, x in self._tensors.items()}
        if self._store is not None:
            self._store.select(rows)

    def num_bytes(self) -> dict[str, int]:
        """Return the memory the cache takes, by kind: "device" and "host"; on a CPU all of it is the device's."""
        used = {"device": sum(x.nbytes for x in self._tensors.values()), "host": 0}
        if self._store is not None:
            place = "device" if self._store.k.device == self._store.device else "host"
            used[place] += self._store.k.nbytes + self._store.v.nbytes
        return used

    def _start(self, k: Tensor, v: Tensor) -> None:
        """Make empty tensors for rows like these."""
        config, (rows, _, heads, width) = self.config, k.shape
        wide = torch.promote_types(k.dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.zeros(rows, heads, *shape, dtype=dtype, device=k.device)

        with torch.inference_mode(False):
            self._tensors = {
                # the own local block and the one before, so that a crop by a few tokens finds its keys
                "own_k": zeros(2 * config.block_size, width, dtype=k.dtype),
                "own_v": zeros(2 * config.block_size, v.shape[3], dtype=v.dtype),
            }
            if config.top_k or config.far != "drop":
                self._tensors["meta"] = zeros(0, width * (2 if config.far == "moments" else 1))
            if config.far != "drop":
                self._tensors["mean_v"] = zeros(0, v.shape[3])
            if config.state == "global":  # sums of the states before the own local block, and before the last one
                self._tensors["states"] = zeros(2, width, v.shape[3])
        if self.mode != "states":
            empty_k, empty_v = (x.transpose(1, 2)[:, :, :0] for x in (k, v))
            self._store = Store(empty_k, empty_v, config.unit, config.block_size, self.mode == "offload")
        self.lengths, self._floors = [0] * rows, [0] * rows

    def _first(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, calibration: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        """Attend from a whole text, and fill the empty cache with it."""
        lengths = None
        if min(counts) < k.shape[1]:
            lengths = row_numbers(counts, k.device)
            padded = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
            k, v = (x.masked_fill(padded[:, :, None, None], 0) for x in (k, v))
        o = bsbr_attention(q, k, v, self.config, scale=scale, lengths=lengths, calibration=calibration)
        assert isinstance(o, Tensor)
        self._fill(k.detach().transpose(1, 2), v.detach().transpose(1, 2), counts)
        return o

    def _fill(self, k: Tensor, v: Tensor, counts: Sequence[int]) -> None:
        size = self.config.block_size
        blocks = [count // size for count in counts]
        for start in range(0, max(blocks), _SUMMARISED):
            span = slice(start * size, min(start + _SUMMARISED, max(blocks)) * size)
            self._finish(slice(None), start, k[:, :, span], v[:, :, span], blocks)
        for row, count in enumerate(counts):
            for block in {max(0, blocks[row] - 1), blocks[row]}:
                self._keep_own(row, block, *(x[row, :, block * size : min(count, (block + 1) * size)] for x in (k, v)))
        self.lengths, self._floors = list(counts), [max(0, block - 1) for block in blocks]

    def _keep_own(self, row: int, block: int, k: Tensor, v: Tensor) -> None:
        start = block % 2 * self.config.block_size
        self._tensors["own_k"][row, :, start : start + k.shape[1]] = k
        self._tensors["own_v"][row, :, start : start + k.shape[1]] = v

    def _finish(self, rows: slice, block: int, k: Tensor, v: Tensor, blocks: Sequence[int]) -> None:
        """Summarise finished local blocks and keep their keys and values.

        Args:
            rows: rows they belong to.
            block: number of the first.
            k: [R, H, n * block_size, D]; v: [R, H, n * block_size, Dv].
            blocks: finished local blocks that each row then has; those after them are padding.
        """
        config, per_block = self.config, self.config.block_size // self.config.unit
        if self._store is not None:
            self._store.write(rows, block * config.block_size, k, v)
        if "meta" not in self._tensors:
            return
        found = summarize(k, v, config.unit)
        meta = torch.cat([found.mean_k, found.var_k], -1) if config.far == "moments" else found.mean_k
        span = slice(block * per_block, block * per_block + meta.shape[2])
        for name, value in (("meta", meta), ("mean_v", found.mean_v)):
            if name in self._tensors:
                self._tensors[name] = with_room(self._tensors[name], span.stop, per_block)
                self._tensors[name][rows, :, span] = value
        if "states" in self._tensors:
            self._add_states(rows, block, found.states.unflatten(2, (-1, per_block)).sum(3), blocks)

    def _add_states(self, rows: slice, block: int, states: Tensor, blocks: Sequence[int]) -> None:
        """Add states of local blocks, [R, H, n, D, Dv], to the sums that each row's own and last block read."""
        sums = self._tensors["states"][rows]
        if states.shape[2] == 1 and min(blocks) == block + 1:  # decoding: the next block's sum is this one's and one
            torch.add(sums[:, :, block % 2], states[:, :, 0], out=sums[:, :, (block + 1) % 2])
            return
        number = torch.arange(block, block + states.shape[2], device=states.device)
        count = row_numbers(tuple(blocks), states.device)
        for back in (0, 1):
            counted = (number < (count - back)[:, None]).to(states.dtype)
            part = torch.einsum("bn,bhndv->bhdv", counted, states)
            for row, own in enumerate(blocks):
                sums[row, :, (own - back) % 2] += part[row]

    def _rebuild(self, row: int, block: int) -> None:
        """Make a finished local block, and those before it, what the row ends with."""
        assert self._store is not None
        size = self.config.block_size
        self._floors[row] = max(0, block - 1)
        k, v = (x[row] for x in self._store.prefix((block + 1) * size))
        for number in {max(0, block - 1), block}:
            self._keep_own(row, number, *(x[:, number * size : (number + 1) * size] for x in (k, v)))
        if "states" in self._tensors:
            self._tensors["states"][row].zero_()
            for start in range(0, block, _SUMMARISED):
                span = slice(start * size, min(start + _SUMMARISED, block) * size)
                found = summarize(k[None, :, span], v[None, :, span], self.config.unit).states
                states = found.unflatten(2, (-1, size // self.config.unit)).sum(3)
                self._add_states(slice(row, row + 1), start, states, [block])

    def _piece(
        self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, calibration: Tensor
    ) -> None:
        """Add the tokens of a piece, attend from them, and finish the blocks they complete."""
        size, steps = self.config.block_size, piece.stop - piece.start
        every = len(piece.rows) == len(self.lengths)
        rows = None if every else row_numbers(piece.rows, q.device)
        new = [x[:, piece.start : piece.stop] if rows is None else x[rows, piece.start : piece.stop] for x in (q, k, v)]
        own_k, own_v, unseen = self._own(piece, rows, new[1], new[2])
        heads = k.shape[2]
        folded_q = new[0].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [Z, G, S, D]
        own = own_k.flatten(0, 1), own_v.flatten(0, 1), unseen
        if piece.dense:
            before = self._before(piece, rows, own_k, own_v)
            part = decode_exact(folded_q, *before, *own, calibration.dtype, scale)
        else:
            scalars = calibration.repeat(len(piece.rows), 1, 1)
            part = decode_attention(folded_q, *own, self._past(piece, rows, heads), self.config, scalars, scale)
        part = part.to(o.dtype).unflatten(0, (-1, heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        o[slice(None) if rows is None else rows, piece.start : piece.stop] = part
        for index, row in enumerate(piece.rows):
            self.lengths[row] = piece.places[index] + steps
        finished = [index for index, row in enumerate(piece.rows) if self.lengths[row] % size == 0]
        for index in finished:
            row = piece.rows[index]
            self._floors[row] = block = self.lengths[row] // size - 1
            if not (every and piece.even):
                one = slice(index, index + 1)
                self._finish(slice(row, row + 1), block, own_k[one], own_v[one], [block + 1])
        if finished and every and piece.even:
            self._finish(slice(None), block, own_k, own_v, [block + 1] * len(finished))

    def _own(self, piece: Piece, rows: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add keys and values [R, S, H, D] to their rows' own blocks; return these [R, H, W, D], and what of them a
        query may not see, [Z or 1, S, W]."""
        size, steps = self.config.block_size, k.shape[1]
        tensors = (self._tensors["own_k"], k), (self._tensors["own_v"], v)
        place = [start % size for start in piece.places]
        width = max(place) + steps
        if piece.even:
            half = piece.places[0] // size % 2 * size
            for own, new in tensors:
                into = slice(half + place[0], half + width)
                own[slice(None) if rows is None else rows, :, into] = new.transpose(1, 2)
            found = [own[:, :, half : half + width] for own, _ in tensors]
            if rows is not None:
                found = [x[rows] for x in found]
            unseen = None if steps == 1 else _later(steps, width, k.device)
            return found[0], found[1], unseen
        number = row_numbers(piece.rows, k.device)[:, None]
        starts = row_numbers(piece.places, k.device)[:, None]
        step, key = torch.arange(steps, device=k.device), torch.arange(width, device=k.device)
        halves = starts // size % 2 * size
        for own, new in tensors:
            own[number, :, halves + starts % size + step] = new
        found = [own[number, :, halves + key].transpose(1, 2) for own, _ in tensors]
        unseen = key > (starts % size + step)[..., None]
        return found[0], found[1], unseen.repeat_interleave(k.shape[2], 0)

    def _before(
        self, piece: Piece, rows: Tensor | None, own_k: Tensor, own_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values before the rows' own blocks, [Z, T, D], and which of them are not there, [Z, 1, T]."""
        size = self.config.block_size
        stops = [start // size * size for start in piece.places]
        if self._store is None or not max(stops):
            return own_k.flatten(0, 1)[:, :0], own_v.flatten(0, 1)[:, :0], None
        k, v = (x if rows is None else x[rows] for x in self._store.prefix(max(stops)))
        absent = None
        if not piece.even:
            stop = row_numbers(tuple(stops), k.device)[:, None, None]
            absent = (torch.arange(max(stops), device=k.device) >= stop).repeat_interleave(k.shape[1], 0)
        return k.flatten(0, 1), v.flatten(0, 1), absent

    def _past(self, piece: Piece, rows: Tensor | None, heads: int) -> Past:
        """What the blocks before the rows' own are known by."""
        config, tensors = self.config, self._tensors
        per_block = config.block_size // config.unit
        blocks = [start // config.block_size for start in piece.places]
        count = max(blocks) * per_block

        def taken(name: str, length: int) -> Tensor | None:
            if name not in tensors or not count:
                return None
            x = tensors[name][:, :, :length]
            return (x if rows is None else x[rows]).flatten(0, 1)

        absent = None
        if not piece.even and count:
            own = row_numbers(tuple(blocks), q_device := tensors["own_k"].device)[:, None] * per_block
            absent = (torch.arange(count, device=q_device) >= own).repeat_interleave(heads, 0)
        state = None
        if "states" in tensors and count:
            sums = tensors["states"] if rows is None else tensors["states"][rows]
            if piece.even:
                state = (sums[:, :, blocks[0] % 2] / count).flatten(0, 1)
            else:
                own = row_numbers(tuple(blocks), sums.device)
                counts = (own * per_block).clamp(min=1)[:, None, None, None]
                state = (sums[torch.arange(len(own), device=sums.device), :, own % 2] / counts).flatten(0, 1)

        def fetch(head: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
            assert self._store is not None
            if rows is not None:
                head = rows[head // heads] * heads + head % heads
            return self._store.fetch(head, block)

        return Past(taken("meta", count), taken("mean_v", count), state, absent, fetch)


def _later(steps: int, width: int, device: torch.device) -> Tensor:
    """True where a key comes after a query, the last of which is at the last key, [1, steps, width]."""
    return torch.ones(1, steps, width, dtype=torch.bool, device=device).triu_(width - steps + 1)
