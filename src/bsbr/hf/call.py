"""What a mixer is given, and what a mixer is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Call(NamedTuple):
    """One call of an attention, rows starting at position 0."""

    q: Tensor
    """Queries, [B, Tq, HQ, D]; query i stands at position q_start + i."""
    k: Tensor
    """Keys, [B, T, H, D]."""
    v: Tensor
    """Values, [B, T, H, Dv]."""
    hidden: Tensor | None
    """Hidden states the queries were made of, [B, Tq, hidden], where the mixer asked for them."""
    scale: float
    """Factor on q.k."""
    q_start: int
    """Position of the first query."""
    lengths: Tensor | None
    """Real keys of each row, [B]; None means all."""
    dropout_p: float
    """Probability of dropping an attention weight."""
    sinks: Tensor | None = None
    """A logit of each query head for nothing, [HQ], of families that have sinks; only for a mixer that knows them."""
    block_indices: Tensor | None = None
    """Blocks to read instead of the mixer's own choice, [B, Tq, HQ, top_k], as `bsbr_attention` takes them."""


class Mixer(NamedTuple):
    """One row of `bsbr.hf.mixers.MIXERS`."""

    config: Any
    """Class of the settings."""
    parameters: Callable[[Any, nn.Module], nn.Module | None]
    """Makes what an attention module learns for this mixer, from the settings and the module."""
    attend: Callable[[Call, Any, Any], Tensor]
    """The attention, from the call, the settings and the learned parameters (None where nothing is attached)."""
    exact_until: Callable[[Any], int]
    """Tokens up to which the mixer is softmax attention, by definition."""
    knows_sinks: bool
    """A call may have sinks."""
