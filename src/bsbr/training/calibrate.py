"""Calibration: five scalars per head, fitted so that the converted attention gives what exact attention gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import sdpa_mask

from bsbr.config import BSBRConfig
from bsbr.data.tokenizer import pack_documents
from bsbr.errors import UserError
from bsbr.hf.attention import NAME
from bsbr.hf.exact import exact_attention
from bsbr.hf.mixers import read_settings
from bsbr.hf.modeling import BSBRModelMixin, attention_modules
from bsbr.hf.positions import check_length, max_positions
from bsbr.ops.schedule import dense_until
from bsbr.training.calibration_fit import fit_scalars
from bsbr.training.calibration_sample import sample_positions, take_sample

_TEACHER = "bsbr_teacher"
"""Name under which transformers finds exact attention that shows its q, k and v to an observer."""

_OBSERVER = "_bsbr_observer"
"""Attribute of an attention module that holds its observer while there is one."""

_CHARACTERS = 16
"""Characters per token wanted that are certainly enough; of longer texts only parts are tokenised."""

_ELEMENTS = 1 << 26
"""Elements of the largest tensor of a sample: heads are fitted in parts where one layer would need more."""


def calibrate(
    model: PreTrainedModel,
    input_ids_or_text: Tensor | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 32768,
    length: int | None = None,
    queries_per_head: int = 512,
    steps: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> PreTrainedModel:
    """Fit the far field of a converted model to the exact attention of its own weights.

    Source: docs/method.md. Heavy tails make the second-order estimate of a block's mass over- or undershoot; five
    scalars per head correct that.

    1. The model reads windows of text with exact attention in every layer.
    2. In each layer queries are sampled where the attention will be sparse; the exact mass and output of their own
       block and of every past block are computed once.
    3. Adam fits the scalars of each head to the relative squared error of its output at half of the queries,
       choosing blocks anew at every step. The other half guards: a head that gains nothing there stays uncalibrated.

    The same model, text and seed give the same scalars on the same machine; nothing else of the model changes, and
    no global random state is touched. Scalars fit the `block_size` and `top_k` they were fitted for. Queries below
    `dense_below` are left out; where that would leave less than a block, it is taken as 0.

    Args:
        model: converted, with a BSBRConfig that does not drop the far field; its scalars are replaced in place.
        input_ids_or_text: token ids without padding, [T] or [B, T]; or a text, with documents separated by lines
            `<|endoftext|>`. It should be like the texts the model is for, and not one it is evaluated on.
        tokenizer: the model's; for a text.
        tokens: how many tokens to read, in whole windows spread evenly over the input.
        length: tokens of a window; None means 2048, or four times the part that is always exact if that is more,
            within the model's positions and the input.
        queries_per_head: queries sampled for each head, over all windows.
        steps: steps of Adam.
        seed: of the choice of queries.
        progress: show a bar, on a terminal.
    Returns:
        The same model.
    Raises:
        UserError: the model is not converted or has no far field, the input is too short, or nothing in a window
            would be sparse.
        ValueError: a number that must be positive is not.
    """
    _check_counts(tokens=tokens, length=length, queries_per_head=queries_per_head, steps=steps)
    config = _config(model)
    plan = _plan(model, config, length)
    windows = _windows(input_ids_or_text, tokenizer, tokens, plan).to(model.device)
    per_window = -(-queries_per_head // len(windows))
    positions = sample_positions(plan.start, windows.shape[1], len(windows), per_window, seed).to(model.device)
    config = replace(config, dense_below=0)  # the sampled queries are sparse, wherever the switch stands

    def fit(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        scalars: Any = module.bsbr.calibration  # type: ignore[union-attr]
        group = q.shape[1] // k.shape[1]
        blocks = windows.shape[1] // config.unit
        part = max(1, _ELEMENTS // (group * positions.numel() * blocks * v.shape[-1]))
        for first in range(0, k.shape[1], part):
            heads, key_heads = slice(first * group, (first + part) * group), slice(first, first + part)
            with _one_thread():
                sample = take_sample(q[:, heads], k[:, key_heads], v[:, key_heads], positions, config, scale)
                scalars.data[heads] = fit_scalars(sample, config, steps=steps).calibration.to(scalars)

    _observe(model, windows, fit, progress)
    return model


class _Plan(NamedTuple):
    """Where the sparse part of a window is, before the input is looked at."""

    start: int
    """First position at which queries may be sampled."""
    needed: int
    """Least tokens of a window."""
    length: int
    """Tokens of a window where the input has so many."""


class _Observer(Protocol):
    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None: ...


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _config(model: PreTrainedModel) -> BSBRConfig:
    settings = read_settings(model.config.bsbr)[1] if isinstance(model, BSBRModelMixin) else None
    if not isinstance(settings, BSBRConfig):
        raise UserError(f"{type(model).__name__} has no scalars to calibrate: convert it with a BSBRConfig first")
    if settings.far == "drop":
        raise UserError('far="drop" leaves no far field to calibrate: convert with far="moments" or "mean"')
    return settings


def _plan(model: PreTrainedModel, config: BSBRConfig, length: int | None) -> _Plan:
    """Decide on the sparse region and the length of a window."""
    text_config = model.config.get_text_config(decoder=True)
    available = max_positions(model) or getattr(text_config, "max_position_embeddings", None)
    exact = dense_until(replace(config, dense_below=0))
    given = length is not None
    if length is None:
        length = max(2048, 4 * exact)
        length = length if available is None else min(length, available)
    check_length(model, length)
    if length < exact + config.block_size:
        raise UserError(
            f"nothing to calibrate in {length} tokens: block_size {config.block_size} with top_k {config.top_k} reads "
            f"the first {exact} exactly. Use at least {exact + config.block_size} tokens, or a smaller top_k"
        )
    start = dense_until(config)
    if length < start + config.block_size:
        start = exact
    return _Plan(start, length if given else start + config.block_size, length)


def _windows(given: Tensor | str, tokenizer: PreTrainedTokenizerBase | None, tokens: int, plan: _Plan) -> Tensor:
    """Cut the input into windows and take as many as wanted, evenly spread: [W, length]."""
    count = max(1, tokens // plan.length)
    if isinstance(given, Tensor):
        rows = given[None] if given.dim() == 1 else given
        if rows.dim() != 2 or rows.is_floating_point():
            raise ValueError(f"input_ids must be integers [T] or [B, T], got {list(given.shape)} {given.dtype}")
    elif tokenizer is None:
        raise ValueError("a text needs the model's tokenizer: pass tokenizer=")
    else:
        rows = _encode(given, tokenizer, count, plan.length)
    length = min(plan.length, rows.shape[1])
    if length < plan.needed:
        raise UserError(
            f"the text is too short to calibrate on: {rows.shape[1]} tokens, at least {plan.needed} needed. "
            "Give more text"
        )
    windows = rows[:, : rows.shape[1] // length * length].reshape(-1, length)
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """Token ids of the whole of a short text, [1, T], or of `count` places in a long one, [count, length]."""
    if len(text) <= _CHARACTERS * count * length:
        return torch.tensor([pack_documents(text, tokenizer)])
    room = _CHARACTERS * length
    starts = [i * (len(text) - room) // count for i in range(count)]
    parts = [pack_documents(text[start : start + room], tokenizer)[:length] for start in starts]
    longest = max(len(part) for part in parts)
    return torch.tensor([part for part in parts if len(part) == longest])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the many small operations of a fit on one thread: shared out, they spend their time waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _observe(model: PreTrainedModel, windows: Tensor, observer: _Observer, progress: bool) -> None:
    """Run the model with exact attention, calling the observer in every converted layer; then leave it as it was."""
    modules = attention_modules(model)
    training, terminal = model.training, Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not (progress and terminal.is_terminal)) as bar:
        task = bar.add_task("calibrating", total=len(modules))

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
            observer(module, q, k, v, scale)
            bar.advance(task)

        for module in modules:
            setattr(module, _OBSERVER, observe)
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
    observer: _Observer | None = getattr(module, _OBSERVER, None)
    if observer is not None:
        observer(module, query, key, value, kwargs["scaling"])
    return exact_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_TEACHER, _teach)
AttentionMaskInterface.register(_TEACHER, sdpa_mask)
