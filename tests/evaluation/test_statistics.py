"""Intervals cover what they say they cover; estimates are the formulas of their sources."""

import numpy as np
import pytest

from bsbr.evaluation.statistics import paired_bootstrap, quantiles, ratio_mean, wilson


def test_clustered_interval_covers_the_truth_where_documents_differ() -> None:
    """Documents of ragged length with their own mean: nominal 95 % covers 93-97 %."""
    generator = np.random.default_rng(0)
    runs, documents, truth = 4000, 40, 3.0
    counts = np.maximum(50, generator.lognormal(6.0, 0.5, (runs, documents)).astype(int))
    means = truth + 0.4 * generator.standard_normal((runs, documents))
    sums = counts * means + 2.5 * np.sqrt(counts) * generator.standard_normal((runs, documents))
    hits = 0
    for s, n in zip(sums, counts, strict=True):
        estimate = ratio_mean(s, n)
        hits += estimate.low <= truth <= estimate.high
    assert 0.93 <= hits / runs <= 0.97


def test_paired_bootstrap_covers_the_difference() -> None:
    generator = np.random.default_rng(1)
    runs, documents = 600, 40
    hits = 0
    for _ in range(runs):
        n = np.maximum(50, generator.lognormal(6.0, 0.5, documents)).astype(int)
        common = generator.standard_normal(documents)
        own = 0.1 + 0.05 * generator.standard_normal(documents)
        estimate = paired_bootstrap(n * common, n * (common + own), n, resamples=2000)
        hits += estimate.low <= 0.1 <= estimate.high
    assert 0.91 <= hits / runs <= 0.98


def test_tokens_taken_as_independent_would_be_far_too_sure() -> None:
    """The document-clustered interval is several times that of independent tokens on the same data."""
    generator = np.random.default_rng(2)
    counts = np.full(40, 1000)
    sums = counts * (3 + 0.4 * generator.standard_normal(40))
    estimate = ratio_mean(sums, counts)
    independent = 1.96 * 2.5 / np.sqrt(counts.sum())
    assert (estimate.high - estimate.low) / 2 > 3 * independent


def test_the_interval_of_three_documents_worked_by_hand() -> None:
    """Means 1, 2, 6 of two tokens each: m 3, squared deviations 16 + 4 + 36, SE^2 = 3/2 * 56 / 36; t of 2 degrees."""
    estimate = ratio_mean([2.0, 4.0, 12.0], [2, 2, 2])
    half = 0.95 * np.sqrt(2 / (4 * 0.975 * 0.025)) * np.sqrt(3 / 2 * 56 / 36)  # Student's t in closed form
    assert estimate.value == 3.0
    assert (estimate.low, estimate.high) == pytest.approx((3 - half, 3 + half), rel=1e-12)


def test_ratio_mean_weighs_by_tokens_and_leaves_empty_documents_out() -> None:
    estimate = ratio_mean([10.0, 0.0, 8.0], [5, 0, 1])
    assert estimate.value == 3.0  # the mean of the documents' means is 5
    assert (estimate.n, estimate.clusters) == (6, 2)


def test_one_document_has_a_value_and_no_interval() -> None:
    estimate = ratio_mean([4.0], [2])
    assert estimate.value == 2.0
    assert estimate.low is None
    assert estimate.high is None


@pytest.mark.parametrize("statistic", ["difference", "ratio", "exp_difference", "exp_gap"])
def test_a_model_against_itself_differs_by_nothing(statistic: str) -> None:
    sums, counts = [3.0, 5.0, 9.0], [2, 3, 4]
    estimate = paired_bootstrap(sums, sums, counts, statistic=statistic)
    nothing = 1.0 if statistic in ("ratio", "exp_difference") else 0.0
    assert estimate.value == estimate.low == estimate.high == nothing


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()
    first = paired_bootstrap([1.0, 2.0, 4.0], [2.0, 2.0, 5.0], [1, 1, 2], seed=3)
    assert first == paired_bootstrap([1.0, 2.0, 4.0], [2.0, 2.0, 5.0], [1, 1, 2], seed=3)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("n", [50, 200, 500])
def test_wilson_bounds_the_perfect_score(n: int) -> None:
    estimate = wilson(n, n)
    assert estimate.high == 1.0
    z = 1.959963984540054
    assert estimate.low == pytest.approx(n / (n + z * z), rel=1e-12)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="at least one count"):
        ratio_mean([0.0], [0])
    with pytest.raises(ValueError, match="equal length"):
        ratio_mean([0.0], [1, 2])
    with pytest.raises(ValueError, match="at least one value"):
        quantiles([], [0.5])
