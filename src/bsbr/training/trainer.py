"""The training loop: steps without waiting for the device, clock, held-out losses, checkpoints."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bsbr.errors import UserError
from bsbr.training.checkpoint import load_checkpoint, save_checkpoint
from bsbr.training.corpus import Corpus
from bsbr.training.language_model import held_out_loss, token_nll
from bsbr.training.optimizer import SplitOptimizer, schedule
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.windows import WindowOrder

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

# Steps queued on a GPU before its loss is read; reading waits for the device.
_STEPS_PER_READ = 20
_ENDLESS = 1_000_000_000


class Trainer:
    """One run: the model, its optimizer, its place in the text, and how to save and restore all of them.

    Nothing here draws from a random state: weights come from the seed, the model has no dropout, and the
    order of the windows is a function of seed and step. Weights, optimizer state and step are all there is.

    Args:
        config: the recipe.
        model: on the device it is to be trained on.
        corpus: streams on the same device.
        folder: where checkpoints go.
        progress: shows what happens.
    """

    def __init__(
        self,
        *,
        config: PretrainConfig,
        model: "GPT2LMHeadModel",
        corpus: Corpus,
        folder: Path,
        progress: TrainingProgress,
    ) -> None:
        self.config = config
        self.model = model
        self.corpus = corpus
        self.folder = folder
        self.progress = progress
        self.device = corpus.train.device
        on_cuda = self.device.type == "cuda"
        self.precision = config.precision if config.precision != "auto" else ("bfloat16" if on_cuda else "float32")
        self.compiled = on_cuda if config.compile is None else config.compile
        self.optimizer = SplitOptimizer(model, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay)
        self.step = 0
        self.elapsed_s = 0.0
        self.history: list[dict[str, float]] = []
        self._nll = torch.compile(token_nll, dynamic=False, fullgraph=True) if self.compiled else token_nll
        self._order = WindowOrder(len(corpus.train), config.context, config.seed)
        self._batch = config.batch_tokens // config.context
        self._per_read = _STEPS_PER_READ if on_cuda else 1
        self._total = _ENDLESS if config.tokens is None else math.ceil(config.tokens / config.batch_tokens)
        self._reach = torch.arange(config.context + 1, device=self.device)

    def train(self) -> None:
        """Train to the end of the recipe; its last step is a checkpoint too.

        Raises:
            UserError: the loss is no longer finite.
            KeyboardInterrupt: after a checkpoint has been written.
        """
        config = self.config
        with deferred_interrupt() as interrupted:
            while self.step < self._total:
                begun, first = time.monotonic(), self.step
                marks = (self._per_read, config.val_interval, config.checkpoint_interval)
                last = min(self._total, *((first // mark + 1) * mark for mark in marks))
                loss = self._steps(last)
                seconds = (time.monotonic() - begun) / (last - first)
                if not math.isfinite(loss):
                    raise UserError(
                        f"training: the loss is {loss} by step {last}. Start again with lower lr and muon_lr"
                    )
                if last % config.val_interval == 0 or last == self._total:
                    self._evaluate(loss)
                self.elapsed_s += time.monotonic() - begun
                self._follow_clock(seconds, compiling=first == 0 and self.compiled)
                known = self._total if self._total < _ENDLESS else None
                self.progress.update(last, known, loss, config.batch_tokens / seconds)
                if interrupted.is_set() or last % config.checkpoint_interval == 0:
                    self.save()
                if interrupted.is_set():
                    self.progress.say("interrupted: checkpoint written, continue with --resume")
                    raise KeyboardInterrupt
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        tensors: dict[str, dict[str, torch.Tensor]] = {
            "weights": dict(self.model.named_parameters()),
            "optimizer": self.optimizer.state_tensors(),
        }
        state = {
            "config": self.config.to_dict(),
            "text": self.corpus.record,
            "elapsed_s": self.elapsed_s,
            "total_steps": self._total,
            "history": self.history,
        }
        save_checkpoint(self.folder, self.step, tensors, state)

    def resume(self) -> None:
        """Take over the newest whole checkpoint; without one the run starts at step 0.

        Raises:
            UserError: the checkpoint is of another recipe or another text, or all checkpoints are damaged.
        """
        found = load_checkpoint(self.folder)
        if found is None:
            self.progress.say("no checkpoint yet: starting at step 0")
            return
        _check_same("recipe", self.config.to_dict(), found.state["config"])
        _check_same("text", self.corpus.record, found.state["text"])
        weights = found.tensors["weights"]
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])
        self.optimizer.load_state_tensors(found.tensors["optimizer"])
        self.step = found.step
        self.elapsed_s = found.state["elapsed_s"]
        self.history = found.state["history"]
        self._total = found.state["total_steps"]
        self.progress.say(f"resuming at step {self.step}")

    def _steps(self, last: int) -> float:
        """Train up to step `last` and give the mean loss; reading it is the only wait for the device."""
        count = last - self.step
        starts = torch.from_numpy(self._order.starts(self.step * self._batch, count * self._batch))
        losses = [self._one_step(row) for row in starts.view(count, self._batch).to(self.device)]
        return torch.stack(losses).mean().item()

    def _one_step(self, starts: torch.Tensor) -> torch.Tensor:
        windows = self.corpus.train[starts[:, None] + self._reach].long()  # [B, context + 1]
        with self._autocast():
            loss = self._nll(self.model, windows).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.set_scale(schedule(self.step, self._total, self.config.warmup_steps))
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _evaluate(self, train_loss: float) -> None:
        with self._autocast():
            held_out = held_out_loss(
                self.model,
                self.corpus.held_out,
                self.corpus.byte_lengths,
                context=self.config.context,
                max_windows=self.config.val_windows,
            )
        row = {
            "train_loss": train_loss,
            "held_out_nll": held_out.nll,
            "bits_per_byte": held_out.bits_per_byte,
        }
        self.history.append({"step": self.step, "tokens": self.step * self.config.batch_tokens, **row})
        self.progress.held_out(self.step, held_out.nll, held_out.bits_per_byte)

    def _follow_clock(self, seconds_per_step: float, *, compiling: bool) -> None:
        """With a time budget: aim the schedule at the step that the time left reaches, until that is near."""
        if self.config.minutes is None or compiling or self._total - self.step < 3 * self._per_read:
            return
        remaining = self.config.minutes * 60 - self.elapsed_s
        self._total = self.step + max(0, round(remaining / seconds_per_step))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that training stops between steps; a second stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def remember(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, remember)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _check_same(what: str, ours: dict[str, Any], saved: dict[str, Any]) -> None:
    for key in sorted(ours.keys() | saved.keys()):
        if ours.get(key) != saved.get(key):
            raise UserError(
                f"resume: {what} {key} is {ours.get(key)}, the checkpoint has {saved.get(key)}. "
                "Restore the value or choose another output"
            )
