"""Needles in a haystack: one, one of several, several of several."""

import numpy as np

from bsbr.data.tasks.config import ASK, OPEN, Examples, TaskConfig
from bsbr.data.tasks.placing import distinct, haystack, no_place, random_values, scatter_around, scatter_rows, starts

SINGLE = {"digits": 1}
MULTIKEY = {"pairs": 8, "digits": 1}
MULTIQUERY = {"pairs": 8, "queries": 4, "digits": 1}


def _numbers(config: TaskConfig) -> tuple[int, int, int]:
    """Needles, questions, tokens of a needle."""
    return config.pairs or 1, config.queries or 1, config.knob("digits") + 2


def _starts(config: TaskConfig) -> np.ndarray:
    needles, queries, size = _numbers(config)
    return starts(config, item=size, tail=queries * size, lead=2, tail_lead=2, others=needles - 1)


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    needles, queries, size = _numbers(config)
    if queries > needles:
        return f"{queries} queries ask for more than {needles} needles. Take fewer queries or more pairs"
    if needles > config.words:
        return f"{needles} needles need as many keys, vocab {config.vocab} has {config.words}. Take a larger vocab"
    return no_place(config, _starts(config), (needles + queries) * size - 1)


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Hsieh et al., "RULER" (arXiv 2404.06654): single, multi-key and multi-query needles, in tokens.

    1. Filler, with `pairs` needles `OPEN key v1 ... vD` that do not overlap: different keys, values drawn with
       repetition. The task `needle` has one.
    2. At the end `ASK key v1 ... vD` for `queries` of the needles, drawn without repetition; each is an answer.

    Distance and straddle, for tasks with one question, are those of the needle asked for.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    needles, queries, size = _numbers(config)
    room, digits, tokens = config.length + 1 - queries * size, size - 2, haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    if queries == 1:
        places = rng.choice(_starts(config), size=n)
        begin = np.stack([scatter_around(rng, room, size, int(place), needles - 1) for place in places])
    else:
        begin = rng.permuted(scatter_rows(rng, n, 0, room, size, needles), axis=1)
    text = np.empty((n, needles, size), dtype=np.int64)
    text[..., 0], text[..., 1] = OPEN, config.keys + distinct(rng, n, config.words, needles)
    text[..., 2:] = random_values(config, n * needles * digits, rng).reshape(n, needles, digits)
    row = np.arange(n)[:, None, None]
    tokens[row, begin[..., None] + np.arange(size)] = text
    asked = text[:, :queries].copy()
    asked[..., 0] = ASK
    tokens[:, room:] = asked.reshape(n, -1)
    for i in range(queries):
        first = room + i * size + 1  # the key, after which the value is predicted
        answer[:, first : first + digits] = i + 1
        distance[:, first] = first + 1 - (begin[:, i] + 2)
    return Examples(tokens, answer, distance)
