"""Where the facts of an example stand: drawn directly, so that no choice of sizes can make the drawing hang."""

import numpy as np

from bsbr.data.tasks.config import TaskConfig


def starts(config: TaskConfig, *, item: int, tail: int, lead: int, tail_lead: int, others: int = 0) -> np.ndarray:
    """List the places where the asked fact may begin.

    Args:
        config: the task; its distance and straddle are obeyed.
        item: tokens of a fact.
        tail: tokens of the question and its answer, which end the example.
        lead: tokens of a fact before its value.
        tail_lead: tokens of the question before its answer.
        others: further facts of the same size that must find room before or behind.
    Returns:
        Positions, ascending; empty where there is none.
    """
    room = config.length + 1 - tail
    found = np.arange(max(0, room - item + 1))
    fits = found // item + (room - item - found) // item >= others
    if config.distance is not None:
        away = room + tail_lead - (found + lead)
        fits &= (away >= config.distance[0]) & (away <= config.distance[1])
    if config.straddle is not None:
        fits &= found // config.straddle != (found + item - 1) // config.straddle
    return found[fits]


def distinct(rng: np.random.Generator, rows: int, of: int, count: int) -> np.ndarray:
    """Draw different numbers for each of many rows, in random order, each draw as likely as another.

    Args:
        rng: source of the draw.
        rows: how many draws.
        of: numbers to draw from, 0 to of - 1.
        count: numbers of a draw; at most `of`.
    Returns:
        [rows, count].

    Example:
        >>> sorted(distinct(np.random.default_rng(0), 1, 4, 4)[0].tolist())
        [0, 1, 2, 3]
    """
    rank = rng.random((rows, of))
    if count < of:  # the least ranks, as a full sort would have them but faster
        least = rank.argpartition(max(count - 1, 0), axis=1)[:, :count]
    else:
        least = np.broadcast_to(np.arange(of), (rows, of))
    order = np.take_along_axis(rank, least, 1).argsort(1)
    return np.take_along_axis(least, order, 1)


def scatter_rows(rng: np.random.Generator, rows: int, first: int, last: int, item: int, count: int) -> np.ndarray:
    """Draw places as `scatter` does, for each of many rows.

    Args:
        rng: source of the draw.
        rows: how many draws.
        first, last: the items lie in positions first to last - 1.
        item: tokens of an item.
        count: items of a row; they must fit.
    Returns:
        Where each begins, ascending in a row, [rows, count].

    Example:
        >>> scatter_rows(np.random.default_rng(0), 2, 0, 6, 3, 2)
        array([[0, 3],
               [0, 3]])
    """
    cells = np.sort(distinct(rng, rows, last - first - item * count + count, count), axis=1)
    return first + cells + np.arange(count) * (item - 1)


def scatter(rng: np.random.Generator, first: int, last: int, item: int, count: int) -> np.ndarray:
    """Draw places for items that do not overlap, each arrangement as likely as another.

    Args:
        rng: source of the draw.
        first, last: the items lie in positions first to last - 1.
        item: tokens of an item.
        count: items; they must fit.
    Returns:
        Where each begins, ascending, [count].

    Example:
        >>> scatter(np.random.default_rng(0), 0, 6, 3, 2)
        array([0, 3])
    """
    free = last - first - item * count
    # distinct cells among the free ones and the items: every arrangement once
    cells = np.sort(rng.choice(free + count, size=count, replace=False)) if count else np.empty(0, dtype=np.int64)
    return first + cells + np.arange(count) * (item - 1)


def scatter_around(rng: np.random.Generator, room: int, item: int, start: int, others: int) -> np.ndarray:
    """Draw places for items around one whose place is given.

    Args:
        rng: source of the draw.
        room: the items lie in positions 0 to room - 1.
        item: tokens of an item.
        start: where the given one begins.
        others: further items; they must fit.
    Returns:
        Where each begins, the given one first, [others + 1].
    """
    behind = (room - start - item) // item
    before = int(rng.integers(max(0, others - behind), min(others, start // item) + 1))
    return np.concatenate(
        [[start], scatter(rng, 0, start, item, before), scatter(rng, start + item, room, item, others - before)]
    ).astype(np.int64)


def haystack(config: TaskConfig, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw filler, independent and uniform over its words, [n, length + 1]."""
    return rng.integers(config.filler, config.filler + config.words, (n, config.length + 1))


def distinct_keys(config: TaskConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` different keys, [count]."""
    return config.keys + rng.choice(config.words, size=count, replace=False)


def random_values(config: TaskConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` values with repetition, [count]."""
    return config.values + rng.integers(config.words, size=count)


def no_place(config: TaskConfig, found: np.ndarray, least: int) -> str | None:
    """Say in a few words why there is no place for the asked fact, or None where there is one.

    Args:
        config: the task.
        found: from `starts`.
        least: the shortest length that has room, distance and straddle apart.
    """
    if len(found):
        return None
    if config.length < least:
        return f"its facts and question need {least} tokens. Take a longer length or fewer facts"
    return "no place for the fact obeys distance and straddle. Widen distance, or leave one of them out"
