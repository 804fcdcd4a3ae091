"""Look up metrics by name, quantiles and @k included, and put them in order."""

import re

from bsbr.report.definitions import METRICS, Metric

EXPOSURE = ("exposure", "sparse_exposure")
"""Names of the share of positions where the sparse part acts: of the text, not a figure of merit."""


_SPREAD = re.compile(r"(kl|delta_p|teacher_rank|cosine)_(min|max|p\d{1,2}(?:\.\d{1,2})?)")
_DETAIL = (
    "student_in_topk",
    "same_order",
    "jaccard",
    "mass",
    "teacher_rank",
    "reverse_kl",
    "js",
    "delta_p",
    "ece",
)


def metric(name: str) -> Metric:
    """Return the words for a metric; `name@5` fills the 5 in, an unknown one is called by its own name.

    Args:
        name: the `metric` of a row.
    Returns:
        Its label, kind, direction and definition (empty if unknown).

    Example:
        >>> metric("overlap@5").label
        'overlap@5'
    """
    name = "exposure" if name in EXPOSURE else name
    spread = _SPREAD.fullmatch(name)
    if spread and spread[1] in METRICS:
        return _spread(METRICS[spread[1]], spread[2])
    base, at, k = name.partition("@")
    known = METRICS.get(base)
    if known is None or bool(at) != ("{k}" in known.label) or (at and not re.fullmatch(r"\d{1,4}", k)):
        return Metric(name, "plain", "", "")
    return Metric(known.label.format(k=k), known.kind, known.better, known.definition.format(k=k))


def is_spread(name: str) -> bool:
    """Tell whether a metric is a quantile or an end of the distribution of another.

    Args:
        name: the metric.
    Returns:
        True for instance for kl_p99 and kl_max.
    """
    return _SPREAD.fullmatch(name) is not None


def _spread(base: Metric, part: str) -> Metric:
    words = {"min": "smallest", "max": "largest", "p50": "median"}.get(part, f"{part.removeprefix('p')} % quantile")
    definition = f"{capital(words)} over positions of the value whose mean is the {base.label}."
    return Metric(f"{base.label}, {words}", base.kind, base.better, definition)


def is_detail(name: str) -> bool:
    """Tell whether a metric belongs to the detail that is folded away.

    Args:
        name: the metric.
    Returns:
        True for quantiles and for the less usual statistics.
    """
    return is_spread(name) or name.split("@")[0] in (*_DETAIL, "nll_correlation")


def capital(text: str) -> str:
    """Begin with a capital, unless the first word is a name like overlap@5.

    Args:
        text: a title.
    Returns:
        The title.
    """
    return text if "@" in text.split(" ")[0] else text[:1].upper() + text[1:]


def order(name: str) -> tuple[int, float, str]:
    """Sort key of a metric: the order of `METRICS`, then k, unknown ones last by name.

    Args:
        name: the metric.
    Returns:
        A tuple that sorts.
    """
    spread = _SPREAD.fullmatch(name)
    base, _, k = (spread[1] if spread else name).partition("@")
    known = list(METRICS)
    place = known.index(base) if base in METRICS else len(known)
    if spread:
        return (place, {"min": 0.0, "max": 101.0}.get(spread[2]) or float(spread[2].strip("pmin") or 0), name)
    return (place, float(k) if k.isdecimal() and len(k) < 5 else -1.0, name)
