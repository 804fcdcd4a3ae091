"""Tidy rows: one measured value each, the same shape in every result file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsbr.evaluation.statistics import Estimate

HIGHER = frozenset(
    {
        "speedup",
        "tokens_per_s",
        "cosine",
        "centred_cosine",
        "linear_cka",
        "top1_agreement",
        "context_gain",
        "nll_correlation",
    }
)
HIGHER_FAMILIES = frozenset(
    {
        "any_overlap",
        "teacher_in_topk",
        "student_in_topk",
        "overlap",
        "jaccard",
        "same_set",
        "same_order",
        "mass",
    }
)
NEUTRAL = frozenset({"exposure", "keys_read", "delta_p", "cosine_between_tokens", "coefficient", "local_slope"})


def row(
    evaluation: str,
    metric: str,
    variant: str,
    where: Mapping[str, Any],
    estimate: Estimate | float,
    unit: str,
    *,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make one row of a result file.

    Args:
        evaluation: speed, exponents, perplexity, similarity or agreement.
        metric: what was measured.
        variant: of which model.
        where: the slice: length, bucket, layer and so on.
        estimate: the value, with its interval where there is one.
        unit: "nats", "s", "share" and so on.
        extra: further keys.
    Returns:
        A dict of what JSON can hold.

    Example:
        >>> row("speed", "speedup", "converted", {"length": 128}, 1.5, "ratio")["direction"]
        'higher'
    """
    known = estimate if isinstance(estimate, Estimate) else Estimate(value=float(estimate))
    made = {
        "evaluation": evaluation,
        "metric": metric,
        "variant": variant,
        "slice": dict(where),
        "unit": unit,
        **known.as_fields(),
    }
    if metric not in NEUTRAL and not metric.startswith("delta_p_p"):
        made["direction"] = "higher" if metric in HIGHER or metric.split("@")[0] in HIGHER_FAMILIES else "lower"
    return made | dict(extra or {})


def histogram(
    metric: str, where: Mapping[str, Any], values: Mapping[str, Sequence[np.ndarray]], *, bins: int = 60
) -> list[dict[str, Any]]:
    """Distributions of one metric for several variants over common edges.

    Args:
        metric: what was measured.
        where: the slice.
        values: variant to its vectors.
        bins: number of bins, between the least and the largest value seen, with equal steps of the logarithm
            where values stay positive and spread over more than a factor 30.
    Returns:
        One dict per variant: metric, variant, slice, edges, counts. Empty if there are no values.
    """
    samples = {name: np.concatenate(parts).astype(np.float64) for name, parts in values.items() if parts}
    if not samples:
        return []
    edges = _edges(metric, np.concatenate(list(samples.values())), bins)
    return [
        {
            "metric": metric,
            "variant": name,
            "slice": dict(where),
            "edges": [float(edge) for edge in edges],
            "counts": [int(count) for count in np.histogram(sample, edges)[0]],
        }
        for name, sample in samples.items()
    ]


def _edges(metric: str, sample: np.ndarray, bins: int) -> np.ndarray:
    # Cosines crowd at 1: equal steps of log(1 - cosine) show what equal steps of the cosine would hide.
    if metric == "cosine":
        return 1 - _edges("distance", np.maximum(1 - sample, 1e-9), bins)[::-1]
    low, high = float(sample.min()), float(sample.max())
    low = max(low, 1e-12) if low >= 0 and high > 1e-9 else low
    if high <= low:
        return np.linspace(low - 0.5, high + 0.5, bins + 1)
    edges = np.geomspace(low, high, bins + 1) if low > 0 and high > 30 * low else np.linspace(low, high, bins + 1)
    # The outer edges take in what rounding would leave outside, and values below the floor.
    edges[0], edges[-1] = min(edges[0], float(sample.min())), max(edges[-1], high)
    return edges
