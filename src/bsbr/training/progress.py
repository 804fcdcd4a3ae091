"""Training progress: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from bsbr.terminal import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class TrainingProgress:
    """Shows step, losses and tokens per second; a context manager that leaves the terminal as it found it.

    Args:
        console: where to write; standard error when None. rich is needed for a terminal only.
        line_interval_s: seconds between plain lines where there is no terminal.
    """

    def __init__(self, console: "Console | None" = None, *, line_interval_s: float = 10.0) -> None:
        if console is None and sys.stderr.isatty():
            from rich.console import Console

            console = Console(stderr=True, highlight=False)
        self._console = console
        self._line_interval_s = line_interval_s
        self._next_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._held_out = ""

    def __enter__(self) -> "TrainingProgress":
        if self._console is not None and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Write one line that stays."""
        message = harmless(message)
        if self._console is None:
            print(message, file=sys.stderr, flush=True)
        else:
            self._console.print(message, markup=False, soft_wrap=True)

    def keep(self, text: str) -> None:
        """Show a few words beside the bar until others come."""
        self._held_out = f" | {text}"

    def held_out(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the held-out figures of a step, and keep the loss beside the bar.

        Args:
            step: finished steps.
            figures: `held_out_nll`, and `bits_per_byte` or `accuracy`.
        """
        nll = figures["held_out_nll"]
        self.keep(f"held-out {nll:.3f}")
        line = f"step {step}: held-out loss {nll:.4f} nats per token"
        if "bits_per_byte" in figures:
            line += f", {figures['bits_per_byte']:.4f} bits per byte"
        if "accuracy" in figures:
            line += f", accuracy {figures['accuracy']:.2%}"
        self.say(line)

    def update(
        self, step: int, total_steps: int | None, loss: float, tokens_per_s: float, mfu: float | None = None
    ) -> None:
        """Show the state after `step` of (about) `total_steps` steps; None while nobody knows.

        Args:
            step, total_steps: finished, and of the whole run.
            loss: of the last steps.
            tokens_per_s: of the last steps.
            mfu: share of the device's peak, where that is known.
        """
        of = "" if total_steps is None else f"/{total_steps}"
        text = f"step {step}{of} | loss {loss:.3f}{self._held_out} | {tokens_per_s:,.0f} tokens/s"
        if mfu is not None:
            text += f" | MFU {mfu:.1%}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text, completed=step, total=total_steps)
        elif time.monotonic() >= self._next_line or step == total_steps:
            self.say(text)
            self._next_line = time.monotonic() + self._line_interval_s


def _bar(console: "Console") -> "Progress":
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
