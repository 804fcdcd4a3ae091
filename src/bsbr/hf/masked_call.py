"""What an attention mask says about one call with a cache."""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskedCall(NamedTuple):
    """Which tokens of a call are real."""

    past: list[int]
    """Real tokens of each row before the call."""
    counts: list[int] | None
    """Real tokens of each row in the call; None where all are."""
    order: Tensor | None
    """Slots of the call's real tokens of each row, first to last, [B, most of them]; None where all are real."""


def read_mask(mask: Tensor | None, rows: int, slots: int, queries: int) -> MaskedCall:
    """Read a mask; what was read is kept with it, since every layer of a model asks.

    Args:
        mask: as made by `bsbr.hf.attention.bsbr_mask` for all slots, or None where all hold a token.
        rows: rows of the batch.
        slots: places before the call, padding included.
        queries: places of the call.
    Returns:
        What it says.

    Example:
        >>> read_mask(torch.tensor([[[[0, 1, 1, 1]]]]), 1, 2, 2).past
        [1]
    """
    if mask is None:
        return MaskedCall([slots] * rows, None, None)
    kept: dict[tuple[int, int], MaskedCall] = getattr(mask, "_bsbr_calls", {})
    if (slots, queries) not in kept:
        real = mask[:, 0, 0] > 0
        new = real[:, slots:]
        past, counts = torch.stack([real[:, :slots].sum(1), new.sum(1)]).tolist()
        order = None
        if min(counts) < queries:  # real tokens first, in their order; a row keeps one slot even if it has none
            order = (~new).int().argsort(dim=1, stable=True)[:, : max(1, *counts)]
        kept[slots, queries] = MaskedCall(past, counts if order is not None else None, order)
        mask._bsbr_calls = kept  # type: ignore[attr-defined]
    return kept[slots, queries]
