"""The peers as mixers: what a model gives each of them, and what it cannot do."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from bsbr.hf.call import Call, Mixer
from bsbr.hf.parameters import AdditiveParameters, PeerParameters
from bsbr.peers import (
    AdditiveConfig,
    FullConfig,
    GatedDeltaConfig,
    LinearConfig,
    NSAConfig,
    ValueOnlyConfig,
    WindowConfig,
    additive_attention,
    full_attention,
    gated_delta_layer,
    gated_delta_weights,
    linear_attention,
    nsa_attention,
    nsa_weights,
    value_only_attention,
    window_attention,
)

NEVER = 1 << 62
"""More tokens than there are."""


def _attend_additive(call: Call, settings: AdditiveConfig, parameters: AdditiveParameters | None) -> Tensor:
    learned, hidden = _learned(call, settings, parameters)
    _refuse_cache(call, settings)
    q_meta, k_meta = learned.meta(hidden, settings.block_size)
    return additive_attention(
        call.q, call.k, call.v, q_meta, k_meta, block_size=settings.block_size, scale=call.scale,
        compress=learned.compress, decompress=learned.decompress, dropout_p=call.dropout_p,
    )  # fmt: skip


def _attend_full(call: Call, settings: FullConfig, parameters: None) -> Tensor:
    return full_attention(call.q, call.k, call.v, scale=call.scale, q_start=call.q_start, dropout_p=call.dropout_p)


def _attend_window(call: Call, settings: WindowConfig, parameters: None) -> Tensor:
    return window_attention(
        call.q, call.k, call.v, window=settings.window, scale=call.scale, q_start=call.q_start,
        dropout_p=call.dropout_p,
    )  # fmt: skip


def _attend_linear(call: Call, settings: LinearConfig, parameters: None) -> Tensor:
    _refuse_dropout(call, settings)
    return linear_attention(call.q, call.k, call.v, q_start=call.q_start)


def _attend_gated_delta(call: Call, settings: GatedDeltaConfig, parameters: PeerParameters | None) -> Tensor:
    learned, hidden = _learned(call, settings, parameters)
    _refuse_cache(call, settings)
    _refuse_dropout(call, settings)
    return gated_delta_layer(call.q, call.k, call.v, hidden, learned.weights)


def _attend_nsa(call: Call, settings: NSAConfig, parameters: PeerParameters | None) -> Tensor:
    learned, hidden = _learned(call, settings, parameters)
    return nsa_attention(
        call.q, call.k, call.v, hidden, learned.weights, settings, scale=call.scale, q_start=call.q_start,
        lengths=call.lengths, dropout_p=call.dropout_p,
    )  # fmt: skip


def _attend_value_only(call: Call, settings: ValueOnlyConfig, parameters: None) -> Tensor:
    return value_only_attention(call.q, call.v, q_start=call.q_start)


def _learned(call: Call, settings: Any, parameters: nn.Module | None) -> tuple[Any, Tensor]:
    if parameters is None or call.hidden is None:
        raise NotImplementedError(
            f"the {settings.mixer} mixer needs its learned projections: make the model with bsbr.convert"
        )
    return parameters, call.hidden


def _refuse_cache(call: Call, settings: Any) -> None:
    if call.q_start:
        raise NotImplementedError(
            f"the {settings.mixer} mixer cannot continue from a cache, it needs past hidden states: pass "
            "use_cache=False"
        )


def _refuse_dropout(call: Call, settings: Any) -> None:
    if call.dropout_p:
        raise NotImplementedError(
            f"the {settings.mixer} mixer has no attention weights to drop: set the model's attention dropout to 0"
        )


def _nothing(settings: Any, module: nn.Module) -> None:
    """What a mixer without parameters learns."""


def _gated_delta_parameters(settings: GatedDeltaConfig, module: nn.Module) -> PeerParameters:
    return PeerParameters(settings, module, gated_delta_weights, keeps_rotation=False)


def _nsa_parameters(settings: NSAConfig, module: nn.Module) -> PeerParameters:
    return PeerParameters(settings, module, partial(nsa_weights, settings), keeps_rotation=True)


PEER_MIXERS = {
    "full": Mixer(FullConfig, _nothing, _attend_full, lambda settings: NEVER, False),
    "window": Mixer(WindowConfig, _nothing, _attend_window, lambda settings: settings.window, False),
    "linear": Mixer(LinearConfig, _nothing, _attend_linear, lambda settings: 0, False),
    "gated_delta": Mixer(GatedDeltaConfig, _gated_delta_parameters, _attend_gated_delta, lambda settings: 0, False),
    "nsa": Mixer(NSAConfig, _nsa_parameters, _attend_nsa, lambda settings: 0, False),
    "additive": Mixer(
        AdditiveConfig, AdditiveParameters, _attend_additive, lambda settings: settings.block_size, False
    ),
    "value_only": Mixer(ValueOnlyConfig, _nothing, _attend_value_only, lambda settings: 0, False),
}
"""The rows of `bsbr.hf.mixers.MIXERS` that are no BSBR."""
