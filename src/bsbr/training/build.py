"""The model that `bsbr pretrain` trains: any causal architecture of transformers, with any attention of ours."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bsbr.errors import UserError
from bsbr.hf.families import bypass_message, dispatches, stock_classes
from bsbr.hf.mixers import MIXERS, MixerConfig, write_settings
from bsbr.hf.positions import max_positions
from bsbr.hf.scratch import build_model as build_peer
from bsbr.hf.scratch import count_parameters, match_parameters
from bsbr.peers import FullConfig, make
from bsbr.training.recipe import PretrainConfig

_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout",
             "activation_dropout", "layerdrop", "resid_dropout", "embedding_dropout")  # fmt: skip

_LEAST_VOCAB = 257
"""The bytes and `<|endoftext|>`."""


def parse_attention(text: str, seed: int = 0) -> dict[str, Any] | None:
    """Read `NAME` or `NAME:key=value,...`, as `bsbr:block_size=64,top_k=8`.

    Args:
        text: what the user wrote; the name is a row of `bsbr.peers.PEERS`.
        seed: of what the attention draws at random, unless the settings name one.
    Returns:
        The settings, as a model's config keeps them, or None for `full`.
    Raises:
        UserError: no such attention, or a setting it does not take.

    Example:
        >>> parse_attention("bsbr:block_size=64,top_k=8")["top_k"]
        8
    """
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"attention {text!r}: {part!r} is no key=value. Write as bsbr:block_size=64,top_k=8")
        values[key.strip().replace("-", "_")] = _value(value.strip())
    settings = make(name, values, seed=seed)
    return None if isinstance(settings, FullConfig) else write_settings(settings)


def build_model(config: PretrainConfig, vocab: int) -> PreTrainedModel:
    """Make a model with random weights, from the recipe's seed alone, without touching the global random state.

    1. The architecture's own configuration: by name, with the recipe's sizes, tied embeddings, no dropout and
       rotary or learned positions as the family has them; or from a JSON file, as it is but for `vocab_size`.
    2. Weights as transformers initialises them, in float32.
    3. The recipe's attention in every layer, and with `match_parameters` MLPs that are narrower by what it has more.
       Full attention is the family's own class, with PyTorch's attention: as fast as it is anywhere.

    Args:
        config: the recipe.
        vocab: tokens of the vocabulary.
    Returns:
        The model in training mode, on the CPU.
    Raises:
        UserError: the architecture is unknown, does not call transformers' attention interface, or has fewer
            positions or tokens than the recipe needs.
    """
    family, attention = _family_and_attention(config, vocab)
    if isinstance(attention, FullConfig):
        family._attn_implementation = "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = AutoModelForCausalLM.from_config(family, dtype=torch.float32).train()
    else:
        model = build_peer(family, attention, seed=config.seed)
    available = max_positions(model)
    if available is not None and available < config.context:
        raise UserError(f"context = {config.context}: the architecture has {available} learned positions. Take fewer")
    return model


def least_bytes(config: PretrainConfig) -> int:
    """Memory that training takes at the least, in float32.

    1. Weights, gradients and the optimizer's moments: one of each with Muon, two with AdamW.
    2. What a pass keeps for its gradients: about 20 numbers a token, layer and channel.

    The seconds in which a checkpoint is written are left out. benchmarks/results/reliability/memory.json holds the
    estimate beside measured peaks.

    Args:
        config: the recipe; a text's vocabulary counts as the smallest there is, since a small text yields a smaller one
            than asked for.
    Returns:
        Bytes.
    Raises:
        UserError: no such architecture.

    Example:
        >>> least_bytes(PretrainConfig(layers=1, heads=1, hidden=1, context=1, batch_tokens=1, tokens=1))
        3500
    """
    vocab = _LEAST_VOCAB if config.task is None else int(config.task["vocab"])
    family, attention = _family_and_attention(config, vocab)
    weights = count_parameters(family, None if isinstance(attention, FullConfig) else attention)
    kept = 20 * (config.batch_tokens // config.accumulation) * family.num_hidden_layers * family.hidden_size
    return 4 * ((3 if config.optimizer == "muon" else 4) * weights + kept)


def _family_and_attention(config: PretrainConfig, vocab: int) -> tuple[PreTrainedConfig, MixerConfig]:
    family, attention = _family_config(config, vocab), attention_of(config)
    return (match_parameters(family, attention) if config.match_parameters else family), attention


def attention_of(config: PretrainConfig) -> MixerConfig:
    """Return the settings of the recipe's attention.

    Args:
        config: the recipe.
    Returns:
        The settings.
    """
    if config.attention is None:
        return FullConfig()
    values = dict(config.attention)
    name = values.pop("mixer")
    return MIXERS[name].config.from_dict(values)


def _family_config(config: PretrainConfig, vocab: int) -> PreTrainedConfig:
    path = Path(config.architecture)
    if path.suffix == ".json" or path.is_dir():
        return _read_config(path / "config.json" if path.is_dir() else path, vocab)
    name = config.architecture
    if name not in CONFIG_MAPPING or stock_classes(name) is None:
        raise UserError(
            f"architecture {name!r}: no causal language model of transformers, and no JSON file. Try gpt2, llama, qwen3"
        )
    if not dispatches(name):
        raise UserError(bypass_message(name))
    family = CONFIG_MAPPING[name]()
    _set(family, "num_hidden_layers", config.layers)
    _set(family, "num_attention_heads", config.heads)
    _set(family, "hidden_size", config.hidden)
    _set(family, "max_position_embeddings", config.context)
    _set(family, "vocab_size", vocab)
    values: dict[str, Any] = {
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.hidden // config.heads,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * config.layers,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        **dict.fromkeys(_DROPOUTS, 0.0),
    }
    if isinstance(getattr(family, "intermediate_size", None), int):
        gated = hasattr(family, "hidden_act") and name != "gpt_neox"
        values["intermediate_size"] = _gated_width(config.hidden) if gated else 4 * config.hidden
    if isinstance(getattr(family, "ffn_dim", None), int):
        values["ffn_dim"] = 4 * config.hidden
    if isinstance(getattr(family, "word_embed_proj_dim", None), int):
        values["word_embed_proj_dim"] = config.hidden
    if config.kv_heads is not None and not hasattr(family, "num_key_value_heads"):
        raise UserError(f"kv_heads = {config.kv_heads}: {name} has no key heads apart. Leave it out")
    for key, value in values.items():
        if hasattr(family, key):
            setattr(family, key, value)
    return type(family).from_dict(family.to_dict())  # checks what was set, and derives what follows from it


def _set(family: PreTrainedConfig, name: str, value: int) -> None:
    setattr(family, family.attribute_map.get(name, name), value)


def _gated_width(hidden: int) -> int:
    """Width of a gated feed-forward layer with the parameters of one of 4 x hidden, a multiple of 64 (of 8 below)."""
    step = 64 if hidden >= 256 else 8
    return -(-8 * hidden // 3 // step) * step


def _read_config(path: Path, vocab: int) -> PreTrainedConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        family = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except FileNotFoundError:
        raise UserError(f'architecture "{path}": no such file. Give a model type or the config.json of one') from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'architecture "{path}": no configuration of transformers ({error}). Check the file') from error
    if stock_classes(family.model_type) is None or not dispatches(family.model_type):
        raise UserError(bypass_message(family.model_type))
    family.vocab_size = vocab
    return family


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text
