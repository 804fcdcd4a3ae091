"""What a step trains on: windows of a text, or examples of a task; a function of the step alone."""

from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bsbr.data.tasks import TaskConfig, generate
from bsbr.data.tokenizer import ENDOFTEXT_ID
from bsbr.training.ahead import Ahead
from bsbr.training.corpus import Corpus
from bsbr.training.language_model import document_positions, held_out_loss
from bsbr.training.recipe import PretrainConfig
from bsbr.training.windows import WindowOrder

_TRAINING, _HELD_OUT = 1, 2
"""Second number of a task's seed, after the recipe's: which examples they are."""


class Batch(NamedTuple):
    """The windows of one step."""

    windows: Tensor
    """Token ids, [N, T + 1], int64, on the device."""
    positions: Tensor | None
    """Position of each token in its document, [N, T], where a window holds several; None otherwise."""
    scored: Tensor | None
    """Whether the loss counts the next token, [N, T], bool; None means it counts each."""


class Batches(Protocol):
    """Where batches come from, and how what was learned is measured on others."""

    record: dict[str, Any]
    """What it is made of, as JSON."""
    train_tokens: int | None
    """Tokens of an epoch; None where nothing is read twice."""

    def at(self, step: int) -> Batch:
        """Return the batch of a step, from 0."""

    def measure(self, model: Any, *, whole: bool) -> dict[str, Any]:
        """Return held-out figures, `held_out_nll` among them; of everything, or of what is read on the way."""


class Stages:
    """Which window length a step has, after the recipe's curriculum.

    Args:
        config: the recipe.
        total_steps: of the run; not looked at without a curriculum.
    """

    def __init__(self, config: PretrainConfig, total_steps: int) -> None:
        self.lengths = [length for length, _ in config.curriculum] + [config.context]
        ends = np.cumsum([share for _, share in config.curriculum]) * total_steps
        self.first = [0, *(round(end) for end in ends)]

    def at(self, step: int) -> tuple[int, int, int]:
        """Return the stage of a step, its window length, and the steps of the stage that came before."""
        stage = max(i for i, first in enumerate(self.first) if step >= first)
        return stage, self.lengths[stage], step - self.first[stage]


class TextBatches:
    """Shuffled windows of one packed stream.

    Args:
        corpus: the streams, on the device.
        config: the recipe.
        total_steps: of the run.
    """

    def __init__(self, corpus: Corpus, config: PretrainConfig, total_steps: int) -> None:
        self.record: dict[str, Any] = corpus.record
        self.train_tokens: int | None = len(corpus.train)
        self._corpus, self._config, self._stages = corpus, config, Stages(config, total_steps)
        self._orders = [WindowOrder(len(corpus.train), length, config.seed) for length in self._stages.lengths]
        separate = config.documents == "separate"
        starts = (corpus.train == ENDOFTEXT_ID).nonzero()[:, 0].cpu().numpy() if separate else np.empty(0)
        self._document_starts = starts

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        stage, length, before = self._stages.at(step)
        count = self._config.batch_tokens // length
        starts = self._orders[stage].starts(before * count, count)
        device = self._corpus.train.device
        reach = torch.arange(length + 1, device=device)
        # a copy that is waited for would wait for every step queued before it
        places = torch.from_numpy(starts).to(device, non_blocking=True)
        windows = self._corpus.train[places[:, None] + reach].long()
        # looked up here and not in the windows, which would wait for the device
        first, last = (np.searchsorted(self._document_starts, edge) for edge in (starts + 1, starts + length))
        positions = document_positions(windows[:, :-1]) if (first < last).any() else None
        return Batch(windows, positions, None)

    def measure(self, model: Any, *, whole: bool) -> dict[str, Any]:
        """Return the loss on the held-out text."""
        found = held_out_loss(
            model, self._corpus.held_out, self._corpus.byte_lengths, context=self._config.context,
            max_windows=None if whole else self._config.val_windows, separate=self._config.documents == "separate",
            batch_windows=max(1, min(16, 65_536 // self._config.context)),
        )  # fmt: skip
        return {"held_out_nll": found.nll, "bits_per_byte": found.bits_per_byte} | ({"found": found} if whole else {})


class TaskBatches:
    """Examples of a synthetic task, each seen once.

    Args:
        task: the task at the recipe's context; shorter stages of a curriculum keep its other settings, but for pairs
            that find no room: their number is halved until they do.
        config: the recipe.
        total_steps: of the run.
        device: where the batches go.
        workers: processes that make the batches ahead of time; a script that starts any needs the usual guard,
            `if __name__ == "__main__":`.
    """

    train_tokens: int | None = None

    def __init__(
        self, task: TaskConfig, config: PretrainConfig, total_steps: int, device: torch.device, *, workers: int = 0
    ) -> None:
        self.record: dict[str, Any] = {"task": task.to_dict()}
        self._config, self._device, stages = config, device, Stages(config, total_steps)
        self._tasks = [_shortened(task, length) for length in stages.lengths]
        self._made = Ahead(partial(_examples, self._tasks, stages, config.batch_tokens, config.seed), workers=workers)

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        made = self._made.at(step)
        tokens, scored = (torch.from_numpy(made[x]).to(self._device, non_blocking=True) for x in ("tokens", "scored"))
        return Batch(tokens.long(), None, scored)

    def measure(self, model: Any, *, whole: bool) -> dict[str, Any]:
        """Return loss and accuracy on fresh examples."""
        from bsbr.evaluation.tasks import score_task  # needs scipy, which text does not

        count = self._config.val_windows * (4 if whole else 1)
        found = score_task(
            model, self._tasks[-1], examples=count, seed=(self._config.seed, _HELD_OUT),
            batch=max(1, 65_536 // self._config.context),
        )  # fmt: skip
        figures = {"held_out_nll": found.nll, "accuracy": found.accuracy.value}
        return figures | ({"found": found} if whole else {})


def _examples(
    tasks: list[TaskConfig], stages: Stages, batch_tokens: int, seed: int, step: int
) -> dict[str, np.ndarray]:
    """Tokens of the examples of a step, [N, T + 1], int32, and which of the next ones count, [N, T], bool."""
    stage, length, _ = stages.at(step)
    found = generate(tasks[stage], batch_tokens // length, (seed, _TRAINING, step))
    return {"tokens": found.tokens.astype(np.int32), "scored": found.answer > 0}


def _shortened(task: TaskConfig, length: int) -> TaskConfig:
    values = task.to_dict() | {"length": length}
    while True:
        try:
            return TaskConfig.from_dict(values)
        except ValueError:
            if (values["pairs"] or 1) == 1:
                raise
            values["pairs"] //= 2
