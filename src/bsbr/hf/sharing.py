"""A second model on the same weights."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def share(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model without copying its weights.

    Modules, config and hooks are copied; parameters and buffers are new objects on the same memory. So changing a
    weight in place changes both models, but moving, casting or freezing one leaves the other alone. Parameters of a
    mixer (`bsbr`) are really copied: two conversions of a model can be calibrated apart.

    Args:
        model: any transformers model.
    Returns:
        The copy; parameters tied to each other stay tied.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".bsbr." in name or id(parameter) in memo:
            continue
        # quantised parameters carry more than their data: they stay the same object
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def remove_hook(module: nn.Module, hook: Any) -> None:
    """Take a forward pre-hook off a module, without the handle, which a copied module does not have.

    Args:
        module: any module.
        hook: the function that was registered.
    """
    for key in [key for key, value in module._forward_pre_hooks.items() if value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
