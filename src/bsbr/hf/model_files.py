"""What is checked of a model's folder before anything is built from it: names, sizes, damage, what could run code."""

import json
import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bsbr.errors import UserError
from bsbr.hf.families import PREFIX

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_LARGEST_JSON = 10_000_000
_LARGEST = 1 << 40
"""Integers above it are no size of anything."""

_LAYERS = re.compile(r"(num_(hidden_)?|n_|encoder_|decoder_)layers?")
_SIZES = re.compile(
    r"vocab_size|hidden_size|intermediate_size|word_embed_proj_dim|ffn_dim|n_embd|n_inner|n_head|head_dim|"
    r"num_(attention|key_value)_heads|(max_position_embeddings|n_positions)"
)


class Weights(NamedTuple):
    """What the weights' files say they hold."""

    tensors: int
    """How many."""
    elements: int
    """Numbers in all of them."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json and refuse a model that would have to run code of its own.

    Args:
        folder: the model's.
    Returns:
        The config's content; its "model_type" is a string.
    Raises:
        UserError: it is missing, unreadable, or of a model that needs code of its own.
    """
    config = read_json(folder, "config.json", "it is not a model that save_pretrained wrote")
    family = config.get("model_type")
    if "auto_map" in config and family not in CONFIG_MAPPING and not str(family).startswith(PREFIX):
        raise UserError(f'model "{folder}" needs code of its own ({family}), which is refused: use a stock model')
    if not isinstance(family, str):
        raise UserError(f'model "{folder}": config.json names no model_type. Copy the folder again')
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f'model "{folder}" holds an adapter (adapter_config.json), which names a model of its own. '
            "Merge it into its model first (merge_and_unload in peft)"
        )
    return config


def check_weights(folder: Path) -> Weights:
    """Refuse weights that are absent, pickled, elsewhere or damaged.

    Args:
        folder: the model's.
    Returns:
        What the files say they hold.
    Raises:
        UserError: any of that, and of which file.
    """
    shards = _shards(folder)
    if not (folder / shards[0]).is_file() if shards else True:
        if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
            raise UserError(
                f'model "{folder}" has pickled weights, which can run code and are refused: save it as safetensors'
            )
        raise UserError(f'model "{folder}": {shards[0] if shards else _WEIGHTS} missing. Copy the folder again')
    tensors = elements = 0
    for shard in shards:
        try:
            with safe_open(folder / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    tensors, elements = tensors + 1, elements + prod(file.get_slice(name).get_shape())
        except FileNotFoundError as error:
            raise UserError(f'model "{folder}": {shard} missing. Copy the folder again') from error
        except (SafetensorError, OSError) as error:
            raise UserError(
                f'model "{folder}": {shard} is damaged ({in_one_line(error)}). Copy the folder again'
            ) from error
    return Weights(tensors, elements)


def check_sizes(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    """Refuse sizes that the weights cannot have, before a model of such sizes is built.

    Args:
        folder: the model's.
        config: from `read_config`.
        weights: from `check_weights`.
    Raises:
        UserError: a size is out of the question, and which.
    """
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if abs(value) > _LARGEST:
            _refuse(folder, key, value, f"at most {_LARGEST}")
        if _LAYERS.fullmatch(name) and not 1 <= value <= weights.tensors:
            _refuse(folder, key, value, f"from 1 to {weights.tensors}, the number of weights in its files")
        if name.endswith(("_eps", "_epsilon")) and not 0 <= value <= 1:
            _refuse(folder, key, value, "from 0 to 1")
        if match := _SIZES.fullmatch(name):
            most = _LARGEST if match[2] else weights.elements  # positions may be computed and cost nothing
            if not 1 <= value <= most:
                _refuse(folder, key, value, f"from 1 to {most}")


def read_json(folder: Path, name: str, otherwise: str) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Args:
        folder: the model's.
        name: of the file.
        otherwise: what it means if the file is missing.
    Returns:
        The object.
    Raises:
        UserError: it is missing, too large, or no JSON object; NaN and infinities, which JSON does not have, included.
    """
    path = folder / name
    try:
        if path.stat().st_size > _LARGEST_JSON and name == "config.json":
            raise ValueError(f"larger than {_LARGEST_JSON} bytes")
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(f'model "{folder}": {name} missing, {otherwise}. Check the path') from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'model "{folder}": {name} cannot be read ({in_one_line(error)}). Copy it again') from error
    if not isinstance(content, dict):
        raise UserError(f'model "{folder}": {name} must hold a JSON object. Copy the folder again')
    return content


def in_one_line(error: BaseException) -> str:
    """Say an error in at most 200 characters.

    Args:
        error: any.
    Returns:
        Its message, or the name of its class.
    """
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shards(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    parts = read_json(folder, _INDEX, "").get("weight_map")
    names = list(parts.values()) if isinstance(parts, dict) else []
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors") or re.search(r"[/\\:\0]", name):
            raise UserError(
                f'model "{folder}": {_INDEX} names the file {name!r:.80}: expected a safetensors file of the folder'
            )
    return sorted(set(names))


def _numbers(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _refuse(folder: Path, key: str, value: object, wanted: str) -> None:
    raise UserError(f'model "{folder}": config.json has {key} = {value}, expected {wanted}. Copy the folder again')


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which JSON does not have")
