"""What an attention module learns beside its own weights. It lives in the module as `bsbr`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsbr.config import BSBRConfig
from bsbr.ops import UNCALIBRATED
from bsbr.peers import AdditiveConfig, Shape


class MixerParameters(nn.Module):
    """Parameters with values that do not depend on the global random state."""

    def initial_values(self) -> dict[str, Tensor]:
        """Return the value of every parameter before training, on the CPU."""
        raise NotImplementedError

    def _register(self) -> None:
        device = torch.empty(0).device  # the meta device while transformers builds a model it will fill
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value.to(device)))


class Calibration(MixerParameters):
    """Five scalars for each query head, in the order of `bsbr.ops.CALIBRATION`, always in float32 or better.

    Args:
        settings: the model's BSBRConfig.
        module: the attention module.
    """

    calibration: Tensor

    def __init__(self, settings: BSBRConfig, module: nn.Module) -> None:
        super().__init__()
        self._heads = _text_config(module).num_attention_heads
        self._register()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the scalars of the plain expansion."""
        return {"calibration": torch.tensor(UNCALIBRATED, device="cpu").repeat(self._heads, 1)}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # model.bfloat16() must not round the scalars: they follow the model's device, not its dtype
        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if moved.dtype == value.dtype else value.to(moved.device)

        return super()._apply(move, recurse)


class PeerParameters(MixerParameters):
    """What a peer learns, by name; random parts come from the peer's seed and the number of the layer.

    Args:
        settings: the model's settings of the peer; they have a seed.
        module: the attention module.
        values: the peer's first values, from the sizes of the attention and a generator.
        keeps_rotation: the peer's queries and keys have the family's rotary positions.
    """

    wants_hidden = True

    def __init__(
        self,
        settings: Any,
        module: nn.Module,
        values: Callable[[Shape, torch.Generator], dict[str, Tensor]],
        *,
        keeps_rotation: bool,
    ) -> None:
        super().__init__()
        self._seed, self._layer = settings.seed, int(getattr(module, "layer_idx", 0))
        self._shape, self._values, self.keeps_rotation = attention_shape(module), values, keeps_rotation
        self.hidden: Tensor | None = None
        self._register()

    def initial_values(self) -> dict[str, Tensor]:
        """Return what the peer starts with."""
        generator = torch.Generator().manual_seed((self._seed << 16) + self._layer)
        with torch.device("cpu"):  # transformers builds models on the meta device
            return self._values(self._shape, generator)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Everything by name, as the peer's function takes it."""
        return {name: getattr(self, name) for name in self._parameters}


class AdditiveParameters(MixerParameters):
    """The learned projections of the original additive BSBR, random until somebody trains them.

    Args:
        settings: the model's AdditiveConfig.
        module: the attention module.
    """

    wants_hidden = True

    def __init__(self, settings: AdditiveConfig, module: nn.Module) -> None:
        super().__init__()
        config = _text_config(module)
        self._settings, self._layer = settings, int(getattr(module, "layer_idx", 0))
        self._hidden_size = config.hidden_size
        self._heads = config.num_attention_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self.hidden: Tensor | None = None
        self._register()

    def initial_values(self) -> dict[str, Tensor]:
        """Return uniform values in +-1 / sqrt(inputs), as nn.Linear has them, from the seed and the layer."""
        generator = torch.Generator().manual_seed((self._settings.seed << 16) + self._layer)
        sizes = {"r": (self._heads * self._width, self._hidden_size)}
        sizes["h"] = sizes["r"]
        if self._settings.compression is not None:
            kept = max(1, self._hidden_size // self._settings.compression)
            sizes |= {"compress": (kept, self._width**2), "decompress": (self._width**2, kept)}
        values = {}
        for name, (outputs, inputs) in sizes.items():
            for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                uniform = torch.rand(shape, generator=generator, device="cpu") * 2 - 1
                values[f"{name}_{part}"] = uniform * inputs**-0.5
        return values

    def meta(self, hidden: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Project the last token of every block but the last.

        Args:
            hidden: hidden states, [B, T, hidden].
            block_size: tokens of a block.
        Returns:
            R and H, [B, N - 1, HQ, D] each, N = ceil(T / block_size).
        """
        last = hidden[:, block_size - 1 : hidden.shape[1] - 1 : block_size]
        r, h = (F.linear(last, *self._linear(name, last)).unflatten(2, (self._heads, -1)) for name in "rh")
        return r, h

    @property
    def compress(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias that compress a state, or None."""
        return self._linear("compress") if self._settings.compression is not None else None

    @property
    def decompress(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias that restore a state, or None."""
        return self._linear("decompress") if self._settings.compression is not None else None

    def _linear(self, name: str, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        return (weight, bias) if like is None else (weight.to(like.dtype), bias.to(like.dtype))


def keep_hidden(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of an attention module: keep its hidden states until its attention function takes them.

    For a mixer that has no rotary positions, those that the family's models pass on turn by an angle of 0.
    """
    module.bsbr.hidden = args[0] if args else kwargs["hidden_states"]  # type: ignore[union-attr]
    rotation = kwargs.get("position_embeddings")
    if rotation is None or getattr(module.bsbr, "keeps_rotation", True):
        return None
    cosine, sine = rotation
    return args, kwargs | {"position_embeddings": (torch.ones_like(cosine), torch.zeros_like(sine))}


def take_hidden(parameters: nn.Module | None) -> Tensor | None:
    """Return the hidden states that `keep_hidden` kept, and let go of them.

    Args:
        parameters: a module's `bsbr`, or None.
    Returns:
        The hidden states, [B, T, hidden], or None where the mixer does not ask for them.
    """
    hidden = getattr(parameters, "hidden", None)
    if hidden is not None:
        parameters.hidden = None  # type: ignore[union-attr]
    return hidden


def attention_shape(module: nn.Module) -> Shape:
    """Return the sizes of an attention module.

    Args:
        module: of a model of transformers.
    Returns:
        Width of the hidden states, query heads, key heads and the width of a head.
    """
    config = _text_config(module)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(config.hidden_size, heads, getattr(config, "num_key_value_heads", None) or heads, width)


def _text_config(module: nn.Module) -> Any:
    return module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
