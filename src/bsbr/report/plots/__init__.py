"""The plots under their published names; the only place that imports matplotlib."""

from collections.abc import Callable

from bsbr.report.plots.density import kl_against_time, kl_by_position, quality_against_density
from bsbr.report.plots.distribution import metrics_distribution
from bsbr.report.plots.quality import agreement_rates, perplexity_comparison
from bsbr.report.plots.scaling import scaling_exponents
from bsbr.report.plots.speed import inference_time, speedup, throughput
from bsbr.report.results import Results

PLOTS: dict[str, Callable[[Results], bytes | None]] = {
    "inference_time_vs_seq_length.png": inference_time,
    "throughput_vs_seq_length.png": throughput,
    "speedup_vs_seq_length.png": speedup,
    "scaling_exponent_analysis.png": scaling_exponents,
    "perplexity_comparison_wikitext.png": perplexity_comparison,
    "metrics_distribution.png": metrics_distribution,
    "agreement_rates.png": agreement_rates,
    "quality_vs_density.png": quality_against_density,
    "kl_vs_time.png": kl_against_time,
    "kl_by_position.png": kl_by_position,
}
"""File name and the function that draws it; None where the results hold nothing to draw."""


def draw_all(results: Results) -> dict[str, bytes]:
    """Draw every plot that the results hold figures for.

    Args:
        results: a results folder.
    Returns:
        File names and PNG images.
    """
    drawn = {name: draw(results) for name, draw in PLOTS.items()}
    return {name: image for name, image in drawn.items() if image is not None}
