"""Invented result files for the tests of the report: the figures are made up and mean nothing."""

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bsbr.report import render

FAKE_NAME = "fixture-model (invented figures)"

FITS = {
    "original": (0.0150, 7.3e-7, 1.71),
    "converted": (0.0061, 1.12e-4, 1.02),
    "converted_sparse": (0.0061, 1.12e-4, 1.02),
    "value_only": (0.0040, 1.1e-4, 1.00),
}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
VARIANTS = ("converted", "uncalibrated", "moba", "local", "states", "additive")
DAMAGE = {"converted": 1.0, "uncalibrated": 1.3, "moba": 2.6, "local": 5.0, "states": 2.0, "additive": 60.0}
TOP1 = {
    "converted": 0.956,
    "uncalibrated": 0.944,
    "moba": 0.913,
    "local": 0.842,
    "states": 0.931,
    "additive": 0.004,
}
RATIO = {
    "converted": 1.012,
    "uncalibrated": 1.017,
    "moba": 1.061,
    "local": 1.24,
    "states": 1.03,
    "additive": 41380.2,
}


def document(rows: list[dict], name: str, note: str, **extra: Any) -> dict:
    """One result file with the top-level keys of the contract."""
    return {
        "schema": {"name": "bsbr-results", "version": 1},
        "status": "complete",
        "command": ["bsbr", "evaluate", name, "--block-size", "128", "--top-k", "8"],
        "code": {
            "bsbr": "0.1.0",
            "commit": "0000000",
            "torch": "2.13.0",
            "transformers": "5.17.0",
            "python": "3.11.9",
        },
        "machine": {"cpu": "invented", "threads": 2, "device": "cpu", "dtype": "float32"},
        "model": {"name": name, "type": "llama", "parameters": 28_000_000, "sha256": "00" * 32},
        "data": {"name": "wikitext", "documents": 41, "note": note},
        "protocol": {"window": 8192, "stride": 4096, "bos": False, "batch": 1},
        "config": {"block_size": 128, "top_k": 8, "far": "moments", "state": "global", "dense_below": 1024},
        "rows": rows,
        **extra,
    }


def row(evaluation: str, metric: str, variant: str, value: float, spread: float = 0.0, **position: Any) -> dict:
    """One tidy row; `spread` is half its interval."""
    made = {"evaluation": evaluation, "metric": metric, "variant": variant, "slice": position, "value": value}
    if spread:
        made |= {
            "ci_low": value - spread,
            "ci_high": value + spread,
            "ci_method": "document-clustered Student t",
        }
        made |= {"n": 61_440, "clusters": 41}
    return made | {"unit": ""}


def seconds(variant: str, length: int, batch: float = 1) -> float:
    """An invented time of one forward pass."""
    constant, coefficient, exponent = FITS["original" if variant == "converted" and length <= 1024 else variant]
    return constant + batch * coefficient * length**exponent


def speed(name: str, note: str) -> dict:
    """scaling_results.json."""
    rows = []
    noise = random.Random(0)
    for regime, lengths in (("fixed_batch", LENGTHS), ("fixed_tokens", (128, 256, 512, 1024))):
        for length in lengths:
            batch = 1 if regime == "fixed_batch" else 2048 // length
            place = {"length": length, "batch": batch, "regime": regime}
            base = seconds("original", length, batch)
            for variant in ("original", "converted", "converted_sparse", "value_only"):
                time = seconds(variant, length, batch) * (1 + noise.gauss(0, 0.01))
                rows.append(row("speed", "time_s", variant, time, 0.03 * time, **place))
                rows.append(row("speed", "tokens_per_s", variant, batch * length / time, 0.03 * length / time, **place))
                rows.append(row("speed", "peak_bytes", variant, 4e8 + 9000.0 * length * batch, **place))
                if variant != "original":
                    rows.append(row("speed", "speedup", variant, base / time, 0.02 * base / time, **place))
    return document(rows, name, note)


def exponents(name: str, note: str) -> dict:
    """scaling_exponents.json."""
    place = {"regime": "fixed_batch", "fit_from": 128, "fit_to": 32768}
    rows = []
    for variant, (a, b, k) in FITS.items():
        if variant != "converted":
            values = (("exponent", k, 0.03), ("constant_s", a, 0.001), ("coefficient", b, 0.05 * b))
            values += (("loglog_slope", 0.86 * k, 0.1),)
            rows += [row("scaling", m, variant, value, spread, **place) for m, value, spread in values]
    place = place | {"fit_from": 2048}
    for metric, value, spread in (
        ("exponent", 1.02, 0.04),
        ("constant_s", 0.0061, 0.001),
        ("coefficient", 1.12e-4, 6e-6),
    ):
        rows.append(row("scaling", metric, "converted", value, spread, **place))
    rows.append(row("scaling", "local_slope", "original", 1.69, length=8192, **(place | {"fit_from": 128})))
    rows.append(row("scaling", "physical_linear", "original", 1.1e-4, **(place | {"fit_from": 128})))
    rows.append(row("scaling", "crossover_length", "converted", 1530.0, 160.0, **place))
    return document(rows, name, note)


def perplexity(name: str, note: str) -> dict:
    """quality_results_wikitext.json."""
    rows = []
    for text, base in (("wikitext", 31.42), ("book", 38.77)):
        for bucket in ("all", "exposed", "0-256", "256-2048", "2048-8192"):
            place = {"text": text, "bucket": bucket, "length": 8192}
            for variant in ("original", *VARIANTS):
                ratio = 1.0 if variant == "original" else RATIO[variant] ** (0.8 if bucket == "all" else 1.0)
                value = base * ratio
                rows.append(row("perplexity", "perplexity", variant, value, 0.06 * value, **place))
                rows.append(row("perplexity", "nll", variant, math.log(value), 0.06, **place))
                rows.append(row("perplexity", "bits_per_byte", variant, math.log(value) / 3.1, 0.02, **place))
                if variant != "original":
                    rows.append(row("perplexity", "ppl_ratio", variant, ratio, 0.12 * abs(ratio - 1), **place))
    for variant, value in (("original", 44.1), ("converted", 44.9)):
        rows.append(row("perplexity", "perplexity_row_by_row_legacy", variant, value, text="wikitext", rows=50))
    return document(rows, name, note)


def bell(centre: float, width: float, edges: list[float]) -> list[int]:
    """Counts of an invented log-normal distribution over bins."""
    middles = (math.sqrt(max(low, 1e-9) * max(high, 1e-9)) for low, high in pairwise(edges))
    return [round(4000 * math.exp(-0.5 * (math.log(middle / centre) / width) ** 2)) for middle in middles]


def similarity(name: str, note: str) -> dict:
    """similarity_metrics.json."""
    rows, histograms = [], []
    for variant in VARIANTS:
        for source, factor in (("text", 1.0), ("random", 1.6)):
            for layer in (1, 2, 3, 4, 5, 6, "last"):
                depth = 6 if layer == "last" else layer
                harm = DAMAGE[variant] * factor * depth / 6
                place = {"layer": layer, "input": source}
                rows.append(row("similarity", "cosine", variant, math.exp(-0.004 * harm), 0.0008, **place))
                rows.append(row("similarity", "mse", variant, 0.02 * harm, 0.001, **place))
                rows.append(row("similarity", "relative_l2", variant, math.sqrt(0.008 * harm), 0.003, **place))
                rows.append(row("similarity", "feature_kl_legacy", variant, 0.003 * harm, 0.0003, **place))
            place = {"layer": "last", "input": source}
            distances = [10 ** (-5 + i / 15) for i in range(80)]
            cosine = [1 - distance for distance in reversed(distances)]
            counts = list(reversed(bell(0.004 * DAMAGE[variant] * factor, 0.7, distances)))
            histograms.append(
                {"metric": "cosine", "variant": variant, "slice": place, "edges": cosine, "counts": counts}
            )
            logged = [10 ** (-5 + i / 15) for i in range(106)]
            for metric, centre in (("mse", 0.02), ("feature_kl_legacy", 0.003)):
                made = bell(centre * DAMAGE[variant] * factor, 0.6, logged)
                histograms.append(
                    {"metric": metric, "variant": variant, "slice": place, "edges": logged, "counts": made}
                )
    return document(rows, name, note, histograms=histograms)


def agreement(name: str, note: str) -> dict:
    """agreement_rates.json."""
    rows, histograms = [], []
    for bucket in ("all", "exposed", "0-256", "256-2048", "2048-8192"):
        for variant in VARIANTS:
            top1 = TOP1[variant] if bucket != "0-256" else min(1.0, TOP1[variant] + 0.04)
            rates = {
                "top1_agreement": top1,
                "any_overlap@1": top1,
                "any_overlap@5": 1 - (1 - top1) ** 3,
                "any_overlap@10": 1 - (1 - top1) ** 4,
                "teacher_in_topk@5": 1 - (1 - top1) ** 2,
                "teacher_in_topk@10": 1 - (1 - top1) ** 2.4,
                "student_in_topk@5": 1 - (1 - top1) ** 1.9,
                "overlap@5": top1**1.2,
                "overlap@10": top1**1.1,
                "same_set@5": top1**6,
            }
            harm = DAMAGE[variant] * 0.0097
            figures = {
                "kl": harm,
                "reverse_kl": harm * 1.1,
                "kl_p50": harm / 3,
                "kl_p90": harm * 2.5,
                "kl_p99": harm * 9,
            }
            figures |= {"kl_max": harm * 80, "js": harm / 4, "total_variation": math.sqrt(harm) / 3}
            figures |= {
                "delta_p_rms": min(0.3, math.sqrt(harm) / 4),
                "ln_ppl_ratio": math.log(RATIO[variant]),
            }
            rows += [row("agreement", m, variant, v, 0.08 * min(v, 1 - v), bucket=bucket) for m, v in rates.items()]
            rows += [row("agreement", m, variant, v, 0.06 * v, bucket=bucket) for m, v in figures.items()]
    for variant, kl in (("noise_floor", 3.1e-11), ("noise_bfloat16", 1.7e-4)):
        rows.append(row("agreement", "kl", variant, kl, text="wikitext", bucket="all"))
    rows.append(row("agreement", "kl_p99.9", "converted", 0.31, bucket="exposed"))
    rows.append(row("agreement", "exposure", "converted", 0.86, bucket="all"))
    edges = [10 ** (-6 + i / 10) for i in range(91)]
    for variant in VARIANTS:
        counts = bell(DAMAGE[variant] * 0.004, 1.6, edges)
        place = {"bucket": "exposed", "input": "text"}
        histograms.append({"metric": "kl", "variant": variant, "slice": place, "edges": edges, "counts": counts})
    return document(rows, name, note, histograms=histograms)


def sweep(name: str, note: str) -> dict:
    """sweep.json."""
    harm = {"converted": 1.0, "uncalibrated": 2.4, "moba": 2.0, "window": 60.0, "oracle": 0.5, "random": 20.0}
    rows = []
    for length in (2048, 8192):
        rows.append(row("sweep", "time_s", "original", length * 1e-4, length * 1e-6, length=length))
        rows.append(row("sweep", "time_s", "value_only", length * 2e-5, length * 1e-6, length=length))
        for unit, budget in ((128, 256), (32, 256), (128, 1024)):
            point = {"length": length, "retrieval_block_size": unit, "top_k": budget // unit}
            main = f"{length // 4}-{length}"
            rows.append(row("sweep", "keys_read", "all_methods", (64 + budget) / length, bucket=main, **point))
            for kind, factor in harm.items():
                if kind in ("converted", "moba", "window"):
                    time = length * (3e-5 + 1e-8 * budget + 3e-7 * (128 // unit))
                    rows.append(row("sweep", "time_s", kind, time, 0.02 * time, **point))
                    rows.append(row("sweep", "speedup", kind, length * 1e-4 / time, 0.03, **point))
                for low, high in ((length // 4, length), (0, 256), (256, 1024), (1024, length)):
                    place = {"text": "book", "bucket": f"{low}-{high}", **point}
                    kl = 0.0 if high == 256 else 0.02 * factor * (unit / 128) ** 0.5 * 256 / budget
                    rows.append(row("sweep", "kl", kind, kl, 0.2 * kl, **place))
                    rows.append(row("sweep", "top1_agreement", kind, math.exp(-2 * kl), 0.005, **place))
                    rows.append(row("sweep", "ppl_ratio", kind, 1 + 1.3 * kl, 0.2 * kl, **place))
        for low, high in ((length // 4, length), (0, 256), (256, 1024), (1024, length)):
            place = {"text": "book", "length": length, "bucket": f"{low}-{high}"}
            rows.append(row("sweep", "perplexity", "original", 38.7, 1.1, **place))
    return document(rows, name, note)


FILES = {
    "scaling_results": speed,
    "scaling_exponents": exponents,
    "quality_results_wikitext": perplexity,
    "similarity_metrics": similarity,
    "agreement_rates": agreement,
    "sweep": sweep,
}


def write_sample(
    folder: Path, names: tuple[str, ...] = tuple(FILES), model: str = FAKE_NAME, note: str = "plain"
) -> Path:
    """Write some of the files into a folder.

    Args:
        folder: where to; it is made.
        names: result files, without .json.
        model, note: foreign text in the files.
    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(FILES[name](model, note)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sample() -> Callable[..., Path]:
    """The function that writes invented result files."""
    return write_sample


@pytest.fixture(scope="session")
def edit() -> Callable[..., Path]:
    """A function that changes one result file of a folder in place and returns the folder."""

    def edited(folder: Path, name: str, change: Callable[[dict], object]) -> Path:
        path = folder / f"{name}.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        change(document)
        path.write_text(json.dumps(document), encoding="utf-8")
        return folder

    return edited


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all result files and the whole report."""
    folder = write_sample(tmp_path_factory.mktemp("results"))
    render(folder)
    return folder
