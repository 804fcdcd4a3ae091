"""Conversion: a pretrained model with its attention replaced, on the same weights; and back."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.hf.families import LAYERS, NAME, bypass_message, dispatches, is_encoder, stock_classes
from bsbr.hf.loading import load_model
from bsbr.hf.mixers import MIXERS, MixerConfig, read_settings, write_settings
from bsbr.hf.modeling import BSBRModelMixin, attach, attention_modules, derive, detach
from bsbr.hf.positions import extend_positions
from bsbr.hf.remote import forget_classes
from bsbr.hf.sharing import share

_KEPT = "_bsbr_dense_attention"
"""Attribute of a converted model: the attention implementation it had."""

_KEPT_NAME = "_bsbr_dense_name"
"""Attribute of a converted model: the folder or name its original was loaded by."""


def convert(
    model_or_name: PreTrainedModel | str | Path,
    config: MixerConfig,
    *,
    max_length: int | None = None,
    layers: Sequence[int] | None = None,
) -> PreTrainedModel:
    """Replace the attention of a causal language model; the model given stays as it is.

    Source: docs/method.md. A pretrained model's own queries, keys and values already are what block retrieval
    needs, so nothing is trained; `bsbr.calibrate` fits five scalars per head afterwards.

    1. Copy the model's modules around the same weights (`bsbr.hf.sharing.share`), so that no memory is spent.
    2. Make it a model of type "bsbr-<family>" that saves and loads with its settings.
    3. Give each attention module what its mixer learns. Sliding-window layers of a hybrid stay as they are, and so
       do layers that `layers` leaves out. Sinks are kept, exactly.

    Positions, biases, tied embeddings, dropout, training mode and gradient checkpointing are kept. A converted model
    can be converted again: its calibration is kept, `top_k_per_head` with it, if both configs are a BSBRConfig that
    differ in `dense_below` at most, and starts uncalibrated otherwise, since it fits the block size and `top_k` that it
    was made for.

    Args:
        model_or_name: a causal language model, or the folder or hub name of one.
        config: a BSBRConfig, or the config of a peer, as `bsbr.peers.make` gives them by name.
        max_length: tokens the result must take; learned positions are interpolated (see `extend_positions`).
        layers: numbers of the full-attention layers to convert, from 0; the others stay dense. None means all, or
            those of a model that is converted already.
    Returns:
        The converted model.
    Raises:
        UserError: the model's family computes attention itself, caps its scores, is an encoder-decoder, has only
            sliding windows, or is not a plain causal language model; the name cannot be loaded; or no such layer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from bsbr import BSBRConfig
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=64))
        >>> convert(model, BSBRConfig(block_size=16, top_k=1)).config.model_type
        'bsbr-gpt2'
    """
    settings = write_settings(config)
    source = load_model(model_or_name) if isinstance(model_or_name, str | Path) else model_or_name
    _check(source)
    _check_sinks(source, settings["mixer"])
    chosen = _choose(source, layers)
    model = share(source) if max_length is None else extend_positions(source, max_length)
    model.name_or_path = _unsaved(source, "converted")
    if isinstance(source, BSBRModelMixin):
        same_layers = chosen == getattr(source.config, LAYERS, None)
        calibrated = _with_calibration(source.config.bsbr, settings) if same_layers else None
        if calibrated is not None:
            model.config.bsbr = calibrated
            return model
        detach(model)
        _write(model, settings, chosen)
        attach(model)
        return model
    config_class, model_class = derive(source.config.model_type)
    setattr(model, _KEPT, source.config._attn_implementation)
    setattr(model, _KEPT_NAME, source.name_or_path)
    model.__class__, model.config.__class__ = model_class, config_class
    vars(model.config).pop("model_type", None)  # a config that was read from a file has the old one beside its class's
    _write(model, settings, chosen)
    model.set_attn_implementation(NAME)
    attach(model)
    return model


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Give back the dense model that a converted model was made of; the model given stays as it is.

    The weights are shared, and the attention implementation is the one the model had before `convert` (the default
    of its class for a model loaded from a folder). Positions that were extended stay extended.

    Args:
        model: a converted model.
    Returns:
        A model of the stock class.
    Raises:
        UserError: the model is not converted.
    """
    if not isinstance(model, BSBRModelMixin):
        raise UserError(f"{type(model).__name__} is not a converted model: nothing to revert")
    dense = share(model)
    detach(dense)
    stock_config, stock_model = model.stock_classes
    dense.__class__, dense.config.__class__ = stock_model, stock_config
    del dense.config.bsbr
    vars(dense.config).pop(LAYERS, None)
    forget_classes(dense.config)
    default = "sdpa" if stock_model._supports_sdpa else "eager"
    dense.set_attn_implementation(dense.__dict__.pop(_KEPT, default))
    dense.name_or_path = dense.__dict__.pop(_KEPT_NAME, _unsaved(model, "reverted"))
    return dense


def _unsaved(source: PreTrainedModel, how: str) -> str:
    """What stands in an adapter (peft) in place of its base: nothing that could be loaded with another attention."""
    return f"{source.config._name_or_path or source.config.model_type} {how} in memory: save it and load its folder"


def _write(model: PreTrainedModel, settings: dict[str, Any], layers: list[int] | None) -> None:
    model.config.bsbr = settings
    vars(model.config).pop(LAYERS, None)
    if layers is not None:
        setattr(model.config, LAYERS, layers)


def _choose(source: PreTrainedModel, layers: Sequence[int] | None) -> list[int] | None:
    """The layers to convert, ascending; None for every one that can be."""
    if layers is None:
        return getattr(source.config, LAYERS, None)
    stock = source if not isinstance(source, BSBRModelMixin) else revert(source)
    possible: list[Any] = [module.layer_idx for module in attention_modules(stock)]
    chosen = sorted(set(layers))
    unknown = [layer for layer in chosen if layer not in possible or isinstance(layer, bool)]
    if unknown or not chosen:
        raise UserError(
            f"layers must be some of the full-attention layers {possible}, got {unknown[0] if unknown else 'none'}"
        )
    return None if chosen == possible else chosen


def _with_calibration(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    """The new settings with what calibration put into the old ones; None where it does not fit them."""
    before, after = (read_settings(values)[1] for values in (old, new))
    if isinstance(before, BSBRConfig) and isinstance(after, BSBRConfig):
        before = replace(before, dense_below=after.dense_below)
        if after.top_k_per_head is None:
            after = replace(after, top_k_per_head=before.top_k_per_head)
    return write_settings(after) if before == after else None


def _check(model: Any) -> None:
    """Refuse what would not be the same model with another attention."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"expected a transformers causal language model, got {type(model).__name__}: convert the base model first "
            "and wrap it afterwards"
        )
    if isinstance(model, BSBRModelMixin):
        return
    config = model.config
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UserError(
            f"models of type {config.model_type} with cross-attention cannot be converted: only decoder-only models can"
        )
    if is_encoder(config):
        raise UserError(
            f"models of type {config.model_type} are encoders, whose attention looks both ways, and cannot be "
            "converted: BSBR attention is causal, give a decoder-only language model"
        )
    classes = stock_classes(config.model_type)
    if classes is None or not dispatches(config.model_type):
        raise UserError(bypass_message(config.model_type))
    if type(model) is not classes[1]:
        raise UserError(
            f"expected a {classes[1].__name__}, got {type(model).__name__}: load it with AutoModelForCausalLM"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"this {config.model_type} model caps its attention scores at {config.attn_logit_softcapping}, which a "
            "summary of a block cannot: load it with attn_logit_softcapping=None and convert the model without the cap"
        )
    if not attention_modules(model):
        raise UserError(
            f"this {config.model_type} model has no full attention layer: there is nothing to convert; a model whose "
            "layers are all sliding windows can be loaded with sliding_window=None"
        )


def _check_sinks(model: PreTrainedModel, mixer: str) -> None:
    if not MIXERS[mixer].knows_sinks and any(getattr(x, "sinks", None) is not None for x in model.modules()):
        raise UserError(
            f"{model.config.model_type} models have attention sinks, which the mixer {mixer} has not: use a BSBRConfig"
        )
