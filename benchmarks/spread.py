"""Mean and spread over seeds."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return mean, standard deviation over seeds (0 for one) and number.

    Args:
        values: one for each seed.
    Returns:
        `mean`, `sd`, `n`.

    Example:
        >>> spread([1.0, 3.0])["mean"]
        2.0
    """
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}
