"""Perplexity: each token scored once, weighted by tokens, with bits per byte of the source text."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsbr.errors import UserError
from bsbr.evaluation.agreement import log_normaliser
from bsbr.evaluation.statistics import Estimate, ratio_mean, transformed
from bsbr.evaluation.windows import Document, Window, cut_windows


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln of the probability of each true token, in float64.

    Args:
        logits: predictions, [T, V], any float type.
        targets: the tokens that came, [T], int64.
    Returns:
        [T], float64.

    Example:
        >>> target_nll(torch.zeros(1, 4), torch.tensor([2])).exp().item()
        4.0
    """
    return log_normaliser(logits) - logits.gather(1, targets[:, None])[:, 0].double()


@torch.no_grad()
def score_tokens(
    model: Any,
    tokens: Sequence[int],
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """Score a document's windows with a causal language model.

    Windows shorter than the longest of their batch are padded on the right, where a causal model cannot look;
    so neither the batch nor the padding changes a figure beyond the rounding of the matrix products.

    Args:
        model: a Hugging Face causal language model.
        tokens: the document.
        windows: from `cut_windows`.
        batch_size: windows per forward.
        device: where the model is.
    Returns:
        For each window, -ln q of the tokens it scores, [scored], float64, on the CPU.
    """
    result: list[Tensor] = []
    document = torch.tensor(list(tokens), dtype=torch.long)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        longest = max(window.stop - window.start for window in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, window in enumerate(batch):
            ids[row, : window.stop - window.start] = document[window.start : window.stop]
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        for row, window in enumerate(batch):
            targets = document[window.first_scored : window.stop].to(logits.device)
            result.append(target_nll(scored_rows(logits[row], window), targets).cpu())
    return result


def scored_rows(rows: Tensor, window: Window) -> Tensor:
    """The rows of a window's output that predict its scored tokens.

    Args:
        rows: one row per token of the window, [>= T, ...].
        window: the window.
    Returns:
        [scored, ...]; row i is the position before scored token i.
    """
    return rows[window.first_scored - 1 - window.start : window.stop - 1 - window.start]


def perplexity(
    model: Any,
    documents: Sequence[Document],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Estimate]:
    """Perplexity of a causal language model on documents, with document-clustered intervals.

    Source: the strided evaluation of transformers' perplexity guide; bits per byte as in nanochat.

    Documents are evaluated apart. N tokens without BOS give N - 1 scored tokens.

    Args:
        model: a Hugging Face causal language model.
        documents: from `encode_document` or `choose_documents`.
        window: tokens that go through the model at once.
        stride: tokens between windows; None means half a window.
        batch_size: windows per forward.
        device: where the model is.
    Returns:
        Estimates `nll` (nats per token), `perplexity`, and `bits_per_byte` where the tokenizer gave offsets.
    Raises:
        UserError: no document has 2 tokens.
    """
    nats, counts, sizes = [], [], []
    for document in documents:
        windows = cut_windows(len(document.tokens), window, stride or max(1, window // 2))
        scores = score_tokens(model, document.tokens, windows, batch_size=batch_size, device=device)
        nats.append(sum(float(score.sum()) for score in scores))
        counts.append(sum(len(score) for score in scores))
        sizes.append(None if document.token_bytes is None else sum(document.token_bytes[1:]))
    if not any(counts):
        raise UserError("text is too short: at least 2 tokens are needed to score one. Give more text")
    return summarise(nats, counts, sizes)


def summarise(nats: Sequence[float], tokens: Sequence[int], sizes: Sequence[int | None]) -> dict[str, Estimate]:
    """Turn per-document sums into the three figures.

    Args:
        nats: summed -ln q of each document's scored tokens.
        tokens: how many.
        sizes: their bytes; None anywhere leaves bits per byte out.
    Returns:
        See `perplexity`.

    Example:
        >>> summarise([math.log(7.0), math.log(7.0)], [1, 1], [None, None])["perplexity"].clusters
        2
    """
    nll = ratio_mean(nats, tokens)
    result = {"nll": nll, "perplexity": transformed(nll, math.exp)}
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) and sum(known) > 0:
        result["bits_per_byte"] = transformed(ratio_mean(nats, known), lambda nats: nats / math.log(2))
    return result


def context_windows(length: int, context: int) -> list[Window]:
    """Windows that give every token from `2 * context` on a short context: from `context` to `2 * context -
    1`.

    Args:
        length: tokens of the document.
        context: least tokens of context.
    Returns:
        Windows whose scored tokens are 2 * context ... length - 1, each once.

    Example:
        >>> [(w.start, w.first_scored, w.stop) for w in context_windows(11, 2)]
        [(2, 4, 6), (4, 6, 8), (6, 8, 10), (8, 10, 11)]
    """
    starts = range(context, length - context, context)
    return [
        Window(start=start, first_scored=start + context, stop=min(start + 2 * context, length)) for start in starts
    ]
