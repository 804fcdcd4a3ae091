"""Conversion: a pretrained model with its attention replaced, on the same weights; and back."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.hf.families import NAME, bypass_message, dispatches, stock_classes
from bsbr.hf.loading import load_model
from bsbr.hf.mixers import MixerConfig, read_settings, write_settings
from bsbr.hf.modeling import BSBRModelMixin, attach, attention_modules, derive, detach
from bsbr.hf.positions import extend_positions
from bsbr.hf.sharing import share

_KEPT = "_bsbr_dense_attention"
"""Attribute of a converted model: the attention implementation it had."""


def convert(
    model_or_name: PreTrainedModel | str, config: MixerConfig, *, max_length: int | None = None
) -> PreTrainedModel:
    """Replace the attention of a causal language model; the model given stays as it is.

    Source: docs/method.md. A pretrained model's own queries, keys and values already are what block retrieval
    needs, so nothing is trained; `bsbr.calibrate` fits five scalars per head afterwards.

    1. Copy the model's modules around the same weights (`bsbr.hf.sharing.share`), so that no memory is spent.
    2. Make it a model of type "bsbr-<family>" that saves and loads with its settings.
    3. Give each attention module what its mixer learns. Sliding-window layers of a hybrid stay as they are.

    Positions, biases, tied embeddings, dropout, training mode and gradient checkpointing are kept. A converted model
    can be converted again: its calibration is kept, `top_k_per_head` with it, if both configs are a BSBRConfig that
    differ in `dense_below` at most, and starts uncalibrated otherwise, since it fits the block size and `top_k` that it
    was made for.

    Args:
        model_or_name: a causal language model, or the folder or hub name of one.
        config: a BSBRConfig, or the config of a peer (AdditiveConfig, ValueOnlyConfig).
        max_length: tokens the result must take; learned positions are interpolated (see `extend_positions`).
    Returns:
        The converted model.
    Raises:
        UserError: the model's family computes attention itself, is an encoder-decoder, has only sliding windows, or
            is not a plain causal language model; or the name cannot be loaded.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from bsbr import BSBRConfig
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=64))
        >>> convert(model, BSBRConfig(block_size=16, top_k=1)).config.model_type
        'bsbr-gpt2'
    """
    settings = write_settings(config)
    source = load_model(model_or_name) if isinstance(model_or_name, str) else model_or_name
    _check(source)
    model = share(source) if max_length is None else extend_positions(source, max_length)
    if isinstance(source, BSBRModelMixin):
        calibrated = _with_calibration(source.config.bsbr, settings)
        if calibrated is not None:
            model.config.bsbr = calibrated
            return model
        detach(model)
        model.config.bsbr = settings
        attach(model)
        return model
    config_class, model_class = derive(source.config.model_type)
    setattr(model, _KEPT, source.config._attn_implementation)
    model.__class__, model.config.__class__ = model_class, config_class
    vars(model.config).pop("model_type", None)  # a config that was read from a file has the old one beside its class's
    model.config.bsbr = settings
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
    default = "sdpa" if stock_model._supports_sdpa else "eager"
    dense.set_attn_implementation(dense.__dict__.pop(_KEPT, default))
    return dense


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
    classes = stock_classes(config.model_type)
    if classes is None or not dispatches(config.model_type):
        raise UserError(bypass_message(config.model_type))
    if type(model) is not classes[1]:
        raise UserError(
            f"expected a {classes[1].__name__}, got {type(model).__name__}: load it with AutoModelForCausalLM"
        )
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(x, "sinks") for x in model.modules()):
        raise UserError(f"{config.model_type} changes attention scores (soft cap or sinks), which bsbr does not do yet")
    if not attention_modules(model):
        raise UserError(
            f"this {config.model_type} model has no full attention layer: there is nothing to convert; a model whose "
            "layers are all sliding windows can be loaded with sliding_window=None"
        )
