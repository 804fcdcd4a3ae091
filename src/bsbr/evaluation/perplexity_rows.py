"""Perplexity rows, computed from the records of the quality part alone."""

import math
from collections.abc import Mapping
from typing import Any

from bsbr.evaluation.measured import Measured
from bsbr.evaluation.quality import ORIGINAL
from bsbr.evaluation.rows import row
from bsbr.evaluation.statistics import paired_bootstrap, ratio_mean, transformed


def perplexity_rows(text: str, window: int, measured: Mapping[str, Measured], *, seed: int) -> list[dict[str, Any]]:
    """Rows of quality_results_wikitext.json for one text.

    Args:
        text: its name.
        window: tokens of the longest context.
        measured: from `collect`.
        seed: of the paired bootstrap.
    Returns:
        nll, perplexity, bits_per_byte, ppl_ratio and context_gain by bucket and variant.
    """
    made = []
    original = measured[ORIGINAL]
    for name, mine in measured.items():
        for bucket in mine.buckets():
            if bucket.startswith("margin"):
                continue
            where = {"text": text, "bucket": bucket, "length": window}
            counts, nats = mine.counts(bucket), mine.sums(bucket, "nll")
            nll = ratio_mean(nats, counts)
            made.append(row("perplexity", "nll", name, where, nll, "nats/token"))
            made.append(row("perplexity", "perplexity", name, where, transformed(nll, math.exp), "perplexity"))
            sizes = mine.sums(bucket, "bytes")
            if sizes.sum() > 0:
                bits = transformed(ratio_mean(nats, sizes), lambda value: value / math.log(2))
                made.append(row("perplexity", "bits_per_byte", name, where, bits, "bits/byte"))
            if name != ORIGINAL:
                base = original.sums(bucket, "nll")
                ratio = paired_bootstrap(base, nats, counts, statistic="exp_difference", seed=seed)
                gap = paired_bootstrap(base, nats, counts, statistic="exp_gap", seed=seed)
                made.append(row("perplexity", "ppl_ratio", name, where, ratio, "ratio"))
                made.append(row("perplexity", "ppl_difference", name, where, gap, "perplexity"))
            if bucket == "long context":
                gain = paired_bootstrap(nats, original.sums(bucket, "short_nll"), counts, seed=seed)
                made.append(row("perplexity", "context_gain", name, where, gain, "nats/token"))
    return made
