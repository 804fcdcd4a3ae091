"""The published perplexity, row by row, kept only so that its figure can be laid beside ours."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from bsbr.evaluation.perplexity import target_nll

ROWS = 50
LEGACY_PAIR = ("original", "converted")


def legacy_key(variant: str) -> tuple[Any, ...]:
    """Where the record of a variant is kept.

    Args:
        variant: name of the model.
    Returns:
        A key of the record store.
    """
    return ("row by row", variant)


@torch.no_grad()
def measure_legacy(
    model: Any, tokenizer: Any, texts: Sequence[str], *, rows: int = ROWS, device: str = "cpu"
) -> dict[str, Any]:
    """Perplexity as the original public implementation (JacobFV/bsbr) measured it.

    Source: its research/conversion_experiments/benchmark_comparison.py. The first 50 lines of the text, blank
    ones and headings among them, each alone and without context, cut at the model's positions; rows of fewer
    than two tokens fall out. A model sees almost no context this way, so the figure says little about one.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        texts: documents, joined as they stand.
        rows: lines taken.
        device: where the model is.
    Returns:
        "nats" and "n", summed over the scored tokens, and "perplexity" where there is one.
    """
    nats, count = 0.0, 0
    longest = getattr(model.config, "max_position_embeddings", None) or 1024
    for line in "".join(texts).splitlines(keepends=True)[:rows]:
        tokens = tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokens), longest):
            ids = torch.tensor(tokens[start : start + longest], dtype=torch.long, device=device)
            if len(ids) < 2:
                continue
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            nats += float(target_nll(logits[:-1], ids[1:]).sum())
            count += len(ids) - 1
    result: dict[str, Any] = {"nats": nats, "n": count}
    return result | ({"perplexity": math.exp(nats / count)} if count else {})
