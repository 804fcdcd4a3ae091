"""Key-value retrieval: a context that is nothing but pairs, and one key asked for."""

import numpy as np

from bsbr.data.tasks.config import ASK, Examples, TaskConfig
from bsbr.data.tasks.placing import haystack, no_place, random_values, starts

KNOBS = {"pairs": 8, "digits": 2}

_MOST_KEYS = 1 << 40


def _starts(config: TaskConfig) -> np.ndarray:
    """Where the asked pair may begin: pairs stand side by side, just before the question."""
    pairs, digits = config.knob("pairs"), config.knob("digits")
    found = starts(config, item=2 * digits, tail=2 * digits + 1, lead=digits, tail_lead=digits + 1)
    first = config.length - 2 * digits * (pairs + 1)
    return found[(found >= first) & ((found - first) % (2 * digits) == 0)] if first >= 0 else found[:0]


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    pairs, digits = config.knob("pairs"), config.knob("digits")
    if pairs > min(config.words**digits, _MOST_KEYS):
        return f"{pairs} pairs need as many keys, {config.words} words give {config.words**digits}. Take more digits"
    return no_place(config, _starts(config), 2 * digits * (pairs + 1))


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Liu et al., "Lost in the Middle" (arXiv 2307.03172), section 3: JSON of random keys and values, in tokens.

    1. `pairs` pairs side by side, each `k1 ... kD v1 ... vD`: keys differ, but may share tokens. Filler before them
       where the length leaves room.
    2. At the end `ASK k1 ... kD v1 ... vD` for one of them; its D value tokens are the answer.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    pairs, digits, places = config.knob("pairs"), config.knob("digits"), _starts(config)
    tokens = haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    first, asked = config.length - 2 * digits * (pairs + 1), config.length - digits
    answer[:, asked:] = 1
    for row in range(n):
        numbers = rng.choice(min(config.words**digits, _MOST_KEYS), size=pairs, replace=False)
        keys = config.keys + numbers[:, None] // config.words ** np.arange(digits) % config.words
        text = np.concatenate([keys, random_values(config, pairs * digits, rng).reshape(pairs, digits)], 1)
        tokens[row, first : first + text.size] = text.ravel()
        start = int(rng.choice(places))
        tokens[row, asked - digits] = ASK
        tokens[row, asked - digits + 1 :] = text[(start - first) // (2 * digits)]
        distance[row, asked] = asked + 1 - (start + digits)
    return Examples(tokens, answer, distance)
