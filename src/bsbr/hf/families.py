"""Which of transformers' families our attention can stand in, and what their classes are."""

from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

NAME = "bsbr"
"""Name of the attention implementation, and of the attribute of configs and modules that holds our part."""

LAYERS = f"{NAME}_layers"
"""Attribute of a converted model's config: the layers that are converted; absent where all can be."""

PREFIX = f"{NAME}-"
"""What a converted model's type has before its family's."""


def stock_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
    """Return the config and causal language model class of a model type.

    Args:
        model_type: of a stock or converted family.
    Returns:
        The two classes, or None where transformers has no such causal language model.

    Example:
        >>> [kind.__name__ for kind in stock_classes("bsbr-opt")]
        ['OPTConfig', 'OPTForCausalLM']
    """
    model_type = model_type.removeprefix(PREFIX)
    if model_type not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[model_type]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
    return None if model is None else (config, model)


@lru_cache
def dispatches(model_type: str) -> bool:
    """Say whether a family's attention goes through transformers' attention interface.

    Families that ask for a mask but compute attention themselves would lose causality, not only ignore us.

    Args:
        model_type: of a stock or converted family.
    Returns:
        True where the stock causal language model calls the attention function.

    Example:
        >>> dispatches("gpt2"), dispatches("bloom")
        (True, False)
    """
    classes = stock_classes(model_type)  # a derived class would always answer yes
    return classes is not None and classes[1]._can_set_attn_implementation()


def is_encoder(config: PreTrainedConfig) -> bool:
    """Say whether a model's attention looks both ways, so that ours, which is causal, cannot stand in.

    Args:
        config: the model's.
    Returns:
        True for encoders such as BERT, unless they are set up as decoders.

    Example:
        >>> from transformers import BertConfig, GPT2Config
        >>> is_encoder(BertConfig()), is_encoder(BertConfig(is_decoder=True)), is_encoder(GPT2Config())
        (True, False, False)
    """
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def bypass_message(model_type: str) -> str:
    """Return the sentence that refuses a family which `dispatches` does not accept."""
    return (
        f"models of type {model_type} cannot be converted: they compute attention themselves or are not causal "
        "language models; GPT-2, Llama, Qwen, Mistral, GPT-NeoX, OPT, Phi, Gemma and OLMo models can"
    )
