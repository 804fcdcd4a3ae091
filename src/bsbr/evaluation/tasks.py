"""Accuracy on synthetic tasks, by distance, and controls that must not know the answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from bsbr.config import BSBRConfig
from bsbr.data.tasks import TaskConfig, generate
from bsbr.errors import UserError
from bsbr.evaluation.routing import OneDraw, route
from bsbr.evaluation.statistics import Estimate, wilson
from bsbr.hf.convert import convert
from bsbr.hf.mixers import read_settings


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What a model knows of a task."""

    nll: float
    """Nats per token of the answers."""
    accuracy: Estimate
    """Share of answers of which the model prefers every token, given those before; Wilson's 95 % interval."""
    chance: float
    """Accuracy of a guess among all words that an answer can be."""
    by_distance: tuple[tuple[int, int, Estimate], ...]
    """Least and most distance, and the accuracy between them, for each octave of distance that occurred."""
    examples: int
    """Examples read."""

    def to_dict(self) -> dict[str, Any]:
        """Return the score as JSON takes it."""
        return {
            "nll": self.nll,
            "accuracy": self.accuracy.as_fields(),
            "chance": self.chance,
            "by_distance": [{"least": a, "most": b, **found.as_fields()} for a, b, found in self.by_distance],
            "examples": self.examples,
        }


@torch.no_grad()
def score_task(
    model: PreTrainedModel, config: TaskConfig, *, examples: int, seed: int | Sequence[int], batch: int = 16
) -> TaskScore:
    """Measure a model on fresh examples of a task.

    Args:
        model: a causal language model over the task's vocabulary.
        config: the task.
        examples: how many.
        seed: of the examples; the number of each is added, so that any part of them can be made again.
        batch: examples of a forward pass.
    Returns:
        The score.
    Raises:
        ValueError: no examples are asked for.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=64)).eval()
        >>> score_task(model, TaskConfig(task="induction", length=32, vocab=32), examples=4, seed=0).accuracy.n
        4
    """
    if examples < 1:
        raise ValueError(f"examples = {examples}: must be at least 1")
    base = (seed,) if isinstance(seed, int) else tuple(seed)
    nats, tokens, right, distance = 0.0, 0, [], []
    for first in range(0, examples, batch):
        found = generate(config, min(batch, examples - first), (*base, first))
        ids = torch.from_numpy(found.tokens).to(model.device)
        asked = torch.from_numpy(found.answer > 0)
        nll, hit = _read(model, ids, asked.to(model.device))
        nats, tokens = nats + nll.sum().item(), tokens + len(nll)
        wrong = np.zeros((len(ids), int(found.answer.max()) + 1), dtype=np.int64)
        row, place = asked.numpy().nonzero()
        np.add.at(wrong, (row, found.answer[row, place]), ~hit.cpu().numpy())
        opens = _first_of_answer(found.answer)
        row, place = opens.nonzero()
        right.append(wrong[row, found.answer[row, place]] == 0)
        distance.append(found.distance[row, place])
    answers, away = np.concatenate(right), np.concatenate(distance)
    return TaskScore(
        nll=nats / tokens,
        accuracy=wilson(int(answers.sum()), len(answers)),
        chance=_chance(config),
        by_distance=_octaves(answers, away),
        examples=examples,
    )


def controls(model: PreTrainedModel, seed: int = 0) -> dict[str, PreTrainedModel]:
    """Make the controls of a model with block retrieval: the same weights, without the retrieval they learned with.

    Args:
        model: converted with a BSBRConfig.
        seed: of the random blocks.
    Returns:
        `retrieval_off`: the own block and nothing else; `random_blocks`: blocks drawn at random, once
        for a text, are read exactly and the others left out, so that an answer is known only when its block happened to
        be drawn or is one of the first `top_k`; `summaries_only`:
        no block is read exactly, but all by their summaries.
    Raises:
        UserError: the model has another attention.
    """
    _, settings = read_settings(getattr(model.config, "bsbr", None))
    if not hasattr(model.config, "bsbr") or not isinstance(settings, BSBRConfig):
        raise UserError("controls are of models with block retrieval: convert with a BSBRConfig")
    without = replace(settings, far="drop", state="none", dense_below=0, top_k_per_head=None)
    return {
        "retrieval_off": convert(model, replace(without, top_k=0)),
        "random_blocks": route(convert(model, without), OneDraw(seed)),
        "summaries_only": convert(model, replace(settings, top_k=0, dense_below=0, top_k_per_head=None)),
    }


def _read(model: PreTrainedModel, ids: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each asked token, and whether the model prefers it; logits are made where some row is asked."""
    columns = asked.any(0).nonzero()[:, 0]
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=columns).logits[asked[:, columns]].float()
    wanted = ids[:, 1:][asked]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def _first_of_answer(answer: np.ndarray) -> np.ndarray:
    """True at the first token of each answer; the tokens of an answer are neighbours."""
    before = np.concatenate([np.zeros_like(answer[:, :1]), answer[:, :-1]], 1)
    return (answer > 0) & (answer != before)


def _octaves(right: np.ndarray, distance: np.ndarray) -> tuple[tuple[int, int, Estimate], ...]:
    parts = []
    octave = np.where(distance > 0, np.log2(np.maximum(distance, 1)).astype(np.int64), -1)
    for power in np.unique(octave[octave >= 0]):
        chosen = octave == power
        estimate = wilson(int(right[chosen].sum()), int(chosen.sum()))
        parts.append((int(distance[chosen].min()), int(distance[chosen].max()), estimate))
    return tuple(parts)


def _chance(config: TaskConfig) -> float:
    words = config.vocab if config.task == "impossible" else config.words
    return float(words) ** -(config.digits or 1)
