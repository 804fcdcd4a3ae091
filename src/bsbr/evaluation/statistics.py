"""Intervals that hold for text: the document is the unit of independence, never the token."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval; the ends are None where the data cannot give one."""

    value: float
    """The point estimate."""

    low: float | None = None
    """Lower end of the interval."""

    high: float | None = None
    """Upper end of the interval."""

    n: int | None = None
    """Items under the estimate, usually tokens."""

    clusters: int | None = None
    """Independent units under the estimate, usually documents."""

    method: str | None = None
    """How the interval was made."""

    def as_fields(self) -> dict[str, Any]:
        """Return the keys that a result row has for an estimate, leaving out what is not known.

        Returns:
            `value` and, where known, `ci_low`, `ci_high`, `n`, `clusters`, `ci_method`.

        Example:
            >>> Estimate(value=1.0, n=3).as_fields()
            {'value': 1.0, 'n': 3}
        """
        fields = {
            "value": self.value,
            "ci_low": self.low,
            "ci_high": self.high,
            "n": self.n,
            "clusters": self.clusters,
            "ci_method": self.method,
        }
        return {key: value for key, value in fields.items() if value is not None}


def ratio_mean(sums: ArrayLike, counts: ArrayLike, *, share: bool = False, confidence: float = CONFIDENCE) -> Estimate:
    """Mean over tokens with an interval clustered by document.

    Source: the linearised ratio estimator of cluster sampling, as in Miller, "Adding Error Bars to Evals"
    (arXiv 2411.00640).

    1. m = sum S_d / sum n_d over documents d.
    2. SE^2 = D / (D - 1) * sum (S_d - m n_d)^2 / (sum n_d)^2.
    3. m +- SE times the Student t quantile with D - 1 degrees of freedom.

    Documents without items are left out. One document gives a value and no interval; nor do documents that
    all stand at the end of a share's range, where no spread was seen and the truth may still lie inside.

    Args:
        sums: per-document sums S_d of the metric, [D].
        counts: per-document numbers of items n_d (tokens, or bytes), [D].
        share: the metric lies between 0 and 1, so the interval is cut there.
        confidence: coverage of the interval, between 0 and 1.
    Returns:
        The estimate, with n the total count and clusters the documents that have items.
    Raises:
        ValueError: the shapes differ, or no document has an item.

    Example:
        >>> ratio_mean([2.0, 6.0], [1, 3]).value
        2.0
    """
    s, n = _documents(sums, counts)
    total = n.sum()
    mean = float(s.sum() / total)
    documents = len(s)
    if documents < 2 or (share and (not s.any() or (s == n).all())):
        return Estimate(value=mean, n=int(total), clusters=documents)
    error = float(np.sqrt(documents / (documents - 1) * np.square(s - mean * n).sum()) / total)
    half = float(stdtrit(documents - 1, (1 + confidence) / 2)) * error
    return Estimate(
        value=mean,
        low=max(mean - half, 0.0) if share else mean - half,
        high=min(mean + half, 1.0) if share else mean + half,
        n=int(total),
        clusters=documents,
        method="document-clustered Student t",
    )


def transformed(estimate: Estimate, function: Any) -> Estimate:
    """Carry an estimate through an increasing function, ends and all.

    Args:
        estimate: what to carry.
        function: increasing, from float to float (`math.exp`, `math.sqrt`).
    Returns:
        The estimate of the function's value.

    Example:
        >>> import math
        >>> transformed(Estimate(value=0.0, low=0.0, high=0.0), math.exp).high
        1.0
    """
    return Estimate(
        value=function(estimate.value),
        low=None if estimate.low is None else function(estimate.low),
        high=None if estimate.high is None else function(estimate.high),
        n=estimate.n,
        clusters=estimate.clusters,
        method=estimate.method,
    )


def paired_bootstrap(
    sums_a: ArrayLike,
    sums_b: ArrayLike,
    counts: ArrayLike,
    *,
    statistic: Literal["difference", "ratio", "exp_difference", "exp_gap"] = "difference",
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Compare two models on the same documents by resampling documents with both models' values.

    Source: the paired cluster bootstrap, percentile interval.

    With means a and b: "difference" is b - a, "ratio" b / a, "exp_difference" exp(b - a) (the ratio of two
    perplexities from two mean log-likelihoods), "exp_gap" exp(b) - exp(a).

    Args:
        sums_a, sums_b: per-document sums of each model, [D].
        counts: per-document numbers of items, the same for both, [D].
        statistic: what to compare.
        seed: of the resampling; the global generators are not touched.
        resamples: number of bootstrap draws.
        confidence: coverage of the interval.
    Returns:
        The estimate; with one document, without an interval.
    Raises:
        ValueError: the shapes differ, or no document has an item.

    Example:
        >>> round(paired_bootstrap([1.0, 3.0], [2.0, 4.0], [1, 1]).value, 6)
        1.0
    """
    a, n = _documents(sums_a, counts)
    b, _ = _documents(sums_b, counts)

    def compare(mean_a: Any, mean_b: Any) -> Any:
        if statistic == "difference":
            return mean_b - mean_a
        if statistic == "ratio":
            return mean_b / mean_a
        if statistic == "exp_difference":
            return np.exp(mean_b - mean_a)
        return np.exp(mean_b) - np.exp(mean_a)

    total, documents = n.sum(), len(n)
    value = float(compare(a.sum() / total, b.sum() / total))
    if documents < 2:
        return Estimate(value=value, n=int(total), clusters=documents)
    draws = _draws(documents, seed, resamples)
    totals = draws @ n
    low, high = np.quantile(
        compare(draws @ a / totals, draws @ b / totals), [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    return Estimate(
        value=value,
        low=float(low),
        high=float(high),
        n=int(total),
        clusters=documents,
        method=f"paired document bootstrap, {resamples} resamples, seed {seed}",
    )


def wilson(successes: int, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """Share of successes among n independent trials, with Wilson's interval.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Args:
        successes: between 0 and n.
        n: independent trials, at least 1; for tokens of a document use `ratio_mean`.
        confidence: coverage of the interval.
    Returns:
        The estimate.
    Raises:
        ValueError: the counts are impossible.

    Example:
        >>> round(wilson(50, 50).low, 3)
        0.929
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n >= 1, got {successes} of {n}")
    z = float(ndtri((1 + confidence) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    # The formula reaches 0 and 1 exactly at the ends; rounding must not step outside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Estimate(value=share, low=low, high=high, n=n, clusters=n, method="Wilson")


def quantiles(values: ArrayLike, shares: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation, in float64.

    Args:
        values: the sample, any shape, at least one value.
        shares: between 0 and 1.
    Returns:
        One float for each share.
    Raises:
        ValueError: the sample is empty.

    Example:
        >>> quantiles([1, 2, 3], [0.0, 0.5, 1.0])
        [1.0, 2.0, 3.0]
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0:
        raise ValueError("quantiles need at least one value, got none")
    return [float(value) for value in np.quantile(sample, list(shares))]


@functools.lru_cache(maxsize=8)
def _draws(documents: int, seed: int, resamples: int) -> np.ndarray:
    """How often each document is drawn, [resamples, documents]; the same for all metrics, hence kept."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=resamples).astype(np.float64)


def _documents(sums: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if s.shape != n.shape or s.ndim != 1:
        raise ValueError(f"sums and counts must be two lists of equal length, got shapes {s.shape} and {n.shape}")
    kept = n > 0
    if not kept.any():
        raise ValueError("no document has an item to average: give at least one count above 0")
    return s[kept], n[kept]
