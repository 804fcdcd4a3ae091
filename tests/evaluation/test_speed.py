"""Timing is interleaved and paired; memory is what a call really touched."""

import time
from collections.abc import Callable

import pytest
import torch

from bsbr.evaluation.speed import (
    SpeedSettings,
    batch_for,
    memory_method,
    peak_bytes,
    speedup_estimate,
    time_calls,
    time_estimate,
)


def test_contenders_are_interleaved_there_and_back() -> None:
    order: list[str] = []

    def contender(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    calls = {name: contender(name) for name in "abc"}
    samples = time_calls(calls, SpeedSettings(rounds=2, warmup=1, min_sample_s=0.0))
    assert "".join(order) == "abc" + 2 * "abccba"
    assert all(len(values) == 4 for values in samples.values())


def test_times_and_ratios_are_those_of_the_calls() -> None:
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.01)}
    samples = time_calls(calls, SpeedSettings(rounds=3, warmup=1, min_sample_s=0.0))
    assert time_estimate(samples["fast"]).value == pytest.approx(0.01, rel=0.5)
    ratio = speedup_estimate(samples["slow"], samples["fast"])
    assert ratio.value == pytest.approx(2, rel=0.3)
    assert ratio.low <= ratio.value <= ratio.high


def test_short_calls_are_repeated_within_a_sample() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)

    samples = time_calls({"a": call}, SpeedSettings(rounds=1, warmup=1, min_sample_s=0.01))
    assert count > 5
    assert max(samples["a"]) < 0.01


def test_drift_within_a_round_cancels() -> None:
    """A machine that slows down steadily: a b b a gives both the same sum."""
    base, other = [1.0, 4.0, 5.0, 8.0], [2.0, 3.0, 6.0, 7.0]
    assert speedup_estimate(base, other).value == 1.0


@pytest.mark.parametrize("least", [1, 3])
def test_rounds_are_cut_to_the_budget_but_not_below_the_least(least: int) -> None:
    settings = SpeedSettings(rounds=50, warmup=1, min_sample_s=0.0, budget_s=0.01, least_rounds=least)
    samples = time_calls({"a": lambda: time.sleep(0.01)}, settings)
    assert len(samples["a"]) == 2 * least


@pytest.mark.skipif(memory_method() is None, reason="this system has no counter of peak memory")
def test_peak_memory_sees_what_a_call_touches_and_frees() -> None:
    size = 64 * 2**20

    def call() -> int:
        return len(torch.ones(size // 4))

    assert peak_bytes(call) == pytest.approx(size, rel=0.1)
    assert peak_bytes(lambda: None) < size / 8


def test_batches_of_the_published_regime() -> None:
    lengths = (128, 256, 512, 1024, 2048, 4096)
    assert [batch_for("fixed_tokens", n, fixed_tokens=2048) for n in lengths] == [16, 8, 4, 2, 1, 1]
    assert [batch_for("fixed_batch", n, fixed_tokens=2048) for n in lengths] == [1] * 6


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds"):
        SpeedSettings(rounds=0)
