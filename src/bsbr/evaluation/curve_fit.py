"""Robust fits of t = a + b n^k in log space, many at once."""

import math
from collections.abc import Sequence

import numpy as np

_NOISE_SCALE = 0.05  # relative deviation from which a sample counts as an outlier (soft L1)
_MOST_STEPS = 200


def drawn_weights(repeats: Sequence[int], resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Weights of the samples in each bootstrap draw over the repeats of each length.

    Each draw takes one sample fewer than there are: this makes the spread of a draw that of the real mean,
    which a draw of equal size understates for few repeats.

    Args:
        repeats: samples of each length.
        resamples: draws.
        generator: source of the draws.
    Returns:
        [resamples, samples]; the weights of one length add up to 1.
    """
    parts = []
    for count in repeats:
        taken = max(1, count - 1)
        parts.append(generator.multinomial(taken, np.full(count, 1 / count), size=resamples) / taken)
    return np.concatenate(parts, axis=1)


def fit_log_curves(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit (log a, log b', k) of t = a + b' exp(k x) to log times y for many weightings at once.

    Levenberg-Marquardt on iteratively reweighted squares, which is the soft-L1 loss; all problems step
    together, as 200 bootstrap draws one by one would take longer than the measurement.

    Args:
        x, y: scaled log lengths and log times, [samples].
        weights, start: one row per problem, [problems, samples] and [problems, 3].
    Returns:
        Parameters [problems, 3] and their losses [problems].
    """
    floor = np.asarray([y.min() - 12.0, y.min() - 30.0, 0.0])
    ceiling = np.asarray([y.max() + 3.0, y.max() + 3.0, 5.0])
    theta, damping = np.clip(start, floor, ceiling), np.full(len(start), 1e-3)

    def evaluate(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curve = np.logaddexp(theta[:, :1], theta[:, 1:2] + theta[:, 2:] * x)
        error = curve - y
        spread = np.sqrt(1 + np.square(error / _NOISE_SCALE))
        return error, (weights * (spread - 1)).sum(1)

    error, loss = evaluate(theta)
    for _ in range(_MOST_STEPS):
        share = 1 / (1 + np.exp(np.clip(theta[:, :1] - theta[:, 1:2] - theta[:, 2:] * x, -700, 700)))
        jacobian = np.stack([1 - share, share, share * x], axis=2)  # [problems, samples, 3]
        weighted = jacobian * (weights / np.sqrt(1 + np.square(error / _NOISE_SCALE)))[:, :, None]
        normal = np.einsum("psi,psj->pij", weighted, jacobian)
        gradient = np.einsum("psi,ps->pi", weighted, error)
        normal += damping[:, None, None] * (np.einsum("pii->pi", normal)[:, :, None] * np.eye(3) + 1e-12 * np.eye(3))
        moved = np.clip(theta - np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], floor, ceiling)
        new_error, new_loss = evaluate(moved)
        better = new_loss <= loss
        settled = np.abs(moved - theta).max(1) < 1e-10
        theta = np.where(better[:, None], moved, theta)
        error = np.where(better[:, None], new_error, error)
        loss = np.where(better, new_loss, loss)
        damping = np.where(better, np.maximum(damping / 5, 1e-9), np.minimum(damping * 5, 1e9))
        if settled.all():
            break
    return theta, loss


def starting_points(places: np.ndarray, logs: Sequence[np.ndarray]) -> np.ndarray:
    """Starts that cover slow and fast growth, with little and with much constant.

    Args:
        places: scaled log lengths, [lengths].
        logs: log times of each length.
    Returns:
        Parameters as `fit_log_curves` takes them, [starts, 3].
    """
    medians = np.asarray([np.median(values) for values in logs])
    starts = []
    for exponent in (0.5, 1.0, 1.5, 2.0):
        for share in (0.01, 0.3, 0.9):
            constant = medians[0] + math.log(share)
            rest = math.log(max(math.exp(medians[-1]) - math.exp(constant), 1e-3 * math.exp(medians[-1])))
            starts.append([constant, rest - exponent * places[-1], exponent])
    return np.asarray(starts)
