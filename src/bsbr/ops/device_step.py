"""A step of decoding by kernels, which read on the device how long each row of the cache is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.own_blocks import OwnBlocks
from bsbr.ops.pieces import Piece, row_numbers
from bsbr.ops.running import RunningSummaries
from bsbr.ops.shares import on_device
from bsbr.ops.stores import Store


class DeviceStep:
    """Runs the kernels for one layer's cache, and keeps the lengths of its rows on the device.

    The kernels move the lengths on, so that a step replayed in a CUDA graph goes on where the last one stopped.
    """

    def __init__(self) -> None:
        self._lengths = torch.empty(0)
        self._known: list[int] = []  # what the host knows to stand in the tensor

    def attend(
        self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int],
        parts: tuple[OwnBlocks, RunningSummaries, Store | None], config: BSBRConfig, calibration: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        """Add the tokens of a piece and attend from them.

        Args:
            piece: which rows, and where they are.
            q: [R, S, HQ, D]; k, v: [R, S, H, D].
            lengths: tokens of every row of the cache before.
            parts: the layer's own blocks, summaries, and keys and values where something is retrieved.
            config: the settings; numbers of blocks for each key head are at most `top_k`.
            calibration: [HQ, 5] float32.
            scale: factor on q.k.
        Returns:
            o, [R, S, HQ, D].
        """
        from bsbr.ops.triton.decode import Held, triton_decode  # triton is imported only where it is used

        own, summaries, store = parts
        meta, mean_v, states = summaries.tensors()
        assert meta is not None
        past_k, past_v = (store.k, store.v) if store is not None and config.top_k else (None, None)
        held = Held(own.k, own.v, past_k, past_v, meta, mean_v, states)
        self._set(lengths, q.device)
        rows = row_numbers(piece.rows, q.device)
        numbers = config.top_k_per_head
        counts = None if numbers is None else on_device(numbers, q.device)
        o = triton_decode(q, k, v, held, rows, self._lengths, config, calibration, scale, counts)
        self.advance(piece.rows, piece.stop - piece.start)
        return o

    def advance(self, rows: Sequence[int], steps: int) -> None:
        """Note that the device has moved rows on."""
        for row in rows:
            self._known[row] += steps

    def _set(self, lengths: Sequence[int], device: torch.device) -> None:
        if self._known == list(lengths):
            return
        if len(self._lengths) != len(lengths):
            with torch.inference_mode(False):
                self._lengths = torch.empty(len(lengths), dtype=torch.int32, device=device)
        self._lengths.copy_(row_numbers(tuple(lengths), device))
        self._known = list(lengths)
