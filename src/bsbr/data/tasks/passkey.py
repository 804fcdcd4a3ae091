"""Passkey: one number somewhere in a long text, asked for at its end."""

import numpy as np

from bsbr.data.tasks.config import ASK, OPEN, Examples, TaskConfig
from bsbr.data.tasks.placing import haystack, no_place, random_values, starts

KNOBS = {"digits": 5}


def _starts(config: TaskConfig) -> np.ndarray:
    size = config.knob("digits") + 1
    return starts(config, item=size, tail=size, lead=1, tail_lead=1)


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    return no_place(config, _starts(config), 2 * config.knob("digits") + 1)


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300), in tokens instead of sentences.

    1. Filler, with `OPEN d1 ... dD` at a random place: D digits drawn from the values.
    2. At the end `ASK d1 ... dD`; the D digits are one answer.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    digits, places, tokens = config.knob("digits"), _starts(config), haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    asked = config.length - digits
    answer[:, asked:] = 1
    row = np.arange(n)[:, None]
    start = rng.choice(places, size=(n, 1))
    values = random_values(config, n * digits, rng).reshape(n, digits)
    tokens[row, start], tokens[row, start + 1 + np.arange(digits)] = OPEN, values
    tokens[:, asked], tokens[:, asked + 1 :] = ASK, values
    distance[:, asked] = asked - start[:, 0]
    return Examples(tokens, answer, distance)
