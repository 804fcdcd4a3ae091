"""Models and tokenizers from a folder or the hub; whatever is wrong with them is said in one line."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bsbr.data.tokenizer import remember_no_words
from bsbr.errors import UserError
from bsbr.hf.families import NAME, PREFIX, stock_classes
from bsbr.hf.model_files import check_sizes, check_weights, in_one_line, read_config
from bsbr.hf.modeling import check_missing, derive
from bsbr.manifest import check_manifest
from bsbr.memory import is_out_of_memory, require_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What is fetched from the hub: never pickles, never code."""

_UNUSABLE = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    ImportError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What families raise where a config makes no sense or contradicts the weights, each in its own way."""

_INSTEAD = "give a folder with a model in it, or try the one that comes along: bsbr evaluate embedded"


def load_model(name_or_path: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> PreTrainedModel:
    """Load a causal language model, stock or converted, for evaluation.

    Weights must be safetensors; pickled weights and remote code, which could run anything, are refused.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, or a name on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16".
        device: where to put it.
    Returns:
        The model in evaluation mode.
    Raises:
        UserError: the model is missing, damaged, not supported or cannot be fetched; or no such dtype or device.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    folder = _folder(name_or_path)
    config = read_config(folder)
    family = config["model_type"]
    weights = check_weights(folder)
    check_sizes(folder, config, weights)
    require_memory(
        weights.elements * _DTYPES[dtype].itemsize, f'model "{name_or_path}"', "Use --dtype bfloat16 or a smaller model"
    )
    if family.startswith(PREFIX):
        derive(family.removeprefix(PREFIX))
    if family not in CONFIG_MAPPING:
        raise UserError(f'model "{name_or_path}": type {family} is not known to transformers. Try a newer transformers')
    if stock_classes(family) is None:
        raise UserError(f'model "{name_or_path}": type {family} is not a causal language model')
    if not family.startswith(PREFIX):  # those check their folder themselves, however they are loaded
        check_manifest(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[dtype], local_files_only=True, use_safetensors=True, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    except UserError:
        raise
    except _UNUSABLE as error:
        if is_out_of_memory(error):
            raise
        _refuse(name_or_path, f"cannot be loaded ({in_one_line(error)}). Copy the folder again", error)
    model, info = loaded
    check_missing(name_or_path, {name for name in info["missing_keys"] if f".{NAME}." not in name})
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"device {device} cannot be used ({in_one_line(error)}). Try cpu") from error


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        name_or_path: a folder, or a name on the Hugging Face hub.
    Returns:
        The tokenizer.
    Raises:
        UserError: there is none, or it is damaged or needs remote code.
    """
    folder = _folder(name_or_path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise UserError(f'tokenizer "{name_or_path}": tokenizer.json missing. Save the tokenizer beside the model')
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        _refuse(name_or_path, f"has a tokenizer that cannot be read ({in_one_line(error)}). Copy it again", error)
    return remember_no_words(tokenizer)


def _folder(name_or_path: str | Path) -> Path:
    """The folder of a model, fetched from the hub if it is not one already."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise UserError(f'model "{name}" is a file: give the folder it is in')
    if isinstance(name_or_path, Path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f'model "{name}": no such folder. Check the path')
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        _refuse(name, f"is neither a folder nor a name on the hub: {_INSTEAD}", error)
    except GatedRepoError as error:
        _refuse(name, "is gated on the hub: accept its licence there and log in with hf auth login", error)
    except RepositoryNotFoundError as error:
        _refuse(name, f"is neither a folder here nor on the hub: {_INSTEAD}", error)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        _refuse(name, f"is no folder, was not fetched before, and the hub cannot be reached: {_INSTEAD}", error)


def _refuse(name: str | Path, reason: str, error: BaseException) -> NoReturn:
    raise UserError(f'model "{name}" {reason}') from error
