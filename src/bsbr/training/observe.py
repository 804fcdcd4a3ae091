"""Showing the queries, keys and values of every attention module to an observer while the model attends exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from bsbr.hf.attention import NAME
from bsbr.hf.exact import exact_attention
from bsbr.hf.modeling import attention_modules

_TEACHER = "bsbr_teacher"
"""Name under which transformers finds exact attention that shows its q, k and v to an observer."""

_OBSERVER = "_bsbr_observer"
"""Attribute of an attention module that holds its observer while there is one."""


class Observer(Protocol):
    """Called for each attention module with q [B, HQ, T, D], k [B, H, T, D], v [B, H, T, Dv] and the factor on q.k."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None: ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep the many small operations of a fit on one thread: shared out, they spend their time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observe(model: PreTrainedModel, windows: Tensor, observer: Observer, progress: bool, what: str) -> None:
    """Run a converted model with exact attention and show each converted layer to an observer; leave it as it was.

    Args:
        model: converted.
        windows: token ids, [W, length].
        observer: called once for each attention module, in the order in which they run.
        progress: show a bar, on a terminal.
        what: what the bar says.
    """
    modules = attention_modules(model)
    training, terminal = model.training, Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not (progress and terminal.is_terminal)) as bar:
        task = bar.add_task(what, total=len(modules))

        def show(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
            observer(module, q, k, v, scale)
            bar.advance(task)

        for module in modules:
            setattr(module, _OBSERVER, show)
        try:
            model.set_attn_implementation(_TEACHER)
            with torch.no_grad():
                model.eval().base_model(input_ids=windows, use_cache=False)
        finally:
            model.set_attn_implementation(NAME)
            model.train(training)
            for module in modules:
                delattr(module, _OBSERVER)


def _teach(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Exact attention, as transformers calls it, that shows what it is given to the module's observer."""
    observer: Observer | None = getattr(module, _OBSERVER, None)
    if observer is not None:
        observer(module, query, key, value, kwargs["scaling"])
    return exact_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_TEACHER, _teach)
AttentionMaskInterface.register(_TEACHER, sdpa_mask)
