"""sweep.json, computed from the records of a sweep alone."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bsbr.evaluation.provenance import header
from bsbr.evaluation.quality import ORIGINAL
from bsbr.evaluation.records import RecordStore
from bsbr.evaluation.results import content_digest
from bsbr.evaluation.rows import row
from bsbr.evaluation.speed import speedup_estimate, time_estimate
from bsbr.evaluation.statistics import paired_bootstrap, ratio_mean, transformed
from bsbr.evaluation.sweep_plan import Batch, Sweep
from bsbr.evaluation.sweep_points import Point, SweepConfig, keys_read

PER_POINT = ("retrieval_block_size", "top_k")
"""Settings that are a point's own; the rows have them."""


def sweep_file(sweep: Sweep, store: RecordStore, about: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """Compute the content of sweep.json.

    Args:
        sweep: what was planned.
        store: what has been measured.
        about: model, data, calibration, dtype, attention implementation and command of the run.
        seconds: how long this run took.
    Returns:
        The header that every result file has, `rows`, `progress`, `digest`, and `run` for what differs between two
        runs of the same thing. Windows that some method has not been measured on yet are left out for all.
    """
    config = sweep.config
    missing = sum(key not in store for key in sweep.work)
    rows = []
    for length in config.lengths:
        rows += _density_rows(config, length)
        for text in dict.fromkeys(batch.text for batch in sweep.batches):
            rows += _quality_rows(sweep, store, text, length)
        rows += _time_rows(config, length, store)
    shared = {key: value for key, value in config.attention.to_dict().items() if key not in PER_POINT}
    top = header(
        status="partial" if missing else "complete",
        command=about["command"],
        model=about["model"],
        data=about["data"],
        protocol=_protocol(config, about),
        config=shared | {"budgets": list(config.budgets), "units": list(config.units)},
        device=config.device,
        dtype=about["dtype"],
    )  # fmt: skip
    file = top | {"rows": rows, "progress": {"done": len(sweep.work) - missing, "planned": len(sweep.work)}}
    samples = {str(length): store.get(key) for length in config.lengths if (key := ("time", length)) in store}
    return file | {
        "digest": content_digest(file),
        "timing": samples,
        "run": {"seconds": round(seconds, 1), "resumed_records": store.resumed},
    }


def place(length: int, point: Point | None) -> dict[str, Any]:
    """Return the part of a slice that says at which length and point.

    Args:
        length: tokens of a window.
        point: unit and top_k; None for what has none.
    Returns:
        A slice.

    Example:
        >>> place(1024, Point(32, 8))
        {'length': 1024, 'retrieval_block_size': 32, 'top_k': 8}
    """
    where = {"length": length}
    return where if point is None else where | {"retrieval_block_size": point.unit, "top_k": point.top_k}


def _density_rows(config: SweepConfig, length: int) -> list[dict[str, Any]]:
    bucket, (low, high) = next(iter(config.buckets(length).items()))
    return [
        row(
            "sweep", "keys_read", "all_methods", {**place(length, point), "bucket": bucket},
            keys_read(config.settings("converted", point), low, high - 1), "share",
        )
        for point in config.points
    ]  # fmt: skip


def _quality_rows(sweep: Sweep, store: RecordStore, text: str, length: int) -> list[dict[str, Any]]:
    config = sweep.config
    mine = [batch for batch in sweep.batches if (batch.text, batch.length) == (text, length)]
    measured = [(method, point) for point in config.points for method in sweep.methods]
    done = [b for b in mine if b.key(ORIGINAL) in store and all(b.key(*pair) in store for pair in measured)]
    if not done:
        return []
    documents = max(batch.document for batch in mine) + 1
    made = []
    for bucket in config.buckets(length):
        where = {"text": text, "bucket": bucket}
        before = _sums(store, done, documents, bucket, ORIGINAL, None)
        counts = before["n"]
        if not counts.any():
            continue
        nll = transformed(ratio_mean(before["nll"], counts), math.exp)
        made.append(row("sweep", "perplexity", ORIGINAL, where | place(length, None), nll, "perplexity"))
        for method, point in measured:
            found = _sums(store, done, documents, bucket, method, point)
            here = where | place(length, point)
            for metric, unit in (("kl", "nats"), ("top1_agreement", "share")):
                mean = ratio_mean(found[metric], counts, share=metric == "top1_agreement")
                made.append(row("sweep", metric, method, here, mean, unit))
            ratio = paired_bootstrap(before["nll"], found["nll"], counts, statistic="exp_difference", seed=config.seed)
            made.append(row("sweep", "ppl_ratio", method, here, ratio, "ratio"))
    return made


def _sums(
    store: RecordStore, done: list[Batch], documents: int, bucket: str, method: str, point: Point | None
) -> dict[str, np.ndarray]:
    """Per-document sums of each metric over a bucket, [documents]."""
    totals = {name: np.zeros(documents) for name in ("n", "kl", "top1_agreement", "nll")}
    for batch in done:
        record = store.get(batch.key(method, point)).get(bucket, {})
        for name in totals:
            totals[name][batch.document] += record.get(name, 0.0)
    return totals


def _time_rows(config: SweepConfig, length: int, store: RecordStore) -> list[dict[str, Any]]:
    if ("time", length) not in store:
        return []
    samples, made = store.get(("time", length))["seconds"], []
    for contender, seconds in samples.items():
        method, *numbers = contender.split("/")
        where = place(length, Point(*map(int, numbers)) if numbers else None)
        made.append(row("sweep", "time_s", method, where, time_estimate(seconds), "s", extra={"volatile": True}))
        if contender != ORIGINAL:
            faster = speedup_estimate(samples[ORIGINAL], seconds)
            made.append(row("sweep", "speedup", method, where, faster, "ratio", extra={"volatile": True}))
    return made


def _protocol(config: SweepConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: value for key, value in config.to_dict().items() if key != "attention"},
        "lengths": list(config.lengths),
        "positions": {str(length): next(iter(config.buckets(length))) for length in config.lengths},
        "calibration": about["calibration"],
        "attention": {ORIGINAL: about["attention"]},
        "keys_read": "share of the keys up to the query's position that are read exactly, over those positions, if "
        "every head reads top_k blocks; where they are spread over heads, at most that",
        "time": "one forward of the whole model over one window without cache, contenders in turn",
        "interval": "95 %: by document (Student t, or paired bootstrap); time 20-80 % quantiles",
    }
