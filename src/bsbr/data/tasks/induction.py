"""Induction: what followed a mark when it was last seen."""

import numpy as np

from bsbr.data.tasks.config import OPEN, Examples, TaskConfig
from bsbr.data.tasks.placing import haystack, no_place, random_values, starts

KNOBS: dict[str, int] = {}


def _starts(config: TaskConfig) -> np.ndarray:
    return starts(config, item=2, tail=2, lead=1, tail_lead=1)


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    return no_place(config, _starts(config), 3)


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 4.1.2, after Olsson et al. (arXiv 2209.11895).

    1. Filler, with `OPEN value` once, at a random place.
    2. At the end `OPEN value` again; the value is the answer.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    places, tokens = _starts(config), haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    answer[:, -1] = 1
    start, values = rng.choice(places, size=n), random_values(config, n, rng)
    row = np.arange(n)
    tokens[row, start], tokens[row, start + 1] = OPEN, values
    tokens[:, -2], tokens[:, -1] = OPEN, values
    distance[:, -1] = config.length - (start + 1)
    return Examples(tokens, answer, distance)
