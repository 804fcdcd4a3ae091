"""Model classes `bsbr-<family>`: the stock ones with a mixer's parameters, so that save and load round-trip."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from bsbr.errors import UserError
from bsbr.hf import attention as _registers_the_function  # noqa: F401
from bsbr.hf.cache import CACHE_ARGUMENT, BSBRCache, keeps_summaries
from bsbr.hf.families import NAME, PREFIX, bypass_message, dispatches, stock_classes
from bsbr.hf.mixers import is_converted, read_settings, write_settings
from bsbr.hf.parameters import MixerParameters, keep_hidden
from bsbr.hf.positions import guard_positions
from bsbr.hf.remote import name_classes, write_module
from bsbr.hf.saving import save_whole
from bsbr.hf.sharing import remove_hook
from bsbr.manifest import check_manifest

FAMILIES = (
    "gpt2", "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gpt_neox", "opt", "phi", "phi3", "gemma",
    "gemma2", "gemma3_text", "gpt_bigcode", "olmo2", "stablelm", "smollm3", "gpt_oss",
)  # fmt: skip
"""Tested families: their classes are registered on import. Others that dispatch are, once `convert` meets them."""


class BSBRModelMixin:
    """What a converted model has besides its family's class."""

    config: PreTrainedConfig
    modules: Any
    stock_classes: tuple[type[PreTrainedConfig], type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        _, settings = read_settings(getattr(config, NAME, None))
        config.bsbr = write_settings(settings)
        if config._attn_implementation is None:
            config._attn_implementation = NAME
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach(self)  # type: ignore[arg-type]

    @property
    def name_or_path(self) -> str:
        """The folder or name that the model, or its original, was loaded by: where its tokenizer is."""
        return self.config._name_or_path

    @name_or_path.setter
    def name_or_path(self, name: str) -> None:
        vars(self)["name_or_path"] = name  # peft writes this entry into adapters, as the base to load: see `convert`

    def initialize_weights(self) -> None:
        """Give our parameters their first values where no file had them, then the family's theirs."""
        for module in self.modules():
            if isinstance(module, MixerParameters):
                values = module.initial_values()
                for name, parameter in module.named_parameters(recurse=False):
                    init.copy_(parameter, values[name])
        super().initialize_weights()  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as transformers does, and refuse a folder in which weights are missing or damaged.

        Raises:
            UserError: weights of the family are missing, or part of the mixer's; or a folder differs from its manifest.
        """
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_manifest(folder)
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        ours = {name for name, _ in model.named_parameters() if f".{NAME}." in name}
        missing = set(info["missing_keys"])
        check_missing(source, missing if missing & ours != ours else missing - ours)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but all or nothing, with a manifest, and with a module that leads
        `trust_remote_code=True` to bsbr."""
        name = type(self).__name__
        name_classes(self.config, name)

        def write(folder: Path) -> None:
            super(BSBRModelMixin, self).save_pretrained(folder, is_main_process, *args, **kwargs)  # type: ignore[misc]
            if is_main_process and (folder / "config.json").is_file():
                write_module(folder, self.config, name)

        # pushing and distributed checkpoints need the very folder
        if any(args[1:2]) or any(kwargs.get(key) for key in ("push_to_hub", "distributed_checkpoint")):
            write(Path(save_directory))
        else:
            save_whole(save_directory, write)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` a BSBRCache where it would make a DynamicCache and the mixer has what that needs."""
        if (
            model_kwargs.get(CACHE_ARGUMENT) is None
            and generation_config.use_cache is not False
            and generation_config.cache_implementation in (None, "dynamic")
            and self.config._attn_implementation == NAME
            and keeps_summaries(self.config)
        ):
            cache = model_kwargs[CACHE_ARGUMENT] = BSBRCache(self.config)
            if generation_config.is_assistant and hasattr(cache, "activate_past_recording"):
                cache.activate_past_recording()  # a refused draft brings back what has left a sliding window
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: continuous batching would run dense attention without a word.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("continuous batching does not run bsbr attention: use generate")

    init_continuous_batching = continuous_batching_context_manager = generate_batch


def check_missing(source: Any, missing: set[str]) -> None:
    """Refuse a model of which weights were not found.

    Args:
        source: where it was loaded from.
        missing: names of the weights.
    Raises:
        UserError: there are any.
    """
    if missing:
        raise UserError(
            f'model "{source}": {len(missing)} weights are missing, first {min(missing)}. Copy the folder again'
        )


@cache
def derive(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Make and register the converted classes of a family.

    Args:
        family: transformers' model type, as "gpt2".
    Returns:
        The config class, of model type "bsbr-<family>", and the causal language model class.
    Raises:
        UserError: the family does not dispatch through transformers' attention interface.

    Example:
        >>> derive("gpt2")[1].__name__
        'BSBRGPT2LMHeadModel'
    """
    classes = stock_classes(family)
    if classes is None or not dispatches(family):
        raise UserError(bypass_message(family))
    stock_config, stock_model = classes
    # register_for_auto_class would make transformers copy library files into a checkpoint
    common = {"__module__": __name__, "register_for_auto_class": classmethod(lambda cls, *args, **kwargs: None)}
    config_class: Any = type(
        f"BSBR{stock_config.__name__}", (stock_config,), {**common, "model_type": f"{PREFIX}{family}"}
    )
    strict = set(getattr(stock_model, "_keep_in_fp32_modules_strict", None) or ())
    model_class: Any = type(
        f"BSBR{stock_model.__name__}",
        (BSBRModelMixin, stock_model, GenerationMixin),  # named again, as transformers wants it of every model class
        {
            **common,
            "config_class": config_class,
            "stock_classes": (stock_config, stock_model),
            "_keep_in_fp32_modules_strict": strict | {"calibration"},
            # the choice of blocks and the cache's bookkeeping break the graph: `generate` must not ask for one graph
            "_can_compile_fullgraph": False,
        },
    )
    globals().update({config_class.__name__: config_class, model_class.__name__: model_class})  # for pickle
    # transformers looks weight conversions up by class name and model type: without these, renamed weights of
    # some families would load as random numbers
    for old, new in ((family, config_class.model_type), (stock_model.__name__, model_class.__name__)):
        conversions = get_checkpoint_conversion_mapping(old)
        if conversions is not None:
            register_checkpoint_conversion_mapping(new, conversions)
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a causal language model that a mixer replaces, in order of layers.

    Args:
        model: stock or converted.
    Returns:
        The causal self-attention modules whose layer is not a sliding window; of a converted model those that
        `convert` was told to take.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
        and layer_type(config, module.layer_idx) == "full_attention"  # type: ignore[arg-type]
        and is_converted(model.config, module.layer_idx)  # type: ignore[arg-type]
    ]


def layer_type(config: PreTrainedConfig, layer: int) -> str:
    """Return the kind of attention of a layer, "full_attention" or another name.

    Args:
        config: of the text model.
        layer: index of the layer.
    Returns:
        The name transformers has for it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer]
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return "full_attention" if window is None else "sliding_attention"


def attach(model: PreTrainedModel) -> None:
    """Give every attention module of a model what its mixer learns; the settings are in the model's config.

    Args:
        model: of a converted class, without parameters of a mixer yet.
    """
    mixer, settings = read_settings(model.config.bsbr)
    for module in attention_modules(model):
        parameters = mixer.parameters(settings, module)
        if parameters is None:
            continue
        place = next(module.parameters())
        if place.device != torch.device("meta"):
            parameters = parameters.to(place.device, model.dtype)
        module.bsbr = parameters.train(module.training)
        if getattr(parameters, "wants_hidden", False):
            module.register_forward_pre_hook(keep_hidden, with_kwargs=True)
    guard_positions(model)
    remove_hook(model, refuse_attention_weights)
    model.register_forward_pre_hook(refuse_attention_weights, with_kwargs=True)


def refuse_attention_weights(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted model: transformers would return none of the weights, without a word.

    Raises:
        NotImplementedError: attention weights are asked for.
    """
    if kwargs.get("output_attentions") and model.config._attn_implementation == NAME:
        raise NotImplementedError("bsbr attention computes no attention weights: leave output_attentions off")


def detach(model: PreTrainedModel) -> None:
    """Take away what `attach` gave.

    Args:
        model: a model that `attach` was called on, or a copy of one.
    """
    for module in model.modules():
        if isinstance(getattr(module, NAME, None), nn.Module):
            del module.bsbr
        remove_hook(module, keep_hidden)
    guard_positions(model, on=False)
    remove_hook(model, refuse_attention_weights)


for _family in FAMILIES:
    derive(_family)
