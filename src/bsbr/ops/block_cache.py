"""What decoding keeps of a text: its last two local blocks, a summary of each past block, past keys and values."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.attention import bsbr_attention
from bsbr.ops.device_step import DeviceStep
from bsbr.ops.own_blocks import OwnBlocks
from bsbr.ops.pieces import Piece, cut, row_numbers
from bsbr.ops.running import SUMMARISED, RunningSummaries
from bsbr.ops.stores import RecentStore, Store
from bsbr.ops.summaries import uncalibrated
from bsbr.ops.tensor_step import attend_by_tensors
from bsbr.ops.triton.problem import most_decoded, why_not_decode

Mode = Literal["full", "offload", "states"]
MODES: tuple[Mode, ...] = ("full", "offload", "states")


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
    chosen = config.max_top_k if config.selection != "recent" else 0
    if mode == "states" and (chosen or config.dense_below > config.block_size):
        raise ValueError(
            'cache "states" keeps no past keys and values, which '
            + (f"top_k {config.top_k} reads" if chosen else f"dense_below {config.dense_below} reads")
            + ': convert with top_k 0 or selection "recent" and dense_below 0, or use cache "full" or "offload"'
        )


class BlockCache:
    """The cache of one layer: give it each new part of a text, and it attends to all that came before.

    Rows start at position 0 and may have different lengths. Key and value buffers grow by a sixteenth; summaries and
    the running sum of first-order states are finished when a local block is.

    Args:
        config: the settings; with numbers of blocks for each key head, of which `top_k` is the most, only kernels go on
            beyond `dense_until`, as `bsbr.ops.shared_cache.block_cache` sees to.
        mode: "full" keeps past keys and values on the device, "offload" on the host, "states" drops them, for
            selection="recent" all but the latest.

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
        self._per_block = config.block_size // config.unit
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lengths: list[int] = []
        self._floors: list[int] = []  # lowest local block that each row's own keys and sums can go back to
        self._own: OwnBlocks | None = None
        self._summaries: RunningSummaries | None = None
        self._store: Store | None = None
        self._device_step = DeviceStep()
        self._neutral: Tensor | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        calibration: Tensor | None = None,
        counts: Sequence[int] | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Add tokens to each row and attend from them.

        Args:
            q: queries of the new tokens, [B, T, HQ, D].
            k: their keys, [B, T, H, D]; v: their values, [B, T, H, Dv].
            scale: factor on q.k.
            calibration: [HQ, 5]; None means uncalibrated.
            counts: tokens of each row; what comes later is padding. None means T.
            sinks: a logit for each query head, [HQ]; None means none.
        Returns:
            o [B, T, HQ, Dv] in the dtype of q, 0 for padding; with gradients only from the first tokens.
        """
        counts = tuple(counts) if counts is not None else (q.shape[1],) * q.shape[0]
        if not self.lengths:
            self._start(k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        if calibration is None:
            calibration = self._neutral_scalars(q.shape[2], wide, q.device)
        if max(self.lengths) == 0:
            return self._first(q, k, v, scale, calibration, counts, sinks)
        with torch.no_grad():
            calibration = calibration.to(wide)
            most = None if self.config.top_k_per_head is None else most_decoded(q, k)
            pieces = cut(tuple(self.lengths), counts, self.config, most)
            sinks = None if sinks is None else sinks.to(wide)
            if len(pieces) == 1 and len(pieces[0].rows) == len(q) and pieces[0].stop == q.shape[1]:
                return self._piece(pieces[0], q, k, v, scale, calibration, sinks)
            o = q.new_zeros(*q.shape[:3], v.shape[3])
            for piece in pieces:
                span = slice(piece.start, piece.stop)
                rows = slice(None) if len(piece.rows) == len(q) else row_numbers(piece.rows, q.device)
                new_q, new_k, new_v = (x[rows, span] for x in (q, k, v))
                o[rows, span] = self._piece(piece, new_q, new_k, new_v, scale, calibration, sinks)
        return o

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Take in a text whose attention is known already, in place of what the cache held.

        Args:
            k: keys, [B, T, H, D]; v: values, [B, T, H, Dv].
        """
        self._start(k, v)
        self._fill(k.detach().transpose(1, 2), v.detach().transpose(1, 2), (k.shape[1],) * k.shape[0])

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this many tokens, so that no buffer moves until then, as a CUDA graph needs.

        Args:
            tokens: of each row, those that are there included.
        """
        blocks = tokens // self.config.block_size
        for part, count in (
            (self._store, blocks * self.config.block_size),
            (self._summaries, blocks * self._per_block),
        ):
            if part is not None:
                part.reserve(count)

    def replayed(self) -> None:
        """Note that a CUDA graph of a step of one token was replayed: each row has one more.

        To be called after a replay, since it summarises a block that the token filled; not after the first replay of a
        capture, whose token the capture has counted already.
        """
        every = range(len(self.lengths))
        self._device_step.advance(every, 1)
        self.lengths = [length + 1 for length in self.lengths]
        self._finish_full(every)

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
        if deep and self.mode == "states":
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
        for part in (self._own, self._summaries, self._store):
            if part is not None:
                part.select(rows)

    def num_bytes(self) -> dict[str, int]:
        """Return the memory the cache takes, by kind: "device" and "host"; on a CPU all of it is the device's."""
        used = {"device": sum(part.nbytes for part in (self._own, self._summaries) if part is not None), "host": 0}
        if self._store is not None:
            place = "device" if self._store.k.device == self._store.device else "host"
            used[place] += self._store.k.nbytes + self._store.v.nbytes
        return used

    def _start(self, k: Tensor, v: Tensor) -> None:
        """Make empty tensors for rows like these."""
        size = self.config.block_size
        self._own, self._summaries = OwnBlocks(k, v, size), RunningSummaries(k, v, self.config)
        if self.mode != "states":
            self._store = Store(k, v, self.config.unit, size, self.mode == "offload")
        elif self.config.top_k:
            self._store = RecentStore(k, v, self.config.unit, size, self.config.top_k)
        self.lengths, self._floors = [0] * k.shape[0], [0] * k.shape[0]

    def _neutral_scalars(self, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The scalars of uncalibrated heads, made once: a CUDA graph of a step would make them in each replay."""
        known = self._neutral
        if known is None or (len(known), known.dtype, known.device) != (heads, dtype, device):
            with torch.inference_mode(False):
                known = uncalibrated(heads, dtype, device)
            # not kept of a capture: it holds nothing until a replay
            if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                self._neutral = known
        return known

    def _first(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, calibration: Tensor, counts: tuple[int, ...],
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend from a whole text, and fill the empty cache with it."""
        lengths = None
        if min(counts) < k.shape[1]:
            lengths = row_numbers(counts, k.device)
            padded = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
            k, v = (x.masked_fill(padded[:, :, None, None], 0) for x in (k, v))
        o = bsbr_attention(q, k, v, self.config, scale=scale, lengths=lengths, calibration=calibration, sinks=sinks)
        assert isinstance(o, Tensor)
        self._fill(k.detach().transpose(1, 2), v.detach().transpose(1, 2), counts)
        return o

    def _fill(self, k: Tensor, v: Tensor, counts: Sequence[int]) -> None:
        """Take in the first tokens of each row, keys [B, H, T, D] and values [B, H, T, Dv]."""
        assert self._own is not None
        size = self.config.block_size
        blocks = [count // size for count in counts]
        self.reserve(max(counts))  # one buffer for all of it, rather than one after the other
        for start in range(0, max(blocks), SUMMARISED):
            span = slice(start * size, min(start + SUMMARISED, max(blocks)) * size)
            self._finish(slice(None), start, k[:, :, span], v[:, :, span], blocks)
        for row, count in enumerate(counts):
            for block in {max(0, blocks[row] - 1), blocks[row]}:
                span = slice(block * size, min(count, (block + 1) * size))
                self._own.put(row, block, k[row, :, span], v[row, :, span])
        self.lengths, self._floors = list(counts), [max(0, block - 1) for block in blocks]

    def _finish(self, rows: slice, block: int, k: Tensor, v: Tensor, blocks: Sequence[int]) -> None:
        """Keep finished local blocks, the first of them number `block`, as `RunningSummaries.add` takes them."""
        assert self._summaries is not None
        if self._store is not None:
            self._store.write(rows, block * self.config.block_size, k, v)
        self._summaries.add(rows, block, k, v, blocks)

    def _rebuild(self, row: int, block: int) -> None:
        """Make a finished local block, and those before it, what the row ends with."""
        assert self._own is not None
        assert self._summaries is not None
        assert self._store is not None
        size = self.config.block_size
        k, v = (x[row] for x in self._store.prefix((block + 1) * size))
        for number in {max(0, block - 1), block}:
            span = slice(number * size, (number + 1) * size)
            self._own.put(row, number, k[:, span], v[:, span])
        self._summaries.sum_again(row, block, k, v)
        self._floors[row] = max(0, block - 1)

    def _piece(
        self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float, calibration: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Add the tokens of a piece [R, S, heads, width], attend from them, and finish the blocks they complete."""
        assert self._own is not None
        assert self._summaries is not None
        parts = self._own, self._summaries, self._store
        kernels = not piece.dense and (self.mode != "offload" or not self.config.top_k) and sinks is None
        if kernels and why_not_decode(q, k, v, self.config) is None:
            o = self._device_step.attend(piece, q, k, v, self.lengths, parts, self.config, calibration, scale)
        elif self.config.top_k_per_head is not None and not piece.dense:
            raise RuntimeError("heads that read different numbers of blocks: make this cache with `block_cache`")
        else:
            rows = None if len(piece.rows) == len(self.lengths) else row_numbers(piece.rows, q.device)
            o = attend_by_tensors(piece, rows, q, k, v, parts, self.config, calibration, scale, sinks)
        for index, row in enumerate(piece.rows):
            self.lengths[row] = piece.places[index] + piece.stop - piece.start
        self._finish_full(piece.rows)
        return o

    def _finish_full(self, rows: Sequence[int]) -> None:
        """Finish the own blocks that these rows have filled."""
        assert self._own is not None
        size = self.config.block_size
        finished = [row for row in rows if self.lengths[row] % size == 0]
        if finished and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("this step completes a block, which a CUDA graph must not repeat: capture another step")
        for row in finished:
            self._floors[row] = self.lengths[row] // size - 1
        blocks = {self._floors[row] for row in finished}
        together = len(blocks) == 1 and len(finished) == len(self.lengths)
        for one in (slice(None),) if together else tuple(slice(row, row + 1) for row in finished):
            block = self._floors[finished[0] if together else one.start]
            held = self._own.finished(one, block)
            self._finish(one, block, *held, [block + 1] * len(held[0]))
