"""The impossible task: uniform noise, of which nobody can predict anything."""

import numpy as np

from bsbr.data.tasks.config import Examples, TaskConfig

KNOBS: dict[str, int] = {}


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists: there always is one."""
    return None


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples: tokens drawn independently and uniformly from the whole vocabulary.

    The best loss of a causal model is ln(vocab) at every token. A lower one on fresh noise says that the model sees
    the token it is to predict: a leak.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples; every token but the first is an answer of its own.
    """
    tokens = rng.integers(config.vocab, size=(n, config.length + 1))
    answer = np.tile(np.arange(1, config.length + 1), (n, 1))
    return Examples(tokens, answer, np.zeros((n, config.length), dtype=np.int64))
