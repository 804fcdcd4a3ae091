"""How near two models' next-token predictions are over whole windows, without ever holding [T, vocabulary]."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bsbr.errors import UserError
from bsbr.evaluation.buckets import position_edges, sum_by_bucket

_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Logits held at once: their few float64 copies fit into a CPU's cache, and keep a GPU busy."""

METRICS = ("kl", "top1_agreement", "nll")
"""What is compared at each position."""


class Predictions(NamedTuple):
    """What a model predicts at some positions: logits are made of it a part at a time."""

    hidden: Tensor
    """Last hidden states, [n, hidden]."""
    head: nn.Module
    """Turns them into logits."""


def spread_windows(tokenizer: Any, texts: Sequence[str], length: int, count: int) -> list[list[Tensor]]:
    """Take windows spread evenly over each document; one shorter than a window gives none.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the documents.
        length: tokens of a window.
        count: windows of a document; fewer where they would overlap.
    Returns:
        For each document its windows, [length] int64 each.
    """
    windows = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        fitting = min(count, len(ids) // length)
        starts = [int((i + 0.5) / fitting * (len(ids) - length)) for i in range(fitting)]
        windows.append([ids[start : start + length] for start in starts])
    return windows


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse a model whose logits are more than its head on its last hidden states.

    Args:
        model: a Hugging Face causal language model in eval mode.
    Raises:
        UserError: it scales or caps its logits, so that they could not be made a part at a time.
    """
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    whole = model(input_ids=ids, use_cache=False).logits[0].float()
    made = logits_of(predict(model, ids, 0)).float()
    if not torch.allclose(whole[:-1], made, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
        raise UserError(f"{type(model).__name__} changes its logits after the head: it cannot be compared by parts")


@torch.no_grad()
def predict(model: Any, ids: Tensor, after: int) -> Predictions:
    """Run a model over whole windows.

    Args:
        model: a Hugging Face causal language model in eval mode.
        ids: windows, [B, T].
        after: first position that counts.
    Returns:
        The predictions at positions `after` to T - 2 of each window, window after window.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return Predictions(hidden[:, after:-1].flatten(0, 1), model.get_output_embeddings())


def logits_of(predictions: Predictions) -> Tensor:
    """Make the logits of few positions.

    Args:
        predictions: of n positions.
    Returns:
        [n, vocabulary], in the model's dtype.
    """
    return predictions.head(predictions.hidden)


@torch.no_grad()
def compare_predictions(original: Predictions, other: Predictions, targets: Tensor) -> dict[str, Tensor]:
    """Compare two models at every position, a few positions at a time.

    The same definitions as `bsbr.evaluation.agreement.compare`, of which these are the three that cost least: p and q
    are float64 softmaxes of the logits over the full vocabulary, without an added epsilon.

    Args:
        original, other: predictions at the same n positions.
        targets: the tokens that came next, [n].
    Returns:
        float64 vectors [n]: `kl` (original to other, nats), `top1_agreement` (0 or 1), `nll` (of the other, nats).
    Raises:
        UserError: a logit is NaN or infinite.
    """
    vocabulary = logits_of(Predictions(original.hidden[:1], original.head)).shape[1]
    step = max(8, _ELEMENTS["cuda" if targets.is_cuda else "cpu"] // vocabulary)
    parts: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for rows_p, rows_q, target in zip(
        original.hidden.split(step), other.hidden.split(step), targets.split(step), strict=True
    ):
        lp, lq = original.head(rows_p).double().log_softmax(-1), other.head(rows_q).double().log_softmax(-1)
        # Rounding may leave -1e-16 where the two are equal: a divergence is never negative.
        parts["kl"].append((lp.exp() * (lp - lq)).sum(-1).clamp_min(0))
        parts["top1_agreement"].append((lp.argmax(-1) == lq.argmax(-1)).double())
        parts["nll"].append(-lq.gather(1, target[:, None])[:, 0])
    values = {name: torch.cat(part) for name, part in parts.items()}
    if not bool(torch.isfinite(values["kl"] + values["nll"]).all()):
        raise UserError("logits are not finite: expected numbers, got NaN or infinity. Check the model's weights")
    return values


def position_buckets(length: int, *, first: int, after: int) -> dict[str, tuple[int, int]]:
    """Name the ranges of positions that figures are given for: from `after` on, and ranges that double.

    Args:
        length: tokens of a window.
        first: end of the first range.
        after: first position that counts in the main figure.
    Returns:
        Names to first and one past the last position; the main range is the first.

    Example:
        >>> list(position_buckets(1024, first=128, after=256))
        ['256-1024', '0-128', '128-256', '256-512', '512-1024']
    """
    edges = [edge for edge in position_edges(length, first=first) if edge < length] + [length]
    ranges = [(after, length), *pairwise(edges)]
    return {f"{low}-{high}": (low, high) for low, high in ranges}


def sum_by_position(
    values: Mapping[str, Tensor], windows: int, buckets: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, float]]:
    """Sum every metric over every range of positions.

    Args:
        values: metric name to a vector [windows * T'], the positions 0 to T' - 1 of each window.
        windows: how many there are.
        buckets: from `position_buckets`.
    Returns:
        Bucket to {"n": positions, metric: sum}; empty buckets are absent.
    """
    some = next(iter(values.values()))
    position = torch.arange(len(some) // windows, device=some.device).repeat(windows)
    masks = {name: (position >= low) & (position < high) for name, (low, high) in buckets.items()}
    return sum_by_bucket(values, masks)
