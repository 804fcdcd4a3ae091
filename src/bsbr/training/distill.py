"""What a converted model is taught by its original: attention outputs layer by layer, and next-token distributions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bsbr.hf.modeling import attention_modules

_ROWS = 1024
"""Positions whose distributions are held at once."""


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over positions of KL(teacher || student), in nats; a part of the positions at a time.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at temperature 1.

    Args:
        logits: of the student, [B, T, V].
        teacher_logits: of the original, [B, T, V], without gradient.
    Returns:
        The loss, a float32 scalar.

    Example:
        >>> x = torch.randn(1, 4, 10)
        >>> distillation_loss(x, x).abs().item() < 1e-6
        True
    """
    total = logits.new_zeros((), dtype=torch.float32)
    parts = zip(logits.flatten(0, 1).split(_ROWS), teacher_logits.flatten(0, 1).split(_ROWS), strict=True)
    for own, taught in parts:
        total = total + checkpoint(_kl_sum, own, taught, use_reentrant=False)
    return total / logits[..., 0].numel()


def _kl_sum(own: Tensor, taught: Tensor) -> Tensor:
    own, taught = (x.float().log_softmax(-1) for x in (own, taught))
    return F.kl_div(own, taught, reduction="sum", log_target=True)


def transfer_loss(student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Mean over attention layers of the squared error of their output, over the squared norm of the original's.

    Source: attention transfer of LoLCATs (arXiv 2410.10254). Each layer is given what the original's layer is given,
    so that layers learn apart from each other and no error of an earlier one is passed on.

    1. The original runs once; the input and the output of every attention module are kept.
    2. The student runs with these inputs; its outputs are compared and replaced by the original's.

    Args:
        student: a converted model, possibly wrapped for training.
        teacher: the dense model it was made of.
        inputs: what both are called with.
    Returns:
        The loss, a float32 scalar; its gradient reaches the attention modules alone.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    errors: list[Tensor] = []
    names = [name for name, module in _by_name(student)]
    with torch.no_grad(), _hooked([teacher.get_submodule(name) for name in names], _recorder(kept)):
        teacher.base_model(**inputs, use_cache=False)
    with _hooked([module for _, module in _by_name(student)], _comparer(kept, errors)):
        student(**inputs, use_cache=False, logits_to_keep=1)
    return torch.stack(errors).mean()


def _by_name(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Converted attention modules under their names in the plain model, whatever wraps it."""
    plain = next(x for x in model.modules() if isinstance(x, PreTrainedModel))
    wanted = {id(module) for module in attention_modules(plain)}
    return [(name, module) for name, module in plain.named_modules() if id(module) in wanted]


class _Hooks:
    """What is done before and after one attention module; `layer` counts from 0."""

    def before(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def after(self, layer: int, output: Tensor) -> Tensor:
        return output


def _recorder(kept: list[tuple[Tensor, Tensor]]) -> _Hooks:
    class Recorder(_Hooks):
        def before(self, layer: int, hidden: Tensor) -> Tensor:
            self.hidden = hidden
            return hidden

        def after(self, layer: int, output: Tensor) -> Tensor:
            kept.append((self.hidden, output))
            return output

    return Recorder()


def _comparer(kept: list[tuple[Tensor, Tensor]], errors: list[Tensor]) -> _Hooks:
    class Comparer(_Hooks):
        def before(self, layer: int, hidden: Tensor) -> Tensor:
            return kept[layer][0]

        def after(self, layer: int, output: Tensor) -> Tensor:
            wanted = kept[layer][1]
            errors.append((output.float() - wanted.float()).square().sum() / wanted.float().square().sum())
            return wanted

    return Comparer()


@contextmanager
def _hooked(modules: list[nn.Module], hooks: _Hooks) -> Iterator[None]:
    """Let `hooks` see and replace the hidden states that go into each module and what comes out of it."""
    handles = []
    for layer, module in enumerate(modules):

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> Any:
            if args:
                return (hooks.before(layer, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hooks.before(layer, kwargs["hidden_states"])}

        def after(_: nn.Module, args: Any, output: Any, layer: int = layer) -> Any:
            if isinstance(output, tuple):
                return (hooks.after(layer, output[0]), *output[1:])
            return hooks.after(layer, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
