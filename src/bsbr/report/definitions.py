"""Every metric of the result files: its name, how it is written, and one sentence that defines it."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "ratio", "speedup", "seconds", "bytes", "length", "slope", "small", "plain"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    label: str
    """Name in tables."""

    kind: Kind
    """How its value is written."""

    better: Literal["higher", "lower", ""]
    """The direction of improvement, if it has one."""

    definition: str
    """What it is, in one sentence."""


METRICS: dict[str, Metric] = {
    "top1_agreement": Metric(
        "same next token (top-1)",
        "share",
        "higher",
        "Share of positions where both models rank the same token first.",
    ),
    "teacher_in_topk": Metric(
        "original's choice in top-{k}",
        "share",
        "higher",
        "Share of positions where the original's first choice is among the variant's {k} most likely tokens.",
    ),
    "student_in_topk": Metric(
        "variant's choice in original's top-{k}",
        "share",
        "higher",
        "Share of positions where the variant's first choice is among the original's {k} most likely tokens.",
    ),
    "overlap": Metric(
        "overlap@{k}",
        "share",
        "higher",
        "Mean share of the {k} most likely tokens that both models have in common.",
    ),
    "same_set": Metric(
        "same top-{k} set",
        "share",
        "higher",
        "Share of positions where both models have the same {k} most likely tokens.",
    ),
    "same_order": Metric(
        "same top-{k} in order",
        "share",
        "higher",
        "Share of positions where both models rank the same {k} tokens first, in the same order.",
    ),
    "jaccard": Metric(
        "Jaccard@{k}",
        "share",
        "higher",
        "Mean of shared / joined tokens of the two top-{k} lists, per position.",
    ),
    "mass": Metric(
        "mass@{k}", "share", "higher", "Mean probability the variant gives to the original's top {k} tokens."
    ),
    "teacher_rank": Metric(
        "rank of the original's choice",
        "plain",
        "lower",
        "Rank the variant gives to the original's first choice.",
    ),
    "any_overlap": Metric(
        "any overlap@{k} (legacy)",
        "share",
        "higher",
        "Share of positions where the two top-{k} lists have at least one token in common: "
        "the published definition, the loosest there is.",
    ),
    "kl": Metric(
        "KL divergence",
        "small",
        "lower",
        "Mean KL(original || variant) of the next-token distributions over the full vocabulary, in nats.",
    ),
    "reverse_kl": Metric("reverse KL", "small", "lower", "Mean KL(variant || original), in nats."),
    "js": Metric("Jensen-Shannon", "small", "lower", "Mean Jensen-Shannon divergence of both distributions, in nats."),
    "delta_p": Metric(
        "delta-p",
        "share",
        "",
        "Mean change of the probability of the true next token, variant less original.",
    ),
    "nll_correlation": Metric(
        "correlation of NLL",
        "plain",
        "higher",
        "Correlation over tokens of the log-likelihoods of both models.",
    ),
    "total_variation": Metric(
        "total variation", "small", "lower", "Mean of 1 - sum of min(p, q): the probability mass that moved."
    ),
    "delta_p_rms": Metric(
        "delta-p RMS", "share", "lower", "Root mean square change of the probability of the true next token."
    ),
    "ln_ppl_ratio": Metric(
        "ln perplexity ratio", "small", "lower", "ln(perplexity of the variant / perplexity of the original)."
    ),
    "perplexity": Metric(
        "perplexity", "plain", "lower", "exp of the mean negative log-likelihood, each token scored once."
    ),
    "perplexity_row_by_row_legacy": Metric(
        "row-by-row perplexity (legacy)",
        "plain",
        "lower",
        "The published way: each of the first rows of the data set scored on its own, without context.",
    ),
    "nll": Metric("NLL per token", "plain", "lower", "Mean negative log-likelihood per token, in nats."),
    "bits_per_byte": Metric(
        "bits per byte",
        "plain",
        "lower",
        "Negative log-likelihood in bits per UTF-8 byte of the scored tokens: comparable across tokenizers.",
    ),
    "ppl_ratio": Metric(
        "perplexity ratio",
        "ratio",
        "lower",
        "Perplexity of the variant / perplexity of the original, same tokens.",
    ),
    "ppl_difference": Metric(
        "perplexity difference", "plain", "lower", "Perplexity of the variant less that of the original."
    ),
    "context_gain": Metric(
        "gain from context",
        "plain",
        "higher",
        "NLL with a short context less NLL with the long one, in nats per token.",
    ),
    "cosine": Metric(
        "cosine similarity",
        "plain",
        "higher",
        "Mean cosine between the hidden states of both models at each token.",
    ),
    "centred_cosine": Metric(
        "centred cosine",
        "plain",
        "higher",
        "Cosine after subtracting the original's mean state, a stricter reading.",
    ),
    "cosine_between_tokens": Metric(
        "cosine of different tokens",
        "plain",
        "",
        "Cosine between states of unrelated tokens: the floor of the cosine.",
    ),
    "linear_cka": Metric(
        "linear CKA",
        "plain",
        "higher",
        "Debiased linear centred kernel alignment of the states: 1 up to rotation.",
    ),
    "ece": Metric(
        "calibration error",
        "share",
        "lower",
        "Expected gap between confidence and accuracy over bins of equal mass.",
    ),
    "mse": Metric("MSE", "small", "lower", "Mean squared difference of the hidden states."),
    "relative_l2": Metric(
        "relative L2",
        "small",
        "lower",
        "|h - h'| / |h|: size of the change of the hidden states against their own.",
    ),
    "feature_kl_legacy": Metric(
        "feature-softmax KL (legacy)",
        "small",
        "lower",
        "The published 'KL': a softmax over hidden features, which is no divergence between predictions.",
    ),
    "time_s": Metric("time", "seconds", "lower", "Median time of one forward pass; interval = 20 and 80 % quantiles."),
    "tokens_per_s": Metric("tokens per second", "plain", "higher", "Tokens of the batch / median time."),
    "speedup": Metric("speed-up", "speedup", "higher", "Time of the original / time of the variant, same run."),
    "peak_bytes": Metric("peak memory", "bytes", "lower", "Largest memory held during a forward pass."),
    "exponent": Metric("exponent k", "slope", "lower", "k of the fit t = a + b n^k of time against length n."),
    "constant_s": Metric("constant a", "seconds", "lower", "a of the fit t = a + b n^k: cost that does not grow."),
    "coefficient": Metric("coefficient b", "small", "lower", "b of the fit t = a + b n^k."),
    "loglog_slope": Metric(
        "straight log-log slope (legacy)",
        "slope",
        "lower",
        "Slope of a straight line through log time against log length: as published, biased by the constant.",
    ),
    "local_slope": Metric("local slope", "slope", "", "Slope of log time between two neighbouring lengths."),
    "physical_constant_s": Metric("constant", "seconds", "", "Constant term of the fit t = a + b n + c n^2."),
    "physical_linear": Metric("linear term", "small", "", "b of the fit t = a + b n + c n^2, in s per token."),
    "physical_quadratic": Metric(
        "quadratic term", "small", "", "c of the fit t = a + b n + c n^2, in s per token squared."
    ),
    "physical_relative_error": Metric(
        "relative error of the fit",
        "share",
        "lower",
        "Root mean square relative error of the fit t = a + b n + c n^2.",
    ),
    "crossover_length": Metric(
        "crossover length", "length", "lower", "Length from which the variant is faster than the original."
    ),
    "keys_read": Metric(
        "keys read",
        "share",
        "",
        "Share of the keys up to a query's own position that are read exactly.",
    ),
    "exposure": Metric(
        "sparse exposure",
        "share",
        "",
        "Share of scored positions with an earlier block that is not read exactly.",
    ),
}
