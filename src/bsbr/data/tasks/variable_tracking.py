"""Variable tracking: names given on from one to the next, and the question what the last one stands for."""

import numpy as np

from bsbr.data.tasks.config import ASK, LINK, OPEN, Examples, TaskConfig
from bsbr.data.tasks.placing import distinct_keys, haystack, random_values, scatter

KNOBS = {"pairs": 2, "hops": 2}

_STATEMENT = 3


def impossible(config: TaskConfig) -> str | None:
    """Say why no example exists, or None."""
    names = config.knob("pairs") * (config.knob("hops") + 1)
    if names > config.words:
        return f"its chains need {names} names, vocab {config.vocab} has {config.words}. Take a larger vocab"
    least = _STATEMENT * (names + 1) - 1
    if config.length < least:
        return f"its {names} statements and question need {least} tokens. Take a longer length or fewer chains or hops"
    return None


def generate(config: TaskConfig, n: int, rng: np.random.Generator) -> Examples:
    """Generate examples.

    Source: Hsieh et al., "RULER" (arXiv 2404.06654), variable tracking, in tokens; the question is for the value, not
    for all names.

    1. `pairs` chains of statements: `OPEN name value`, then `hops` times `LINK name older-name`, each of which gives
       the value of the name before to a new one.
    2. The statements of a chain stand in order, those of different chains mixed, at random places in filler.
    3. At the end `ASK name value` for the last name of a random chain; distance counts from where the value stood.

    Args:
        config: the task.
        n: examples.
        rng: source of every draw.
    Returns:
        The examples.
    """
    chains, links = config.knob("pairs"), config.knob("hops") + 1
    tokens = haystack(config, n, rng)
    answer, distance = (np.zeros((n, config.length), dtype=np.int64) for _ in range(2))
    room = config.length + 1 - _STATEMENT
    for row in range(n):
        names = distinct_keys(config, chains * links, rng).reshape(chains, links)
        values = random_values(config, chains, rng)
        begin = scatter(rng, 0, room, _STATEMENT, chains * links)
        chain = rng.permutation(np.repeat(np.arange(chains), links))  # which chain goes on at each statement
        place = np.stack([begin[chain == i] for i in range(chains)])  # [chains, links]
        older = np.column_stack([values, names[:, :-1]])
        kind = np.full((chains, links), LINK)
        kind[:, 0] = OPEN
        tokens[row, place[..., None] + np.arange(_STATEMENT)] = np.stack([kind, names, older], -1)
        asked = int(rng.integers(chains))
        tokens[row, room:] = ASK, names[asked, -1], values[asked]
        answer[row, -1] = 1
        distance[row, -1] = config.length - (place[asked, 0] + 2)
    return Examples(tokens, answer, distance)
