"""Scaling fits recover what made the timings, and say when they extrapolate."""

import numpy as np
import pytest

from bsbr.evaluation.exponents import crossover, fit_scaling, local_slopes, loglog_slope, physical_fit

LENGTHS = [128 * 2**step for step in range(8)]


def timings(
    exponent: float,
    coefficient: float,
    constant: float,
    *,
    noise: float = 0.02,
    seed: int = 0,
    repeats: int = 8,
) -> dict[int, list[float]]:
    generator = np.random.default_rng(seed)
    return {
        n: list((constant + coefficient * n**exponent) * np.exp(noise * generator.standard_normal(repeats)))
        for n in LENGTHS
    }


@pytest.mark.parametrize(("exponent", "coefficient"), [(1.0, 1e-4), (1.5, 3e-6), (2.0, 1e-7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_exponent_is_recovered(exponent: float, coefficient: float, seed: int) -> None:
    fit = fit_scaling(timings(exponent, coefficient, 0.02, seed=seed), resamples=40)
    estimate = fit.estimate("exponent")
    assert estimate.value == pytest.approx(exponent, abs=0.02)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.high - estimate.low < 0.04
    assert fit.curve.constant_s == pytest.approx(0.02, rel=0.2)
    assert fit.curve.time_s(4096) == pytest.approx(0.02 + coefficient * 4096**exponent, rel=0.03)


def test_interval_covers_the_exponent() -> None:
    runs, hits = 60, 0
    for seed in range(runs):
        fit = fit_scaling(timings(2.0, 1e-7, 0.02, seed=1000 + seed), seed=seed)
        estimate = fit.estimate("exponent")
        hits += estimate.low <= 2 <= estimate.high
    assert hits / runs >= 0.85  # 94.5 % of 1,500 runs; three standard deviations of 60


def test_straight_line_is_bent_by_the_constant() -> None:
    """What the published exponents suffered from: with a floor of 20 ms a linear cost looks almost free."""
    samples = {n: t for n, t in timings(1.0, 2e-5, 0.05).items() if n <= 1024}
    assert loglog_slope(samples, resamples=20).high < 0.3
    assert fit_scaling(timings(1.0, 2e-5, 0.05), resamples=2).curve.exponent == pytest.approx(1, abs=0.05)


def test_outliers_do_not_move_the_fit() -> None:
    samples = timings(1.0, 1e-4, 0.02)
    for values in samples.values():
        values[0] *= 3
    assert fit_scaling(samples, resamples=2).curve.exponent == pytest.approx(1, abs=0.03)


def test_crossover_inside_the_range() -> None:
    base = fit_scaling(timings(2.0, 1e-8, 0.005), resamples=30)
    other = fit_scaling(timings(1.0, 2e-5, 0.01, seed=1), resamples=30)
    # 0.005 + 1e-8 n^2 = 0.01 + 2e-5 n has its positive root here.
    truth = (2e-5 + (4e-10 + 4 * 1e-8 * 0.005) ** 0.5) / 2e-8
    found, extrapolated = crossover(base, other)
    assert found.value == pytest.approx(truth, rel=0.05)
    assert found.low < truth * 1.05
    assert found.high > truth * 0.95
    assert not extrapolated


def test_crossover_outside_the_range_is_extrapolated() -> None:
    base = fit_scaling(timings(2.0, 1e-9, 0.005, noise=0), resamples=3)
    other = fit_scaling(timings(1.0, 4e-5, 0.005, noise=0), resamples=3)
    found, extrapolated = crossover(base, other)
    assert found.value == pytest.approx(40_000, rel=0.02)
    assert extrapolated


def test_no_crossover_is_said() -> None:
    base = fit_scaling(timings(1.0, 1e-5, 0.005, noise=0), resamples=3)
    slower = fit_scaling(timings(1.0, 2e-5, 0.01, noise=0), resamples=3)
    assert crossover(base, slower) == (None, False)
    assert crossover(slower, base) == (None, False)


def test_physical_model_names_the_quadratic_term() -> None:
    found = physical_fit(timings(2.0, 1e-7, 0.02, noise=0))
    assert found["quadratic"] == pytest.approx(1e-7, rel=1e-3)
    assert found["constant_s"] == pytest.approx(0.02, rel=1e-3)
    assert found["relative_error"] < 1e-6


def test_too_few_lengths_give_no_fit() -> None:
    samples = {n: t for n, t in timings(1.0, 1e-4, 0.02).items() if n <= 512}
    assert len(samples) == 3
    assert fit_scaling(samples) is None
    assert physical_fit(samples) is None
    assert loglog_slope({128: [1.0]}) is None
    assert [length for length, _ in local_slopes(samples)] == [256, 512]


def test_impossible_times_are_refused() -> None:
    with pytest.raises(ValueError, match="positive seconds"):
        fit_scaling({n: [0.0] for n in LENGTHS})
