"""What a waiting user sees: a bar with the time left; and a Ctrl-C that loses nothing."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bsbr.terminal import harmless

_SILENCE_S = 30.0
"""Seconds between lines in a log file, within a part."""


class EvaluationProgress:
    """A progress bar over units of work, and a flag that Ctrl-C sets.

    The first Ctrl-C lets the step under way finish; `check` then raises KeyboardInterrupt. A second one stops
    at once. Outside the main thread, where Python hands out no signals, the flag stays unset.

    Args:
        total: units of work planned.
        console: where to show; None shows nothing.
    """

    def __init__(self, total: float, console: Console | None) -> None:
        self._console = console
        self._stopping = False
        self._part = ""
        self._said = 0.0
        self._previous: Any = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None,
            speed_estimate_period=600.0,  # steps last from a second to a minute: the whole run must count
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> "EvaluationProgress":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def stage(self, part: str, detail: str) -> None:
        """Name what is being measured now.

        Args:
            part: of the run: "speed", or a text's name.
            detail: within the part.
        """
        part, detail = harmless(part), harmless(detail)
        self._bar.update(self._task, description=escape(f"{part}: {detail}"))
        # Where no bar can be drawn (a log file), a line for each part, and for steps of a long one, shows progress.
        if self._console is not None and not self._console.is_terminal:
            now, done = time.monotonic(), f"({self._bar.tasks[0].percentage:.0f} % done)"
            if part != self._part:
                self.say(f"Measuring {part} {done}")
                self._said = now
            elif now - self._said > _SILENCE_S:
                self.say(f"  {detail} {done}")
                self._said = now
        self._part = part

    def advance(self, units: float) -> None:
        """Count work as done.

        Args:
            units: of the total given at the start.
        """
        self._bar.advance(self._task, units)

    def say(self, text: str) -> None:
        """Write one line that stays.

        Args:
            text: a line.
        """
        if self._console is not None:
            self._bar.console.print(harmless(text), markup=False, highlight=False)

    def check(self) -> None:
        """Stop here if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self._stopping:
            raise KeyboardInterrupt

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        self._stopping = True
        self.say("Stopping after this step; press Ctrl-C again to stop at once.")
