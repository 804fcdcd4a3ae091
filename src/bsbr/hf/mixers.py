"""What may stand where a model's attention stood: one table row for each mixer."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.hf.call import Call, Mixer
from bsbr.hf.families import LAYERS, NAME
from bsbr.hf.parameters import Calibration
from bsbr.hf.peers import NEVER, PEER_MIXERS
from bsbr.ops import bsbr_attention
from bsbr.ops.schedule import dense_until


class MixerConfig(Protocol):
    """The settings of a mixer: a frozen dataclass that knows its name and survives JSON."""

    @property
    def mixer(self) -> str:
        """Name of the row in `MIXERS`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""


def _attend_bsbr(call: Call, settings: BSBRConfig, parameters: Calibration | None) -> Tensor:
    if settings.state == "block" and call.q_start:
        raise NotImplementedError('state="block" cannot continue from a cache: pass use_cache=False or state="global"')
    o = bsbr_attention(
        call.q, call.k, call.v, settings, scale=call.scale, q_start=call.q_start, lengths=call.lengths,
        calibration=None if parameters is None else parameters.calibration, sinks=call.sinks,
        dropout_p=call.dropout_p, block_indices=call.block_indices,
    )  # fmt: skip
    assert isinstance(o, Tensor)
    return o


MIXERS = {"bsbr": Mixer(BSBRConfig, Calibration, _attend_bsbr, dense_until, True), **PEER_MIXERS}
"""Every mixer by name."""

_DENSE = BSBRConfig(top_k=0, far="drop", dense_below=NEVER)
"""What a layer that is not converted runs: its whole past, read exactly."""


def write_settings(settings: MixerConfig) -> dict[str, Any]:
    """Return what a model's config keeps of a mixer's settings.

    Args:
        settings: a BSBRConfig or the config of a peer.
    Returns:
        The fields and the mixer's name.
    Raises:
        UserError: not the settings of a mixer.

    Example:
        >>> from bsbr.peers import WindowConfig
        >>> write_settings(WindowConfig(window=64))
        {'window': 64, 'mixer': 'window'}
    """
    name = getattr(settings, "mixer", None)
    if name not in MIXERS or type(settings) is not MIXERS[name].config:
        expected = ", ".join(row.config.__name__ for row in MIXERS.values())
        raise UserError(f"config must be one of {expected}, got {type(settings).__name__}")
    return settings.to_dict() | {"mixer": name}


def read_settings(values: Mapping[str, Any] | None, layer: int | None = None) -> tuple[Mixer, Any]:
    """Return the mixer and its settings from what a model's config keeps.

    Args:
        values: as from `write_settings`; None means BSBR with its defaults, a missing name BSBR.
        layer: number of the layer whose settings are wanted; None means the whole model's.
    Returns:
        The row of `MIXERS`, and the settings.
    Raises:
        UserError: no such mixer, or settings it does not accept.

    Example:
        >>> read_settings({"top_k": 2})[1].top_k
        2
    """
    if not isinstance(values or {}, Mapping):
        raise UserError(f"the model's bsbr settings are not valid: expected a table, got {values!r}")
    try:
        return _read(tuple((name, _frozen(x), type(x)) for name, x in values.items()) if values else (), layer)
    except TypeError as error:  # a list or table cannot be looked up, and is no setting either
        raise UserError(f"the model's bsbr settings are not valid: {error}") from error


def _frozen(value: Any) -> Any:
    """A list, as JSON gives it, as a tuple, which a cache can look up."""
    return tuple(_frozen(x) for x in value) if isinstance(value, list | tuple) else value


def layer_settings(config: Any, layer: int) -> tuple[Mixer, Any]:
    """Return the mixer of one layer and its settings.

    Args:
        config: of a model; what it keeps is as from `write_settings`.
        layer: index of the layer.
    Returns:
        The row of `MIXERS`, and the settings; exact attention for a layer that is not converted.
    Raises:
        UserError: as `read_settings` and `is_converted`.

    Example:
        >>> from transformers import PreTrainedConfig
        >>> layer_settings(PreTrainedConfig(bsbr={"top_k": 2}, bsbr_layers=[1]), 1)[1].top_k
        2
    """
    if not is_converted(config, layer):
        return MIXERS["bsbr"], _DENSE
    return read_settings(getattr(config, NAME, None), layer)


def is_converted(config: Any, layer: int) -> bool:
    """Say whether a converted model's layer of full attention is one of those that a mixer replaces.

    Args:
        config: of the model.
        layer: index of the layer.
    Returns:
        True for every layer where the config names none.
    Raises:
        UserError: what the config names are no layers.
    """
    layers = getattr(config, LAYERS, None)
    if layers is None:
        return True
    if not isinstance(layers, list):
        raise UserError(f"the model's {LAYERS} are not valid: expected a list of layer numbers, got {layers!r}")
    return layer in layers


@lru_cache(maxsize=256)  # called by every layer at every step
def _read(items: tuple[tuple[str, Any, type], ...], layer: int | None) -> tuple[Mixer, Any]:
    values = {name: value for name, value, _ in items}  # the type tells True and 1.0 from 1, which look up as one
    name = values.pop("mixer", "bsbr")
    if name not in MIXERS:
        raise UserError(f"unknown mixer {name!r}: expected one of {', '.join(MIXERS)}")
    try:
        settings = MIXERS[name].config.from_dict(values)
        return MIXERS[name], settings if layer is None or name != "bsbr" else settings.of_layer(layer)
    except (TypeError, ValueError) as error:
        raise UserError(f"the model's bsbr settings are not valid: {error}") from error


def attend(call: Call, mixer: Mixer, settings: Any, parameters: nn.Module | None) -> Tensor:
    """Run a mixer outside of autocast, which would take the digits from its float32 summaries.

    Args:
        call: the tensors and numbers.
        mixer, settings: as from `read_settings`.
        parameters: what the module learned, or None.
    Returns:
        o, [B, Tq, HQ, Dv].
    """
    device = call.q.device.type
    if not torch.is_autocast_enabled(device):
        return mixer.attend(call, settings, parameters)
    dtype = torch.get_autocast_dtype(device)
    hidden = None if call.hidden is None else call.hidden.to(dtype)
    call = call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype), hidden=hidden)
    with torch.autocast(device, enabled=False):
        return mixer.attend(call, settings, parameters)
