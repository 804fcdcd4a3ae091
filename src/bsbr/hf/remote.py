"""What lets a saved folder load with `trust_remote_code=True` where bsbr is installed but nobody imported it."""

from pathlib import Path

from transformers import PreTrainedConfig

from bsbr.files import write_atomic
from bsbr.hf.families import PREFIX

_MODULE = "bsbr_hub"

_TEXT = '''"""Finds the model of this folder in the package bsbr."""

from bsbr.hf import derive

{config}, {model} = derive("{family}")
'''


def name_classes(config: PreTrainedConfig, model: str) -> None:
    """Name in a config the classes that `write_module` leads to.

    Args:
        config: of a converted model.
        model: name of the model's class.

    Example:
        >>> from bsbr.hf import derive
        >>> config = derive("gpt2")[0]()
        >>> name_classes(config, "BSBRGPT2LMHeadModel")
        >>> config.auto_map["AutoConfig"]
        'bsbr_hub.BSBRGPT2Config'
    """
    names = {"AutoConfig": type(config).__name__, "AutoModelForCausalLM": model}
    config.auto_map = {auto: f"{_MODULE}.{name}" for auto, name in names.items()}


def forget_classes(config: PreTrainedConfig) -> None:
    """Take away what `name_classes` wrote."""
    vars(config).pop("auto_map", None)


def write_module(folder: Path, config: PreTrainedConfig, model: str) -> None:
    """Write the few lines of Python that transformers runs when it is trusted to; they only import bsbr.

    Args:
        folder: where the model is saved.
        config: of the model.
        model: name of its class.
    """
    family = config.model_type.removeprefix(PREFIX)
    write_atomic(folder / f"{_MODULE}.py", _TEXT.format(config=type(config).__name__, model=model, family=family))
