"""How time grows with length: t = a + b n^k with intervals, and where two curves cross."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from bsbr.evaluation.curve_fit import drawn_weights, fit_log_curves, starting_points
from bsbr.evaluation.statistics import Estimate

RESAMPLES = 200
_FEWEST_LENGTHS = 4  # three parameters need more points than that to be a fit
_REACH = 64.0  # a crossing is looked for up to this factor outside the measured range

Samples = Mapping[int, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted t = constant_s + coefficient * n ** exponent."""

    constant_s: float
    """Seconds that do not depend on the length."""

    coefficient: float
    """Seconds per n ** exponent."""

    exponent: float
    """k."""

    def time_s(self, lengths: np.ndarray | float) -> np.ndarray:
        """Seconds at given lengths.

        Args:
            lengths: tokens.
        Returns:
            The fitted time, in the shape of `lengths`.
        """
        return np.asarray(self.constant_s + self.coefficient * np.asarray(lengths, dtype=float) ** self.exponent)


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """A curve with its intervals; `draws` are the curves of the bootstrap, for anything derived from it."""

    curve: Curve
    """The fit to all samples."""

    draws: tuple[Curve, ...]
    """Fits to resampled samples."""

    fit_from: int
    """Shortest length measured."""

    fit_to: int
    """Longest length measured."""

    def estimate(self, name: str) -> Estimate:
        """A parameter with its 95 % bootstrap interval.

        Args:
            name: "exponent", "constant_s" or "coefficient".
        Returns:
            The estimate.
        """
        values = [getattr(draw, name) for draw in self.draws]
        return _percentile(getattr(self.curve, name), values)


def fit_scaling(samples: Samples, *, seed: int = 0, resamples: int = RESAMPLES) -> ScalingFit | None:
    """Fit t = a + b n^k to repeated timings.

    1. Residuals in log time, soft-L1 loss, a and b positive by exponentials, several starts.
    2. Bootstrap over the repeats within each length.

    Args:
        samples: length to its timings in seconds (two or more for an interval).
        seed: of the bootstrap.
        resamples: bootstrap draws.
    Returns:
        The fit, or None for fewer than four lengths.
    Raises:
        ValueError: a timing is not positive.

    Example:
        >>> fit = fit_scaling({n: [0.01 + 1e-6 * n**2] * 3 for n in (128, 256, 512, 1024, 2048)}, resamples=5)
        >>> round(fit.curve.exponent, 2)
        2.0
    """
    lengths = sorted(samples)
    if len(lengths) < _FEWEST_LENGTHS:
        return None
    logs = [np.log(_positive(samples[length])) for length in lengths]
    reference = math.exp(float(np.mean(np.log(lengths))))
    places = np.log(np.asarray(lengths, dtype=float) / reference)
    x = np.concatenate([np.full(len(values), place) for place, values in zip(places, logs, strict=True)])
    y = np.concatenate(logs)
    weights = np.concatenate([np.full(len(values), 1 / len(values)) for values in logs])
    starts = starting_points(places, logs)
    solutions, costs = fit_log_curves(x, y, np.tile(weights, (len(starts), 1)), starts)
    best = solutions[int(costs.argmin())]
    drawn = drawn_weights([len(values) for values in logs], resamples, np.random.default_rng(seed))
    draws, _ = fit_log_curves(x, y, drawn, np.tile(best, (resamples, 1)))
    return ScalingFit(
        curve=_curve(best, reference),
        draws=tuple(_curve(draw, reference) for draw in draws),
        fit_from=lengths[0],
        fit_to=lengths[-1],
    )


def loglog_slope(samples: Samples, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """Slope of a straight line through log median time over log length: the published exponent.

    It is k only where the constant is negligible; a constant bends the line, and then this is no exponent.

    Args:
        samples: length to its timings.
        seed, resamples: of the bootstrap over repeats.
    Returns:
        The estimate, or None for fewer than two lengths.

    Example:
        >>> round(loglog_slope({1: [1.0], 2: [4.0], 4: [16.0]}, resamples=3).value, 6)
        2.0
    """
    lengths = sorted(samples)
    if len(lengths) < 2:
        return None
    x = np.log(np.asarray(lengths, dtype=float))
    values = [_positive(samples[length]) for length in lengths]

    def slope(rows: Sequence[np.ndarray]) -> float:
        return float(np.polyfit(x, np.log([np.median(row) for row in rows]), 1)[0])

    generator = np.random.default_rng(seed)
    draws = [slope([generator.choice(row, max(1, len(row) - 1)) for row in values]) for _ in range(resamples)]
    return _percentile(slope(values), draws)


def local_slopes(samples: Samples) -> list[tuple[int, float]]:
    """Slopes between neighbouring lengths, log(t2 / t1) / log(n2 / n1) of the medians.

    Args:
        samples: length to its timings.
    Returns:
        (upper length, slope) for each neighbouring pair.

    Example:
        >>> local_slopes({1: [1.0], 2: [4.0]})
        [(2, 2.0)]
    """
    lengths = sorted(samples)
    medians = [float(np.median(_positive(samples[length]))) for length in lengths]
    return [
        (lengths[i], math.log(medians[i] / medians[i - 1]) / math.log(lengths[i] / lengths[i - 1]))
        for i in range(1, len(lengths))
    ]


def physical_fit(samples: Samples) -> dict[str, float] | None:
    """The model a + b n + c n^2 with a, b, c >= 0 and relative weights, to hold the power law against.

    A method that scores every block for every query keeps a small n^2 term, so its k must tend to 2 in the
    end.

    Args:
        samples: length to its timings.
    Returns:
        constant_s, linear, quadratic, and relative_error (root mean square), or None for fewer than four
        lengths.
    """
    lengths = sorted(samples)
    if len(lengths) < _FEWEST_LENGTHS:
        return None
    n = np.asarray(lengths, dtype=float)
    times = np.asarray([np.median(_positive(samples[length])) for length in lengths])
    scale = n[-1]
    design = np.stack([np.ones_like(n), n / scale, (n / scale) ** 2], axis=1) / times[:, None]
    solution, residual = nnls(design, np.ones_like(n))
    return {
        "constant_s": float(solution[0]),
        "linear": float(solution[1] / scale),
        "quadratic": float(solution[2] / scale**2),
        "relative_error": float(residual / math.sqrt(len(n))),
    }


def crossover(base: ScalingFit, other: ScalingFit) -> tuple[Estimate | None, bool]:
    """Length from which `other` is faster than `base` for good, with a bootstrap interval.

    Args:
        base, other: fits over the same lengths.
    Returns:
        The estimate, or None where the fitted curves, or most of the bootstrap's, do not cross within 64
        times the measured range; and whether it lies outside the measured range ("extrapolated"). The
        interval is left out where more than 2.5 % of the bootstrap pairs do not cross.
    """
    low, high = base.fit_from / _REACH, base.fit_to * _REACH
    value = _crossing(base.curve, other.curve, low, high)
    if value is None:
        return None, False
    found = [_crossing(a, b, low, high) for a, b in zip(base.draws, other.draws, strict=True)]
    crossings = [draw for draw in found if draw is not None]
    if len(crossings) < 0.5 * len(found):
        return None, False
    bounds = _percentile(value, crossings)
    # Draws without a crossing stand for one that is not seen: then no finite end can be promised.
    if len(crossings) < 0.975 * len(found):
        bounds = Estimate(value=value, method=f"bootstrap: {len(found) - len(crossings)} of {len(found)} do not cross")
    return bounds, not base.fit_from <= value <= base.fit_to


def _crossing(base: Curve, other: Curve, low: float, high: float) -> float | None:
    grid = np.exp(np.linspace(math.log(low), math.log(high), 400))
    gain = np.log(base.time_s(grid)) - np.log(other.time_s(grid))
    changes = np.nonzero((gain[:-1] <= 0) & (gain[1:] > 0))[0]
    if not len(changes) or gain[-1] <= 0:
        return None
    i = int(changes[-1])
    share = -gain[i] / (gain[i + 1] - gain[i])
    return float(math.exp(math.log(grid[i]) + share * (math.log(grid[i + 1]) - math.log(grid[i]))))


def _curve(theta: np.ndarray, reference: float) -> Curve:
    exponent = float(theta[2])
    return Curve(constant_s=math.exp(theta[0]), coefficient=math.exp(theta[1]) / reference**exponent, exponent=exponent)


def _percentile(value: float, draws: Sequence[float]) -> Estimate:
    if len(draws) < 2:
        return Estimate(value=value)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(
        value=value,
        low=float(low),
        high=float(high),
        method=f"bootstrap over repeats, {len(draws)} resamples",
    )


def _positive(times: Sequence[float]) -> np.ndarray:
    values = np.asarray(times, dtype=float)
    if not values.size or not (values > 0).all():
        raise ValueError(f"timings must be positive seconds, got {values.tolist()}")
    return values
