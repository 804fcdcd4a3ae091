"""What the report calls things: result files, plots and variants."""

from dataclasses import dataclass

SPEED, EXPONENTS, PERPLEXITY = "scaling_results", "scaling_exponents", "quality_results_wikitext"
SIMILARITY, AGREEMENT, SWEEP = "similarity_metrics", "agreement_rates", "sweep"

SECTIONS: dict[str, str] = {
    AGREEMENT: "Next-token agreement and KL divergence",
    PERPLEXITY: "Perplexity",
    SIMILARITY: "Hidden-state similarity",
    SPEED: "Speed and memory",
    EXPONENTS: "Scaling exponents",
    SWEEP: "Quality against density",
}
"""Result file (without .json) and the heading of its section, in the order of the report."""

EXPECTED: dict[str, tuple[str, ...]] = {
    AGREEMENT: ("top1_agreement", "teacher_in_topk@5", "overlap@5", "overlap@10", "any_overlap@5", "kl"),
    PERPLEXITY: ("perplexity", "bits_per_byte", "ppl_ratio"),
    SIMILARITY: ("cosine", "mse", "relative_l2", "feature_kl_legacy"),
    SPEED: ("time_s", "tokens_per_s", "speedup", "peak_bytes"),
    EXPONENTS: ("exponent", "loglog_slope", "crossover_length"),
    SWEEP: ("kl", "top1_agreement", "ppl_ratio", "keys_read", "time_s"),
}
"""Metrics that full runs of `bsbr evaluate` and `--sweep` hold; one that is missing is listed as not measured."""

QUALITY_VARIANTS = ("original", "converted", "uncalibrated", "moba", "local", "states", "additive")
SWEEP_VARIANTS = ("converted", "uncalibrated", "moba", "window", "oracle", "random")
SPEED_VARIANTS = ("original", "converted", "converted_sparse", "additive", "value_only")

CAPTIONS: dict[str, str] = {
    "inference_time_vs_seq_length.png": "Inference time against sequence length, both axes logarithmic.",
    "throughput_vs_seq_length.png": "Tokens per second against sequence length.",
    "speedup_vs_seq_length.png": "Speed of each variant as a multiple of the original's, same run.",
    "scaling_exponent_analysis.png": "Times with fitted curves t = a + b n^k, and slopes between lengths.",
    "perplexity_comparison_wikitext.png": "Perplexity of each variant as a multiple of the original's.",
    "metrics_distribution.png": "How each measure is distributed, on real text and on random tokens.",
    "agreement_rates.png": "How often each variant and the original agree on the next token.",
    "quality_vs_density.png": "Distance from the original against the share of keys read, both axes logarithmic.",
    "kl_vs_time.png": "KL divergence against the time of a forward pass of the whole model.",
    "kl_by_position.png": "KL divergence over the position in the window: a mean must not hide a collapse.",
}
"""What each plot shows, in one sentence."""


PUBLISHED: tuple[tuple[str, str], ...] = (
    ("WikiText perplexity", "52.29 before, 2,073,936.50 after conversion"),
    ("hidden-state cosine / MSE / KL", "-0.0025 / 50.52 / 17.14, on random tokens; KL of feature softmaxes"),
    ("next-token agreement, any overlap", "top-1 0.00 %, top-5 0.10 %, top-10 1.11 %"),
    (
        "speed-up at 128 / 256 / 512 / 1,024 tokens",
        "0.94 / 0.96 / 0.74 / 0.55 times the original's speed, on a CPU",
    ),
    ("time exponent, straight log-log line", "0.08 original, 0.35 converted, at 2,048 tokens per batch"),
)
"""Figures of the published evaluation (JacobFV/bsbr, research/conversion_experiments/results)."""


@dataclass(frozen=True)
class Variant:
    """One model or control that is measured."""

    label: str
    """Name in tables and legends."""

    short: str
    """Name beside a line or bar."""

    meaning: str
    """What it is, in one sentence."""


VARIANTS: dict[str, Variant] = {
    "original": Variant("original", "original", "The model as it came, with full attention."),
    "converted": Variant("converted", "converted", "BSBR with its default settings, scalars per head calibrated."),
    "uncalibrated": Variant("converted, not calibrated", "not calibrated", "BSBR straight after conversion."),
    "moba": Variant(
        "no far field (MoBA)", "MoBA", "Retrieved blocks are read exactly; all other past blocks are dropped."
    ),
    "local": Variant("local only", "local only", "Each token reads its own block and nothing before it."),
    "states": Variant("summaries only", "summaries only", "No block is retrieved; the past is read by summary alone."),
    "additive": Variant(
        "additive (published design)",
        "additive",
        "The design of the published evaluation, causality repaired: learned projections, far added to near.",
    ),
    "converted_sparse": Variant(
        "converted, sparse forced",
        "sparse forced",
        "The converted model with dense_below = 0: sparse at every length.",
    ),
    "window": Variant(
        "local window, same budget", "window", "The own block and the blocks just before it are read, nothing else."
    ),
    "oracle": Variant(
        "oracle choice", "oracle", "The calibrated conversion, its blocks chosen by their true mass: the ceiling."
    ),
    "random": Variant(
        "random choice", "random", "The calibrated conversion, its blocks drawn among the past ones: the floor."
    ),
    "value_only": Variant(
        "no attention (floor)",
        "no attention",
        "Attention replaced by passing the values through: the limit of speed.",
    ),
}


NOISE: dict[str, str] = {
    "noise_floor": "the original against itself, in another batch",
    "noise_bfloat16": "the original against itself, in bfloat16",
}
"""Variants that are no model of their own: nothing nearer to the original than these is a difference."""


def variant(name: str) -> Variant:
    """Return the words for a variant; an unknown one is called by its own name.

    Args:
        name: the `variant` of a row.
    Returns:
        Its label, short label and meaning (empty if unknown).
    """
    return VARIANTS.get(name) or Variant(name, name, "")
