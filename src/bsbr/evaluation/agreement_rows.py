"""Agreement and divergence rows, computed from the records of the quality part alone."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bsbr.evaluation.agreement import TOP_K
from bsbr.evaluation.measured import Measured
from bsbr.evaluation.quality import NOISE_BATCH, NOISE_DTYPE, ORIGINAL
from bsbr.evaluation.records import unpack
from bsbr.evaluation.rows import row
from bsbr.evaluation.statistics import Estimate, paired_bootstrap, quantiles, ratio_mean, transformed

DIVERGENCES = ("kl", "reverse_kl", "js", "total_variation")
SHARES = (
    "top1_agreement",
    *(f"any_overlap@{k}" for k in TOP_K),
    *(
        f"{name}@{k}"
        for name in (
            "teacher_in_topk",
            "student_in_topk",
            "overlap",
            "jaccard",
            "same_set",
            "same_order",
            "mass",
        )
        for k in TOP_K[1:]
    ),
)
HEADLINE = ("top1_agreement", "teacher_in_topk@5", "overlap@5", "overlap@10", "kl", "total_variation")
KL_SHARES = (0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999)
DELTA_P_SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
MAIN_BUCKETS = ("all", "exposed")
ECE_BINS = 15


def agreement_rows(
    text: str, measured: Mapping[str, Measured], *, exposed_from: int | None, seed: int
) -> list[dict[str, Any]]:
    """Rows of agreement_rates.json for one text: agreement, divergences and the statistics of llama.cpp.

    Args:
        text: its name.
        measured: from `collect`.
        exposed_from: first exposed position, for the quantiles of that bucket.
        seed: of the paired bootstrap.
    Returns:
        Rows for every variant but the original; the calibration error for the original too.
    """
    made = []
    original = measured[ORIGINAL]
    for name, mine in measured.items():
        where = {"text": text, "bucket": "all"}
        made.append(row("agreement", "ece", name, where, calibration_error(mine), "share"))
        if name == ORIGINAL:
            continue
        for bucket in mine.buckets():
            where, counts = {"text": text, "bucket": bucket}, mine.counts(bucket)
            for metric in _metrics_of(bucket):
                share = metric in SHARES or metric == "total_variation"
                mean = ratio_mean(mine.sums(bucket, metric), counts, share=share)
                made.append(row("agreement", metric, name, where, mean, _unit(metric)))
            if bucket in MAIN_BUCKETS:
                start = exposed_from if bucket == "exposed" else None
                made += _spread_rows(name, where, mine, original, start)
                compared = paired_bootstrap(original.sums(bucket, "nll"), mine.sums(bucket, "nll"), counts, seed=seed)
                made.append(row("agreement", "ln_ppl_ratio", name, where, compared, "nats"))
    return made


def noise_rows(text: str, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Rows that say how far the original is from itself: nothing below them is a difference.

    Args:
        text: its name.
        measured: from `collect`, for the noise variants.
    Returns:
        KL, agreement and total variation, without intervals, as they rest on few documents.
    """
    made = []
    for name in (NOISE_BATCH, NOISE_DTYPE):
        if name not in measured:
            continue
        mine = measured[name]
        where = {"text": text, "bucket": "all"}
        for metric in ("kl", "top1_agreement", "total_variation"):
            mean = ratio_mean(mine.sums("all", metric), mine.counts("all"))
            plain = Estimate(value=mean.value, n=mean.n)
            made.append(row("agreement", metric, name, where, plain, _unit(metric)))
        largest = Estimate(value=float(mine.tokens("kl").max()), n=len(mine.tokens("kl")))
        made.append(row("agreement", "kl_max", name, where, largest, "nats"))
    return made


def calibration_error(measured: Measured) -> Estimate:
    """Expected calibration error over 15 bins of equal mass: |confidence - accuracy|, weighted by tokens.

    Args:
        measured: records of one variant.
    Returns:
        The error, without an interval.
    """
    confidence, correct = measured.tokens("confidence"), measured.tokens("correct")
    order = np.argsort(confidence, kind="stable")
    parts = zip(np.array_split(confidence[order], ECE_BINS), np.array_split(correct[order], ECE_BINS), strict=True)
    gaps = [abs(float(a.mean(dtype=np.float64)) - float(b.mean(dtype=np.float64))) * len(a) for a, b in parts if len(a)]
    return Estimate(value=sum(gaps) / len(confidence), n=len(confidence))


def _unit(metric: str) -> str:
    if metric in ("kl", "reverse_kl", "js"):
        return "nats"
    return "rank" if metric == "teacher_rank" else "share"


def _metrics_of(bucket: str) -> tuple[str, ...]:
    if bucket.startswith("margin"):
        return ("top1_agreement",)
    return (*SHARES, *DIVERGENCES, "delta_p", "teacher_rank") if bucket in MAIN_BUCKETS else HEADLINE


def _spread_rows(
    name: str, where: Mapping[str, Any], mine: Measured, original: Measured, start: int | None
) -> list[dict[str, Any]]:
    """Quantiles and what is not a mean, for one bucket."""
    made = []
    kl, delta = (mine.tokens(metric, exposed_from=start).astype(np.float64) for metric in ("kl", "delta_p"))
    ranks = mine.tokens("teacher_rank", exposed_from=start)
    for metric, values, shares, unit in (
        ("kl", kl, KL_SHARES, "nats"),
        ("delta_p", delta, DELTA_P_SHARES, "share"),
    ):
        points = zip((f"p{100 * share:g}" for share in shares), quantiles(values, shares), strict=True)
        for label, value in [*points, ("min", float(values.min())), ("max", float(values.max()))]:
            made.append(row("agreement", f"{metric}_{label}", name, where, Estimate(value=value, n=len(values)), unit))
    for share in (0.5, 0.99):
        rank = Estimate(value=quantiles(ranks, [share])[0], n=len(ranks))
        made.append(row("agreement", f"teacher_rank_p{100 * share:g}", name, where, rank, "rank"))
    rms = transformed(_squared_delta_p(mine, start), lambda square: math.sqrt(max(square, 0.0)))
    made.append(row("agreement", "delta_p_rms", name, where, rms, "share"))
    before, after = (side.tokens("nll", exposed_from=start).astype(np.float64) for side in (original, mine))
    if len(before) > 1 and min(before.std(), after.std()) > 0:
        correlation = Estimate(value=float(np.corrcoef(before, after)[0, 1]), n=len(before))
        made.append(row("agreement", "nll_correlation", name, where, correlation, "correlation"))
    return made


def _squared_delta_p(measured: Measured, start: int | None) -> Estimate:
    sums, counts = np.zeros(measured.documents), np.zeros(measured.documents)
    for ordinal, record in measured.records:
        values = unpack(record["tokens"]["delta_p"]).astype(np.float64)
        values = values if start is None else values[max(0, start - record["first_position"]) :]
        sums[ordinal] += float(np.square(values).sum())
        counts[ordinal] += len(values)
    return ratio_mean(sums, counts)
