"""The five result files, computed from records alone, and the figures a summary quotes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bsbr.evaluation.agreement_rows import agreement_rows, noise_rows
from bsbr.evaluation.buckets import KEY_TOKEN_NATS
from bsbr.evaluation.legacy import LEGACY_PAIR, legacy_key
from bsbr.evaluation.measured import collect, exposure_rows
from bsbr.evaluation.perplexity_rows import perplexity_rows
from bsbr.evaluation.provenance import header
from bsbr.evaluation.quality import NOISE_BATCH, NOISE_DTYPE, ORIGINAL, Key, Place
from bsbr.evaluation.records import RecordStore, digest
from bsbr.evaluation.rows import row
from bsbr.evaluation.scaling import (
    Race,
    exponent_rows,
    finished,
    legacy_exponents,
    legacy_speed,
    speed_rows,
)
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.similarity_rows import (
    legacy_similarity,
    random_records,
    similarity_histograms,
    similarity_rows,
    text_records,
)
from bsbr.evaluation.speed import memory_method
from bsbr.evaluation.statistics import Estimate

SPEED = "scaling_results.json"
EXPONENTS = "scaling_exponents.json"
PERPLEXITY = "quality_results_wikitext.json"
SIMILARITY = "similarity_metrics.json"
AGREEMENT = "agreement_rates.json"
RESULT_FILES = (SPEED, EXPONENTS, PERPLEXITY, SIMILARITY, AGREEMENT)

_OF_THE_RUN = (
    "original", "bsbr", "command", "machine", "original_exponent", "bsbr_exponent", "speedup_at_max_length", "digest",
    "run", "timing",
)  # fmt: skip
"""Top-level keys that differ between two runs of the same thing, or that depend on the digest."""

_HEADLINE = (
    (AGREEMENT, ("top1_agreement", "overlap@5", "kl", "kl_p99")),
    (PERPLEXITY, ("perplexity", "ppl_ratio", "bits_per_byte")),
    (SIMILARITY, ("cosine", "relative_l2")),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is about: everything the files need beside the records."""

    config: SuiteConfig
    """Settings."""

    places: Sequence[Place]
    """Windows planned."""

    races: Sequence[Race]
    """Timings planned."""

    planned: Sequence[Key]
    """Every record planned."""

    quality_names: Sequence[str]
    """Variants of the quality part."""

    exposed_from: int | None
    """First exposed position."""

    legacy: str | None
    """Text of the row-by-row perplexity."""

    model: Mapping[str, Any]
    """The original."""

    data: Mapping[str, Any]
    """Texts and tokenizer."""

    variants: Mapping[str, Any]
    """Settings of each variant."""

    command: tuple[str, ...]
    """Arguments that repeat the run."""

    dtype: str
    """Of the weights."""

    attention: Mapping[str, str]
    """Attention implementation of each model."""


def result_files(run: Run, store: RecordStore, *, seconds: float) -> dict[str, dict[str, Any]]:
    """Compute the content of the result files from the records.

    Args:
        run: what was planned.
        store: what has been measured.
        seconds: how long the run took.
    Returns:
        File name to content; a file without rows is absent. "run" holds what differs between two runs of the
        same thing, and "digest" is computed without it and without the rows marked volatile (time, memory).
    """
    done = finished(run.races, store)
    exponents = exponent_rows(done, seed=run.config.seed)
    speed = legacy_speed(done)
    contents: dict[str, dict[str, Any]] = {
        SPEED: {"rows": speed_rows(done, positions=run.config.trained_positions), **speed},
        EXPONENTS: {"rows": exponents, **legacy_exponents(exponents, speed)},
        **_quality_contents(run, store),
    }
    missing = [key for key in run.planned if key not in store]
    status = "partial" if missing else "complete"
    top = header(
        status=status,
        command=run.command,
        model=run.model,
        data=run.data,
        protocol=_protocol(run),
        config=_config(run),
        device=run.config.device,
        dtype=run.dtype,
    )
    files = {}
    for name, content in contents.items():
        if content["rows"]:
            file = top | content | {"progress": {"done": len(run.planned) - len(missing), "planned": len(run.planned)}}
            file["digest"] = content_digest(file)
            files[name] = file | {"run": {"seconds": round(seconds, 1), "resumed_records": store.resumed}}
    return files


def headline(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Pick the figures that a summary quotes.

    Args:
        files: from `result_files`.
    Returns:
        "status"; "positions" ("exposed" or "all"); "quality": text to variant to metric to value over exposed
        positions (all positions where none is exposed; similarity at the last layer under the inputs "text"
        and "random"); "speedup": variant to length to value at batch 1; "exponent": variant to value.
    """
    chosen: dict[str, Any] = {"status": "partial", "positions": "all", "quality": {}}
    chosen |= {"speedup": {}, "exponent": {}}
    for file, metrics in _HEADLINE:
        for entry in files.get(file, {}).get("rows", []):
            where = entry["slice"]
            if entry["metric"] not in metrics or entry["value"] is None:
                continue
            if where.get("bucket", "exposed") not in ("all", "exposed") or where.get("layer", "last") != "last":
                continue
            text = where.get("text") or where.get("input")
            place = chosen["quality"].setdefault(text, {}).setdefault(entry["variant"], {})
            # Rows over all positions come first in a file: those over exposed ones then take their place.
            place[entry["metric"]] = entry["value"]
            if where.get("bucket") == "exposed":
                chosen["positions"] = "exposed"
    for entry in files.get(SPEED, {}).get("rows", []):
        if entry["metric"] == "speedup" and entry["slice"]["regime"] == "fixed_batch":
            chosen["speedup"].setdefault(entry["variant"], {})[entry["slice"]["length"]] = entry["value"]
    for entry in files.get(EXPONENTS, {}).get("rows", []):
        if entry["metric"] == "exponent":
            chosen["exponent"][entry["variant"]] = entry["value"]
    if files:
        chosen["status"] = next(iter(files.values()))["status"]
    return chosen


def _quality_contents(run: Run, store: RecordStore) -> dict[str, dict[str, Any]]:
    names = [ORIGINAL, *run.quality_names]
    seed, window = run.config.seed, run.config.window
    perplexities: list[dict[str, Any]] = []
    agreements: list[dict[str, Any]] = []
    for text in dict.fromkeys(place.text for place in run.places):
        measured = collect(run.places, store, text, names)
        if not measured:
            continue
        perplexities += perplexity_rows(text, window, measured, seed=seed)
        perplexities += exposure_rows("perplexity", text, measured)
        agreements += agreement_rows(text, measured, exposed_from=run.exposed_from, seed=seed)
        agreements += exposure_rows("agreement", text, measured)
        noisy = [place for place in run.places if place.noise and place.text == text]
        agreements += noise_rows(text, collect(noisy, store, text, [NOISE_BATCH, NOISE_DTYPE]))
    legacy = _legacy_perplexity(run, store)
    on_text = text_records(run.places, store, run.quality_names)
    on_random = random_records(run.config.random_samples, store, run.quality_names)
    similarity = similarity_rows("text", on_text) + similarity_rows("random", on_random)
    histograms = similarity_histograms("text", on_text) + similarity_histograms("random", on_random)
    return {
        PERPLEXITY: {"rows": perplexities + legacy.pop("rows"), **legacy},
        AGREEMENT: {"rows": agreements, **_legacy_rates(agreements)},
        SIMILARITY: {"rows": similarity, "histograms": histograms, **legacy_similarity(on_random)},
    }


def _legacy_perplexity(run: Run, store: RecordStore) -> dict[str, Any]:
    made: dict[str, Any] = {"rows": []}
    values = {}
    for name in LEGACY_PAIR:
        if run.legacy is None or legacy_key(name) not in store:
            continue
        record = store.get(legacy_key(name))
        if "perplexity" in record:
            values[name] = record["perplexity"]
            where = {"text": run.legacy, "rows": 50}
            value = Estimate(value=record["perplexity"], n=record["n"])
            made["rows"].append(row("perplexity", "perplexity_row_by_row_legacy", name, where, value, "perplexity"))
    if len(values) == 2:
        before, after = values[ORIGINAL], values["converted"]
        made |= {
            "original_perplexity": before,
            "bsbr_perplexity": after,
            "perplexity_difference_percent": (after - before) / before * 100,
        }
    return made


def _legacy_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The published file's keys: any-overlap rates of the converted model, on the first text."""
    found: dict[str, float] = {}
    for entry in rows:
        name, _, k = entry["metric"].partition("@")
        if name == "any_overlap" and entry["variant"] == "converted" and entry["slice"]["bucket"] == "all":
            found.setdefault(k, entry["value"])
    return found


def _protocol(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        **config.to_dict(),
        "exposed_from": run.exposed_from,
        "min_context": config.window - config.resolved_stride,
        "batch": 1,
        "packing": "none: documents apart",
        "attention": dict(run.attention),
        "key_tokens": f"tokens the original predicts better by more than {KEY_TOKEN_NATS:g} nats with the "
        "window than with the short context",
        "memory": memory_method(config.device),
        "interval": "95 %: quality by document (Student t, or paired bootstrap); time 20-80 % quantiles",
    }


def _config(run: Run) -> dict[str, Any]:
    converted: Mapping[str, Any] = run.variants.get("converted") or next(iter(run.variants.values()), {})
    fixed_tokens = [race for race in run.races if race.regime == "fixed_tokens"]
    return {
        "bsbr": dict(converted),
        "variants": dict(run.variants),
        "model_name": run.model["name"],
        "chunk_size": converted.get("block_size"),
        "num_repeats": 2 * run.config.speed.rounds,
        "seq_lengths": [race.length for race in fixed_tokens],
        "batch_sizes": [race.batch for race in fixed_tokens],
    }


def content_digest(file: Mapping[str, Any]) -> str:
    """SHA-256 of what two runs of the same thing have in common: all but times, machine and command.

    Args:
        file: content of a result file, as it is made or as it was read.
    Returns:
        64 hexadecimal digits, as in its key "digest".
    """
    rows = [entry for entry in file["rows"] if not entry.get("volatile")]
    return digest({key: value for key, value in file.items() if key not in _OF_THE_RUN} | {"rows": rows})
