"""Lengths that a model's positions allow, and more of them."""

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bsbr.errors import UserError
from bsbr.hf.families import PREFIX
from bsbr.hf.sharing import remove_hook, share
from bsbr.memory import require_memory

Method = Literal["interpolate", "tile", "linear", "dynamic", "yarn"]

_LEARNED = {
    "gpt2": ("transformer.wpe", 0),
    "gpt_bigcode": ("transformer.wpe", 0),
    "opt": ("model.decoder.embed_positions", 2),
}
"""Families with learned positions: where they are, and how many rows come before that of position 0."""


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many learned positions a model has.

    Args:
        model: stock or converted.
    Returns:
        The number, or None where positions are computed (rotary) and any length runs.
    """
    found = _learned(model)
    return None if found is None else found[0].num_embeddings - found[1]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse a length for which a model has no positions.

    Args:
        model: stock or converted.
        length: tokens.
    Raises:
        UserError: the model has fewer positions.
    """
    available = max_positions(model)
    if available is not None and length > available:
        raise UserError(
            f"length {length} is beyond the model's {available} positions: use at most {available} tokens, or extend "
            f"the positions to {length} (max_length in Python, --max-length on the command line)"
        )


def extend_positions(
    model: PreTrainedModel, max_length: int, method: Method = "interpolate", *, trained_length: int | None = None
) -> PreTrainedModel:
    """Give a model positions for more tokens; the model given stays as it is and shares all other weights.

    Learned positions (GPT-2, OPT) are resized. Rotary models run at any length: with a method for learned positions
    only the maximum in their config is raised, with a warning that the model was not trained so far out; with one for
    rotary positions they are scaled, by transformers' own code.

    Source of the rotary methods: Chen et al., "Extending Context Window via Positional Interpolation" (arXiv
    2306.15595), linear; Peng et al., "YaRN" (arXiv 2309.00071), yarn and, in its section 3.3, dynamic.

    Args:
        model: stock or converted.
        max_length: tokens the result takes; a model that already takes them is returned as a copy without change.
        method: "interpolate" stretches the learned positions linearly, which moves all of them but the first and
            last; "tile" repeats them, which leaves the known ones as they are. "linear" divides rotary positions by
            the factor, "yarn" only where they turn slowly, "dynamic" raises the base with each text's own length.
        trained_length: tokens that a rotary model was trained at, which the factor is counted from; None means the
            maximum in its config.
    Returns:
        The model with more positions.
    Raises:
        UserError: a method or length that makes no sense, positions of a kind that cannot be extended, or rotary
            positions that are already scaled.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=1, max_position_embeddings=64)
        >>> extend_positions(LlamaForCausalLM(config), 256, "yarn").config.rope_parameters["factor"]
        4.0
    """
    if method not in (*_METHODS, *_ROTARY_METHODS):
        raise UserError(f"method must be one of {', '.join((*_METHODS, *_ROTARY_METHODS))}, got {method!r}")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise UserError(f"max_length must be an integer >= 1, got {max_length!r}")
    model = share(model)
    found = _learned(model)
    if found is None:
        config, known = _rotary(model)
        known = known if trained_length is None else trained_length
        if method in _ROTARY_METHODS:
            _scale_rotary(model, config, known, max_length, method)
        else:
            _raise_rotary_maximum(config, known, max_length)
    elif method in _ROTARY_METHODS:
        raise UserError(f'method "{method}" is for rotary positions, this model has learned ones: use "interpolate"')
    elif max_length > found[0].num_embeddings - found[1]:
        embedding, offset = found
        weight = embedding.weight.detach()
        table = weight[offset:].float()
        need = max_length * table.shape[1] * (table.element_size() + weight.element_size())
        require_memory(need, f"positions for {max_length} tokens", "Use a smaller --max-length")
        rows = _METHODS[method](table, max_length).to(weight.dtype)
        # the module is this copy's own: only its weight was shared
        embedding.weight = nn.Parameter(torch.cat([weight[:offset], rows]), embedding.weight.requires_grad)
        embedding.num_embeddings = max_length + offset
        model.config.max_position_embeddings = max_length
    return model


def _interpolate(known: Tensor, length: int) -> Tensor:
    return F.interpolate(known.T[None], size=length, mode="linear", align_corners=True)[0].T


def _tile(known: Tensor, length: int) -> Tensor:
    return known.repeat(-(-length // len(known)), 1)[:length]


_METHODS = {"interpolate": _interpolate, "tile": _tile}


_ROTARY_METHODS = ("linear", "dynamic", "yarn")


def _rotary(model: PreTrainedModel) -> tuple[Any, int]:
    """The config that holds rotary positions which nobody scaled yet, and its maximum."""
    config = model.config.get_text_config(decoder=True)
    rotary: Any = getattr(config, "rope_parameters", None)
    known = getattr(config, "max_position_embeddings", None)
    if not rotary or known is None:
        raise UserError(f"the positions of {model.config.model_type} models cannot be extended")
    kinds = {
        str(part["rope_type"]) for part in (rotary, *rotary.values()) if isinstance(part, dict) and "rope_type" in part
    }
    if kinds != {"default"}:
        raise UserError(
            f"this model already scales its positions ({', '.join(sorted(kinds - {'default'}))}): load it with the "
            "rope_parameters that suit the length"
        )
    return config, known


def _raise_rotary_maximum(config: Any, known: int, max_length: int) -> None:
    if max_length <= known:
        return
    config.max_position_embeddings = max(max_length, config.max_position_embeddings)
    warnings.warn(f"rotary positions beyond {known} run, but the model may not have been trained on them", stacklevel=3)


def _scale_rotary(model: PreTrainedModel, config: Any, known: int, max_length: int, method: str) -> None:
    if max_length <= known:
        return
    if "rope_theta" not in config.rope_parameters:
        raise UserError(f"{model.config.model_type} models have several kinds of rotary positions: set them by hand")
    # the dynamic method counts from the maximum in the config, and finds each text's factor itself
    factor = 1.0 if method == "dynamic" else max_length / known
    added = {"rope_type": method, "factor": factor, "original_max_position_embeddings": known}
    config.rope_parameters = {**config.rope_parameters, **added}
    config.max_position_embeddings = known if method == "dynamic" else max_length
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq") and hasattr(module, "rope_type"):
            parent, _, own = name.rpartition(".")
            scaled = type(module)(config)  # type: ignore[call-arg]
            setattr(model.get_submodule(parent), own, scaled.to(module.inv_freq.device))


def _learned(model: PreTrainedModel) -> tuple[nn.Embedding, int] | None:
    path, offset = _LEARNED.get(model.config.model_type.removeprefix(PREFIX), (None, 0))
    if path is None:
        return None
    embedding = model.get_submodule(path)
    assert isinstance(embedding, nn.Embedding)
    return embedding, offset


def guard_positions(model: PreTrainedModel, *, on: bool = True) -> None:
    """Make a model with learned positions answer a position it does not have with one sentence.

    Args:
        model: a converted model.
        on: False takes the guard away.
    """
    found = _learned(model)
    if found is None:
        return
    remove_hook(found[0], refuse_positions)
    if on:
        found[0].register_forward_pre_hook(refuse_positions, with_kwargs=True)


def refuse_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of learned positions.

    On a CPU the positions are looked at, which costs nothing; elsewhere only where there are too many tokens, so
    that no device waits.

    Raises:
        UserError: a position beyond the last.
    """
    positions = kwargs.get("position_ids", args[0] if args else None)
    if positions is None or positions.is_meta or torch.compiler.is_compiling() or not positions.numel():
        return
    assert isinstance(module, nn.Embedding)
    available = module.num_embeddings - getattr(module, "offset", 0)
    if positions.device.type != "cpu" and positions.shape[-1] <= available:
        return
    highest = int(positions.max())
    if highest >= available:
        raise UserError(
            f"{highest + 1} tokens are beyond the model's {available} positions: use at most {available}, or extend "
            "the positions (max_length in Python, --max-length on the command line)"
        )
