"""Synthetic tasks: what stands where it is asked for, at any sizes, and sizes that cannot be are refused at once."""

import time

import numpy as np
import pytest

from bsbr.data.tasks import TASKS, TaskConfig, generate
from bsbr.data.tasks.config import ASK, OPEN

SMALL = {"length": 96, "vocab": 200}


def _tokens_that_answer(tokens, answer, row):
    """Answer number to the tokens that belong to it."""
    return {i: tokens[row, 1:][answer[row] == i] for i in range(1, answer[row].max() + 1)}


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"impossible"}))
def test_every_answer_stands_earlier_at_the_distance_said(task):
    config = TaskConfig(task=task, **SMALL)
    tokens, answer, distance = generate(config, 20, seed=3)
    assert tokens.shape == (20, 97)
    assert answer.shape == distance.shape == (20, 96)
    assert tokens.min() >= 0
    assert tokens.max() < 200
    assert (answer.max(1) >= 1).all()
    for row in range(20):
        for number, wanted in _tokens_that_answer(tokens, answer, row).items():
            first = np.flatnonzero(answer[row] == number)[0]
            assert distance[row, first] > 0
            stood = first + 1 - distance[row, first]
            assert (tokens[row, stood : stood + len(wanted)] == wanted).all()
    others = np.ones_like(distance, dtype=bool)
    row, first = (distance > 0).nonzero()
    others[row, first] = False
    assert not distance[others].any()
    assert (distance > 0).sum() == answer.max(1).sum()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_seed_alone_decides(task):
    config, state = TaskConfig(task=task, **SMALL), np.random.get_state()[1].copy()
    one, again, other = (generate(config, 3, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert (one.tokens != other.tokens).any()
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.places])
def test_distance_and_straddle_place_the_fact(task):
    pairs = {"pairs": 20} if task == "key_value" else {}
    config = TaskConfig(task=task, **SMALL, distance=(40, 70), straddle=18, **pairs)
    tokens, _, distance = generate(config, 40, seed=0)
    asked = distance[distance > 0]
    assert ((asked >= 40) & (asked <= 70)).all()
    size = {"passkey": 6, "needle": 3, "needle_multikey": 3, "key_value": 4, "induction": 2}[task]
    lead = {"needle": 2, "needle_multikey": 2, "key_value": 2}.get(task, 1)
    first = (distance > 0).argmax(1) + 1 - asked - lead
    assert (first // 18 != (first + size - 1) // 18).all()
    if task != "key_value":
        assert (tokens[np.arange(40), first] == OPEN).all()


def test_every_pair_of_mqar_is_asked_once():
    tokens, answer, _ = generate(TaskConfig(task="mqar", length=64, vocab=200, pairs=16), 8, seed=0)
    for row in range(8):
        known = dict(zip(tokens[row, :32:2], tokens[row, 1:32:2], strict=True))
        asked = np.flatnonzero(answer[row])
        assert len(known) == len(asked) == 16
        assert sorted(tokens[row, asked]) == sorted(known)
        assert all(tokens[row, i + 1] == known[tokens[row, i]] for i in asked)


def test_a_chain_leads_from_the_question_to_the_value():
    tokens, _, _ = generate(TaskConfig(task="variable_tracking", pairs=3, hops=4, **SMALL), 8, seed=0)
    for row in tokens:
        assert row[-3] == ASK
        older = {row[i + 1]: row[i + 2] for i in range(94) if row[i] in (2, 3)}
        name, steps = row[-2], 0
        while name in older:
            name, steps = older[name], steps + 1
        assert (name, steps) == (row[-1], 5)


def test_facts_lie_anywhere_and_every_needle_can_be_asked():
    _, _, distance = generate(TaskConfig(task="needle_multikey", length=32, vocab=200, pairs=3), 400, seed=0)
    assert set(distance[distance > 0]) == set(range(3, 31))


def _made(task, options):
    """The config, or None and the message."""
    try:
        return TaskConfig(task=task, **options), ""
    except ValueError as error:
        return None, str(error)


def test_2000_combinations_give_examples_or_one_line_at_once():
    rng, begun, refused = np.random.default_rng(0), time.perf_counter(), 0
    names = sorted(TASKS)
    for i in range(2000):
        task = names[i % len(names)]
        options = {"length": int(rng.integers(1, 200)), "vocab": int(rng.choice([5, 20, 100, 1024]))}
        options |= {knob: int(rng.integers(0, 40)) for knob in TASKS[task].knobs if rng.random() < 0.7}
        if TASKS[task].places and rng.random() < 0.5:
            options["distance"] = tuple(sorted(int(x) for x in rng.integers(0, 200, 2)))
        if TASKS[task].places and rng.random() < 0.5:
            options["straddle"] = int(rng.integers(1, 80))
        config, said = _made(task, options)
        if config is None:
            refused += 1
            assert "\n" not in said
            assert any(word in said for word in ("must", "Take", "Widen", "too small")), said
            continue
        tokens, answer, distance = generate(config, 2, seed=i)
        assert tokens.shape == (2, config.length + 1)
        assert tokens.min() >= 0
        assert tokens.max() < config.vocab
        assert (answer.max(1) >= 1).all()
        if config.distance is not None:
            low, high = config.distance
            assert ((distance[distance > 0] >= low) & (distance[distance > 0] <= high)).all()
    assert 200 < refused < 1800
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "juggling"}, "Choose one of mqar"),
        ({"pairs": 30}, r"task mqar at length 96: 30 pairs and their questions need 119 tokens"),
        ({"pairs": 90}, "need as many keys"),
        ({"hops": 2}, "task mqar has no hops"),
        ({"distance": (1, 2)}, "no single fact to place"),
        ({"task": "passkey", "distance": (5, 2)}, "1 <= least <= most"),
        ({"task": "passkey", "distance": (500, 600)}, "no place for the fact obeys"),
        ({"task": "passkey", "length": 4}, "need 11 tokens"),
        ({"task": "needle_multiquery", "queries": 9}, "more than 8 needles"),
        ({"vocab": 4}, "too small"),
        ({"length": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_says_why(changes, said):
    with pytest.raises(ValueError, match=said):
        TaskConfig(**{"task": "mqar", **SMALL, **changes})


def test_a_config_survives_json():
    import json

    config = TaskConfig(task="passkey", distance=(20, 40), **SMALL)
    assert TaskConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown task setting 'lenght'"):
        TaskConfig.from_dict({"task": "mqar", "lenght": 3})
