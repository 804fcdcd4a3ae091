"""Models with random weights: any family with any attention, as many parameters as with its own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bsbr.errors import UserError
from bsbr.hf.families import NAME, bypass_message, dispatches, stock_classes
from bsbr.hf.mixers import MixerConfig, write_settings
from bsbr.hf.modeling import derive

_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
"""What families call the inner width of their MLP."""


def build_model(config: PreTrainedConfig, attention: MixerConfig, *, seed: int = 0) -> PreTrainedModel:
    """Make a model with random weights whose attention is BSBR or a peer.

    Weights are drawn as transformers draws them, from the seed alone; those that two attentions have in common, in the
    same sizes, are the same numbers. The global random state is left alone.

    Args:
        config: of a stock family, as `LlamaConfig(...)`; it stays as it is.
        attention: a BSBRConfig or the config of a peer, as `bsbr.peers.make` gives them by name.
        seed: chooses the weights; those of the attention's own projections come from its own seed.
    Returns:
        The model, float32, on the CPU, in training mode, of a class that saves and loads with its attention.
    Raises:
        UserError: the family computes attention itself, or no such attention.

    Example:
        >>> from bsbr.peers import make
        >>> from transformers import GPT2Config
        >>> model = build_model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16), make("gated_delta"))
        >>> type(model).__name__
        'BSBRGPT2LMHeadModel'
    """
    with _random_state(seed):
        return _build(config, attention).train()


def match_parameters(config: PreTrainedConfig, attention: MixerConfig) -> PreTrainedConfig:
    """Narrow the MLPs of a model so that, with this attention, it has as many parameters as with its own.

    Args:
        config: of a stock family; it stays as it is.
        attention: a BSBRConfig or the config of a peer.
    Returns:
        A copy of the config with another MLP width, a multiple of 8 where it was one; the number of parameters is as
        near as such a width can bring it.
    Raises:
        UserError: the family's MLP has no width that is known here, or the attention has more parameters than the MLPs.

    Example:
        >>> from bsbr.peers import make
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
        ... )
        >>> match_parameters(config, make("gated_delta")).intermediate_size  # it has an output gate of 64 x 64
        128
    """
    name = next((x for x in _MLP_WIDTHS if hasattr(config, x)), None)
    if name is None:
        raise UserError(f"models of type {config.model_type} have no MLP width that is known here: match them by hand")
    matched = copy.deepcopy(config)
    width = getattr(config, name) or 4 * config.hidden_size  # GPT-2's None
    wanted, found = count_parameters(config), count_parameters(config, attention)
    setattr(matched, name, width + 1)
    of_one = count_parameters(matched, attention) - found
    unit = 8 if width % 8 == 0 else 1  # what matrix units like
    width += round((wanted - found) / of_one / unit) * unit
    if width < 1:
        raise UserError(
            f"attention {attention.mixer} has more parameters than this model's MLPs: give the model a wider MLP"
        )
    setattr(matched, name, width)
    return matched


def count_parameters(config: PreTrainedConfig, attention: MixerConfig | None = None) -> int:
    """Count the parameters of a model without making it.

    Args:
        config: of a stock family.
        attention: a BSBRConfig or the config of a peer; None means the family's own.
    Returns:
        The number, tied weights once.

    Example:
        >>> from transformers import GPT2Config
        >>> count_parameters(GPT2Config())
        124439808
    """
    with torch.device("meta"):
        if attention is not None:
            model: Any = _build(config, attention)
        else:
            model = _classes(config)[1](copy.deepcopy(config))
    return sum(x.numel() for x in model.parameters())


def _build(config: PreTrainedConfig, attention: MixerConfig) -> PreTrainedModel:
    settings = write_settings(attention)
    _classes(config)
    config_class, model_class = derive(config.model_type)
    values = copy.deepcopy(config).to_dict() | {NAME: settings}
    values.pop("model_type", None)
    return model_class(config_class.from_dict(values))


def _classes(config: PreTrainedConfig) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    classes = stock_classes(config.model_type)
    if classes is None or not dispatches(config.model_type):
        raise UserError(bypass_message(config.model_type))
    return classes


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
