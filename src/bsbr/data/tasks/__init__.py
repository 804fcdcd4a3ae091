"""Synthetic long-context tasks: pure functions of a config, a number of examples and a seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bsbr.data.tasks import (
    impossible,
    induction,
    key_value,
    mqar,
    needle,
    passkey,
    selective_copy,
    variable_tracking,
)
from bsbr.data.tasks.config import Examples, TaskConfig

__all__ = ["TASKS", "Examples", "Task", "TaskConfig", "generate"]


class Task(NamedTuple):
    """One row of `TASKS`."""

    generate: Callable[[TaskConfig, int, np.random.Generator], Examples]
    """Makes examples."""
    impossible: Callable[[TaskConfig], str | None]
    """Says why no example of a config exists, or None."""
    knobs: Mapping[str, int]
    """The numbers it has, and their defaults."""
    places: bool
    """There is one asked fact, which distance and straddle place."""


TASKS = {
    "mqar": Task(mqar.generate, mqar.impossible, mqar.KNOBS, False),
    "passkey": Task(passkey.generate, passkey.impossible, passkey.KNOBS, True),
    "needle": Task(needle.generate, needle.impossible, needle.SINGLE, True),
    "needle_multikey": Task(needle.generate, needle.impossible, needle.MULTIKEY, True),
    "needle_multiquery": Task(needle.generate, needle.impossible, needle.MULTIQUERY, False),
    "variable_tracking": Task(variable_tracking.generate, variable_tracking.impossible, variable_tracking.KNOBS, False),
    "key_value": Task(key_value.generate, key_value.impossible, key_value.KNOBS, True),
    "selective_copy": Task(selective_copy.generate, selective_copy.impossible, selective_copy.KNOBS, False),
    "induction": Task(induction.generate, induction.impossible, induction.KNOBS, True),
    "impossible": Task(impossible.generate, impossible.impossible, impossible.KNOBS, False),
}
"""Every task by name."""


def generate(config: TaskConfig, n: int, seed: int | Sequence[int]) -> Examples:
    """Generate examples of a task.

    Args:
        config: the task.
        n: examples.
        seed: one number or several, as numpy's `default_rng` takes them: the same ones give the same examples.
    Returns:
        The examples.

    Example:
        >>> found = generate(TaskConfig(task="induction", length=16, vocab=64), 2, seed=0)
        >>> found.tokens.shape, found.answer.sum()
        ((2, 17), np.int64(2))
    """
    return TASKS[config.task].generate(config, n, np.random.default_rng(seed))
