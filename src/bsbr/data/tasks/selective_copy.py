"""Selective copying: tokens strewn over blanks, to be given back in order."""

import numpy as np

from bsbr.data.tasks.config import ASK, BLANK, Examples, TaskConfig
from bsbr.data.tasks.placing import random_values, scatter

KNOBS = {"pairs": 16}


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    pairs = config.knob("pairs")
    if 2 * pairs > config.length:
        return f"{pairs} tokens and their copy need {2 * pairs} tokens. Take a longer length or fewer pairs"
    return None


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Gu and Dao, "Mamba" (arXiv 2312.00752), section 4.1.1, after Arjovsky et al. (arXiv 1511.06464).

    1. `pairs` values, drawn with repetition, at random places among blanks.
    2. `ASK`, then the values in order; each is an answer of its own.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    count = config.knob("pairs")
    tokens = np.full((n, config.length + 1), BLANK)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    asked = config.length - count
    answer[:, asked:] = np.arange(1, count + 1)
    for row in range(n):
        place, values = scatter(rng, 0, asked, 1, count), random_values(config, count, rng)
        tokens[row, place] = values
        tokens[row, asked], tokens[row, asked + 1 :] = ASK, values
        distance[row, asked:] = np.arange(asked + 1, asked + 1 + count) - place
    return Examples(tokens, answer, distance)
