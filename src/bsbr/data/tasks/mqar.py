"""Multi-query associative recall: many pairs, each asked for once."""

import numpy as np

from bsbr.data.tasks.config import Examples, TaskConfig
from bsbr.data.tasks.placing import distinct, haystack, random_values, scatter_rows

KNOBS = {"pairs": 8}


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    pairs = config.knob("pairs")
    if pairs > config.words:
        return f"{pairs} pairs need as many keys, vocab {config.vocab} has {config.words}. Take a larger vocab"
    if 4 * pairs > config.length + 1:
        return f"{pairs} pairs and their questions need {4 * pairs - 1} tokens. Take a longer length or fewer pairs"
    return None


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (arXiv 2312.04927).
    Here questions lie anywhere behind the pairs with equal probability, and what lies between is filler.

    1. `k1 v1 k2 v2 ...`: `pairs` different keys, each with a value drawn with repetition.
    2. Behind them, each key once more with its value, in random order at random places; filler elsewhere.
    3. The value after each repeated key is an answer of its own.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    pairs, tokens = config.knob("pairs"), haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    row = np.arange(n)[:, None]
    keys = config.keys + distinct(rng, n, config.words, pairs)
    values = random_values(config, n * pairs, rng).reshape(n, pairs)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    order = rng.permuted(np.broadcast_to(np.arange(pairs), (n, pairs)), axis=1)
    asked = scatter_rows(rng, n, 2 * pairs, config.length + 1, 2, pairs)
    tokens[row, asked], tokens[row, asked + 1] = keys[row, order], values[row, order]
    answer[row, asked] = np.arange(1, pairs + 1)
    distance[row, asked] = asked + 1 - (2 * order + 1)
    return Examples(tokens, answer, distance)
