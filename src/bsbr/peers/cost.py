"""What each attention costs: the state that decoding keeps, arithmetic per token, and parameters of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.peers.additive import AdditiveConfig
from bsbr.peers.full import FullConfig
from bsbr.peers.gated_delta import TAPS, GatedDeltaConfig
from bsbr.peers.linear import LinearConfig
from bsbr.peers.nsa import NSAConfig
from bsbr.peers.settings import PeerConfig, Shape
from bsbr.peers.value_only import ValueOnlyConfig
from bsbr.peers.window import WindowConfig

_SUMMARY_BYTES = 4
"""Bytes of a number of a summary or a running state, which are kept in float32."""


class Cost(NamedTuple):
    """The cost of one attention layer for one sequence."""

    state_bytes: int
    """What decoding must keep of the tokens so far, at least; buffers with room to grow take more."""
    flops_per_token: float
    """Floating-point operations of one token's forward pass, on average over the sequence, two for a multiplication
    and its addition: products with keys, values, summaries, states and the mixer's own projections, in the way that
    needs fewest, token by token. Exponentials and divisions are left out, and so are the projections to queries, keys,
    values and outputs, which are the same for all."""
    parameters: int
    """Beside those projections."""


def cost(settings: BSBRConfig | PeerConfig, shape: Shape, tokens: int, *, bytes_per_number: int = 2) -> Cost:
    """State the cost of an attention.

    Args:
        settings: as from `make`; with `top_k_per_head`, `top_k` must be their mean.
        shape: the sizes of the attention.
        tokens: of the sequence.
        bytes_per_number: of keys and values; summaries and running states have 4.
    Returns:
        The cost of one layer.
    Raises:
        ValueError: settings of no known attention.

    Example:
        >>> cost(FullConfig(), Shape(64, 8, 2, 8), 1000).state_bytes  # keys and values of 2 heads of 8, 2 bytes each
        64000
    """
    if type(settings) not in _COSTS:
        raise ValueError(f"no cost is known of {type(settings).__name__}")
    position = torch.arange(tokens, dtype=torch.float64)
    return _COSTS[type(settings)](settings, shape, position, bytes_per_number)


def _mean(x: Tensor) -> float:
    return x.mean().item() if len(x) else 0.0


def _past_keys(shape: Shape, keys: int, size: int) -> int:
    """Bytes of keys and values."""
    return 2 * shape.key_heads * shape.width * keys * size


def _read(shape: Shape, keys: Tensor) -> float:
    """Operations of softmax attention to so many keys at each position: scores and sums."""
    return 4 * shape.heads * shape.width * _mean(keys)


def _full(settings: FullConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    return Cost(_past_keys(shape, len(position), size), _read(shape, position + 1), 0)


def _window(settings: WindowConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    kept = min(len(position), settings.window)
    return Cost(_past_keys(shape, kept, size), _read(shape, (position + 1).clamp(max=settings.window)), 0)


def _bsbr(settings: BSBRConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    width, heads, block = shape.width, shape.heads, settings.block_size
    start = position // block * block  # tokens of past blocks
    exact = position - start + 1 + start.clamp(max=settings.top_k * settings.unit)
    sparse = position >= settings.dense_below
    keys = torch.where(sparse, exact, position + 1)
    entries = _mean(torch.where(sparse, start / settings.unit, 0.0))
    far = settings.far != "drop"
    meta = width * (2 if settings.far == "moments" else 1) if settings.top_k or far else 0
    entry = meta + (width if far else 0)
    states = {
        "none": 0.0,
        "global": 2 * width**2 * _mean(sparse.double()),
        "block": 2 * width**2 * (_mean(sparse.double()) + entries / block),
        "token": 2 * width**2 * entries,
    }[settings.state or "none"]
    summarised = 2 * width**2 * shape.key_heads if settings.state != "none" else 0.0
    needs_past = settings.top_k or settings.dense_below > block
    kept = len(position) if needs_past else min(len(position), block)
    ready = len(position) // block * (block // settings.unit)
    state_size = {"none": 0, "global": width**2}.get(settings.state or "none", width**2 * ready)
    return Cost(
        _past_keys(shape, kept, size) + _SUMMARY_BYTES * shape.key_heads * (entry * ready + state_size),
        _read(shape, keys) + 2 * heads * entry * entries + heads * states + summarised,
        5 * heads,
    )


def _linear(settings: LinearConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    state = shape.width * (shape.width + 1)  # a column for the sum of weights
    return Cost(_SUMMARY_BYTES * shape.key_heads * state, 2 * state * (shape.heads + shape.key_heads), 0)


def _gated_delta(settings: GatedDeltaConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    hidden, heads, key_heads, width = shape
    channels = (heads + 2 * key_heads) * width
    projections = hidden * (2 * key_heads + heads * width)
    recent = min(len(position), TAPS - 1) * channels  # what the convolutions see
    return Cost(
        _SUMMARY_BYTES * key_heads * width**2 + size * recent,
        # a state decays, is read by its key and added to; each query reads it
        width**2 * (5 * key_heads + 2 * heads) + 2 * TAPS * channels + 2 * projections,
        projections + TAPS * channels + 2 * key_heads + width,
    )


def _nsa(settings: NSAConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    hidden, heads, key_heads, width = shape
    block = settings.block_size
    start = position // block * block
    exact = position - start + 1 + start.clamp(max=settings.top_k * block)
    keys = exact + (position + 1).clamp(max=settings.window) + start / block
    gates = 3 * heads * hidden
    return Cost(
        _past_keys(shape, len(position) + len(position) // block, size),
        _read(shape, keys) + 4 * key_heads * width + 2 * gates,
        gates + 2 * key_heads * block * width,
    )


def _additive(settings: AdditiveConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    hidden, heads, key_heads, width = shape
    block, square = settings.block_size, width**2
    kept = square if settings.compression is None else max(1, hidden // settings.compression)
    past, own = position // block, position % block + 1
    packing = 0 if settings.compression is None else square * kept
    meta = heads * width
    each_block = 2 * heads * (width + kept) * _mean(past) + 4 * hidden * meta + 2 * packing * (heads + key_heads)
    ready = len(position) // block
    return Cost(
        _past_keys(shape, min(len(position), block), size) + size * ready * (key_heads * kept + meta),
        _read(shape, own) + 2 * square * (heads + key_heads) + each_block / block,
        2 * meta * (hidden + 1) + (2 * packing + kept + square if packing else 0),
    )


def _value_only(settings: ValueOnlyConfig, shape: Shape, position: Tensor, size: int) -> Cost:
    return Cost(0, 0.0, 0)


_COSTS: dict[type, Callable[[Any, Shape, Tensor, int], Cost]] = {
    BSBRConfig: _bsbr,
    FullConfig: _full,
    WindowConfig: _window,
    LinearConfig: _linear,
    GatedDeltaConfig: _gated_delta,
    NSAConfig: _nsa,
    AdditiveConfig: _additive,
    ValueOnlyConfig: _value_only,
}
