"""Calibration: what makes the converted attention of each head give what exact attention gives."""

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bsbr.config import BSBRConfig
from bsbr.data.tokenizer import pack_documents
from bsbr.errors import UserError
from bsbr.hf.convert import convert, revert
from bsbr.hf.exact import prepare_dense
from bsbr.hf.mixers import read_settings, write_settings
from bsbr.hf.modeling import BSBRModelMixin, attention_modules
from bsbr.hf.positions import check_length, max_positions
from bsbr.ops.schedule import dense_until
from bsbr.ops.summaries import UNCALIBRATED
from bsbr.training.calibration_layer import Sampling, fit_layer, judge_layer
from bsbr.training.held_out import compare_models
from bsbr.training.observe import observe
from bsbr.training.spread import candidate_counts, spread

_HELD_OUT = 8
"""One window in so many is not calibrated on."""

_CHARACTERS = 16
"""Characters per token wanted that are certainly enough; of longer texts only parts are tokenised."""


@torch.enable_grad()  # also where a caller, or a Ctrl-C within torch.no_grad, has left gradients off
def calibrate(
    model: PreTrainedModel,
    input_ids_or_text: Tensor | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int = 32768,
    length: int | None = None,
    queries_per_head: int = 512,
    steps: int = 200,
    spread_top_k: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> PreTrainedModel:
    """Fit a converted model to the exact attention of its own weights.

    Source: docs/method.md. Heads differ in how far they look: `top_k` is spread over them by need. Heavy tails make the
    second-order estimate of a block's mass over- or undershoot: five scalars per head correct that.

    1. The model reads windows of text with exact attention in every layer.
    2. In each layer queries are sampled where the attention will be sparse; the exact mass and output of their own
       block and of every past block are computed once.
    3. Adam fits the scalars of each head to the relative squared error of its output at half of the queries,
       choosing blocks anew at every step. The other half guards: a head that gains nothing there stays uncalibrated.
    4. The errors of each head with other numbers of blocks decide how many it gets, at the same mean over all key heads
       of all layers (`bsbr.training.spread`); the model reads the windows again, and the scalars are fitted again.
    5. Windows that were left out compare the model with its original before and after. Where it is not nearer, a
       warning says so, and it stays uncalibrated.

    The same model, text and seed give the same result on the same machine; no weight of the original changes, and no
    global random state is touched. It fits the `block_size` and `top_k` it was made for. Queries below `dense_below`
    are left out; where that would leave less than a block, it is taken as 0.

    Args:
        model: converted, with a BSBRConfig; its scalars and the `top_k_per_head` of its settings are replaced in place.
        input_ids_or_text: token ids without padding, [T] or [B, T]; or a text, with documents separated by lines
            `<|endoftext|>`. It should be like the texts the model is for, and not one it is evaluated on.
        tokenizer: the model's; for a text.
        tokens: how many tokens to read, in whole windows spread evenly over the input.
        length: tokens of a window; None means 2048, or four times the part that is always exact if that is more,
            within the model's positions and the input.
        queries_per_head: queries sampled for each head, over all windows.
        steps: steps of Adam.
        spread_top_k: let key heads read different numbers of blocks.
        seed: of the choice of queries.
        progress: show a bar, on a terminal.
    Returns:
        The same model.
    Raises:
        UserError: the model is not converted or has nothing to calibrate, the input is too short, or nothing in a
            window would be sparse.
        ValueError: a number that must be positive is not.
    """
    _check_counts(tokens=tokens, length=length, queries_per_head=queries_per_head, steps=steps)
    settings = replace(_config(model, spread_top_k), top_k_per_head=None)
    plan = _plan(model, settings, length)
    windows, held_out = _hold_out(_windows(input_ids_or_text, tokenizer, tokens, plan).to(model.device))
    _uncalibrate(model)
    sampling = Sampling(plan.start, windows.shape[1], len(windows), queries_per_head, seed)
    if spread_top_k and settings.top_k:
        _spread(model, windows, sampling, settings, -(-steps // 4), progress)
    if settings.far != "drop":

        def fit(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
            fit_layer(_scalars(module), sampling, q, k, v, scale, _of_layer(model, module), steps)

        observe(model, windows, fit, progress, "calibrating")
    if len(held_out):
        _accept(model, held_out)
    return model


class _Plan(NamedTuple):
    """Where the sparse part of a window is, before the input is looked at."""

    start: int
    """First position at which queries may be sampled."""
    needed: int
    """Least tokens of a window."""
    length: int
    """Tokens of a window where the input has so many."""


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _config(model: PreTrainedModel, spread_top_k: bool) -> BSBRConfig:
    settings = read_settings(model.config.bsbr)[1] if isinstance(model, BSBRModelMixin) else None
    if not isinstance(settings, BSBRConfig):
        raise UserError(f"{type(model).__name__} has no scalars to calibrate: convert it with a BSBRConfig first")
    if settings.far == "drop" and not (spread_top_k and settings.top_k):
        raise UserError('far="drop" leaves no far field to calibrate: convert with far="moments" or "mean"')
    return settings


def _scalars(module: nn.Module) -> Tensor:
    return module.bsbr.calibration.data  # type: ignore[union-attr, return-value]


def _of_layer(model: PreTrainedModel, module: nn.Module) -> BSBRConfig:
    """A layer's settings as its sampled queries need them: these are sparse, wherever `dense_below` stands."""
    settings: BSBRConfig = read_settings(model.config.bsbr, module.layer_idx)[1]  # type: ignore[arg-type]
    return replace(settings, dense_below=0)


def _uncalibrate(model: PreTrainedModel) -> None:
    for module in attention_modules(model):
        scalars = _scalars(module)
        scalars.copy_(scalars.new_tensor(UNCALIBRATED).expand_as(scalars))
    model.config.bsbr = {**model.config.bsbr, "top_k_per_head": None}


def _spread(
    model: PreTrainedModel, windows: Tensor, sampling: Sampling, settings: BSBRConfig, steps: int, progress: bool
) -> None:
    """Write the number of blocks of each key head into the model's settings; the scalars are then fitted roughly."""
    counts = candidate_counts(settings.top_k, windows.shape[1] // settings.unit)
    curves: dict[int, Tensor] = {}

    def judge(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        config = _of_layer(model, module)
        if config.far != "drop":
            fit_layer(_scalars(module), sampling, q, k, v, scale, config, steps)
        layer: int = module.layer_idx  # type: ignore[assignment]
        curves[layer] = judge_layer(_scalars(module), sampling, q, k, v, scale, config, counts)

    observe(model, windows, judge, progress, "spreading top_k")
    numbers = dict(zip(curves, spread(list(curves.values()), counts, settings.top_k), strict=True))
    rows = [numbers.get(layer) for layer in range(max(numbers) + 1)]
    model.config.bsbr = write_settings(replace(settings, top_k_per_head=tuple(rows)))


def _hold_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and every eighth to judge the result on; no such ones where there is a single window."""
    if len(windows) == 1:
        return windows, windows[:0]
    held_out = torch.arange(len(windows)) % _HELD_OUT == min(_HELD_OUT, len(windows)) - 1
    return windows[~held_out], windows[held_out]


def _accept(model: PreTrainedModel, held_out: Tensor) -> None:
    """Take the calibration back where held-out windows show no gain from it."""
    original = prepare_dense(revert(model).eval())
    calibrated: dict[str, Any] = model.config.bsbr
    sparse = replace(read_settings(calibrated)[1], dense_below=0)
    models = {
        "calibrated": convert(model, sparse),
        "uncalibrated": convert(original, replace(sparse, top_k_per_head=None)),
    }
    found = compare_models(original, models, held_out)
    after, before = (found[name]["kl"] for name in models)
    if after is None or before is None or after < before:
        return
    _uncalibrate(model)
    warnings.warn(
        f"calibration did not help on held-out text (KL {after:.4g} nats, {before:.4g} without): the model stays "
        "uncalibrated. Give more text, or text that is more like the model's",
        stacklevel=3,
    )


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
