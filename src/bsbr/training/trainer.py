"""The training loop: steps without waiting for the device, clock, held-out losses, checkpoints."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bsbr.errors import UserError
from bsbr.training.batches import Batch, Batches
from bsbr.training.board import Board
from bsbr.training.checkpoint import load_checkpoint, save_checkpoint
from bsbr.training.flops import peak_flops, training_flops_per_token
from bsbr.training.language_model import token_nll
from bsbr.training.optimizer import SplitOptimizer, schedule
from bsbr.training.processes import Processes, fill, whole
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig

# Steps queued on a GPU before its loss is read; reading waits for the device.
_STEPS_PER_READ = 20
_ENDLESS = 1_000_000_000


def total_steps(config: PretrainConfig) -> int:
    """Return the steps of a run, or a number beyond any where the clock decides."""
    return _ENDLESS if config.tokens is None else math.ceil(config.tokens / config.batch_tokens)


class Trainer:
    """One run: the model, its optimizer, its place in the data, and how to save and restore all of them.

    Nothing here draws from a random state: weights come from the seed, the model has no dropout, and what a step
    reads is a function of seed and step. Weights, optimizer state and step are all there is.

    Args:
        config: the recipe.
        model: on the device it is to be trained on, spread over the processes if there are several.
        batches: on the same device.
        folder: where checkpoints go.
        progress: shows what happens.
        processes: this process among those of the run.
        board: takes the curves, or None.
    """

    def __init__(
        self,
        *,
        config: PretrainConfig,
        model: PreTrainedModel,
        batches: Batches,
        folder: Path,
        progress: TrainingProgress,
        processes: Processes | None = None,
        board: Board | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.batches = batches
        self.folder = folder
        self.progress = progress
        self.processes = processes or Processes()
        self.device = next(model.parameters()).device
        on_cuda = self.device.type == "cuda"
        self.precision = config.precision if config.precision != "auto" else ("bfloat16" if on_cuda else "float32")
        self.compiled = on_cuda if config.compile is None else config.compile
        self.optimizer = SplitOptimizer(
            model, lr=config.lr, muon_lr=config.muon_lr, weight_decay=config.weight_decay,
            muon=config.optimizer == "muon",
        )  # fmt: skip
        self.step = 0
        self.elapsed_s = 0.0
        self.history: list[dict[str, float]] = []
        self.on_measure: list[Any] = []
        self._board = board
        # one graph where there is nothing that may break it
        one_graph = config.attention is None and config.architecture == "gpt2"
        self._nll = torch.compile(token_nll, dynamic=False, fullgraph=one_graph) if self.compiled else token_nll
        self._per_read = _STEPS_PER_READ if on_cuda else 1
        self._total = total_steps(config)
        flops = training_flops_per_token(model, config.context, full_attention=config.attention is None)
        peak = peak_flops(self.device)
        self._per_mfu = None if peak is None else peak * self.processes.world / flops

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
                stop = self.processes.anyone(interrupted.is_set(), self.device)
                if not math.isfinite(loss):
                    raise UserError(
                        f"training: the loss is {loss} by step {last}. Start again with lower lr and muon_lr"
                    )
                if last % config.val_interval == 0 or last == self._total:
                    self._evaluate(loss)
                self.elapsed_s += time.monotonic() - begun
                self._follow_clock(seconds, compiling=first == 0 and self.compiled)
                self._show(last, loss, config.batch_tokens / seconds)
                if stop or last % config.checkpoint_interval == 0:
                    self.save()
                if stop:
                    self.progress.say("interrupted: checkpoint written, continue with --resume")
                    raise KeyboardInterrupt
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this step; with several processes all must call it, and the first writes."""
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "weights": self.whole_weights(),
            "optimizer": self.optimizer.state_tensors(),
        }
        state = {
            "config": self.config.to_dict(),
            "text": self.batches.record,
            "elapsed_s": self.elapsed_s,
            "total_steps": self._total,
            "history": self.history,
        }
        if self.processes.first:
            save_checkpoint(self.folder, self.step, tensors, state)
        self.processes.wait()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Return every weight by name, the parts of all processes together; all must call it."""
        return {name: whole(p.detach()) for name, p in self.model.named_parameters()}

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
        _check_same("text", self.batches.record, found.state["text"])
        weights = found.tensors["weights"]
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                fill(p, weights[name])
        self.optimizer.load_state_tensors(found.tensors["optimizer"])
        self.step = found.step
        self.elapsed_s = found.state["elapsed_s"]
        self.history = found.state["history"]
        self._total = found.state["total_steps"]
        self.progress.say(f"resuming at step {self.step}")

    def _steps(self, last: int) -> float:
        """Train up to step `last` and give the mean loss; reading it is the only wait for the device."""
        losses = []
        while self.step < last:
            losses.append(self._one_step(self.batches.at(self.step)))
        return self.processes.mean(torch.stack(losses).mean()).item()

    def _one_step(self, batch: Batch) -> torch.Tensor:
        """Make one step; the result is this process's share of the mean loss, times the number of processes."""
        world = self.processes.world
        rows = self.processes.rows(len(batch.windows))
        mine = [None if x is None else x[rows].tensor_split(self.config.accumulation) for x in batch]
        # what the whole step counts, so that no process and no pass weighs more than its tokens
        tokens = batch.windows[:, 1:].numel() if batch.scored is None else batch.scored.sum()
        total = torch.zeros((), device=self.device)
        for i, windows in enumerate(mine[0] or ()):
            positions, scored = (None if x is None else x[i] for x in mine[1:])
            # packed documents are other shapes in each batch: compiling them again and again would never end
            nll = self._nll if positions is None else token_nll
            with self._autocast():
                found = nll(self.model, windows, positions)
            loss = (found if scored is None else found * scored).sum() * world / tokens
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.set_scale(schedule(self.step, self._total, self.config.warmup_steps))
        self.optimizer.step()
        self.step += 1
        return total

    def _evaluate(self, train_loss: float) -> None:
        with self._autocast():
            found = self.batches.measure(self.model, whole=False)
        row = {"step": self.step, "tokens": self.step * self.config.batch_tokens, "train_loss": train_loss, **found}
        self.history.append(row)
        self.progress.held_out(self.step, found)
        if self._board is not None:
            self._board.add(self.step, {"train_loss": train_loss, **found})
        with self._autocast():
            for act in self.on_measure:
                act(self.model, self.step)

    def _show(self, step: int, loss: float, tokens_per_s: float) -> None:
        mfu = None if self._per_mfu is None else tokens_per_s / self._per_mfu
        self.progress.update(step, self._total if self._total < _ENDLESS else None, loss, tokens_per_s, mfu)
        if self._board is not None:
            self._board.add(step, {"loss": loss, "tokens_per_s": tokens_per_s} | ({} if mfu is None else {"mfu": mfu}))

    def _follow_clock(self, seconds_per_step: float, *, compiling: bool) -> None:
        """With a time budget: aim the schedule at the step that the time left reaches, until that is near."""
        if self.config.minutes is None or compiling or self._total - self.step < 3 * self._per_read:
            return
        remaining = self.config.minutes * 60 - self.elapsed_s
        left = max(0, round(remaining / seconds_per_step))
        self._total = self.step + int(self.processes.agree(left, self.device))

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
