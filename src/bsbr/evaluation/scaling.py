"""The speed part of a suite: which contenders meet at which length, and the rows that come of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsbr.evaluation.exponents import (
    ScalingFit,
    crossover,
    fit_scaling,
    local_slopes,
    loglog_slope,
    physical_fit,
)
from bsbr.evaluation.quality import ORIGINAL, Key
from bsbr.evaluation.records import RecordStore
from bsbr.evaluation.rows import row
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.similarity import random_tokens
from bsbr.evaluation.speed import (
    Regime,
    batch_for,
    keeps_logits,
    peak_bytes,
    prefill_call,
    speedup_estimate,
    time_calls,
    time_estimate,
)

PUBLISHED_PAIR = (ORIGINAL, "converted")


@dataclass(frozen=True, kw_only=True)
class Race:
    """One length in one regime, where contenders are timed against each other."""

    regime: Regime
    """fixed_batch or fixed_tokens."""

    length: int
    """Tokens of a sequence."""

    batch: int
    """Sequences."""

    contenders: tuple[str, ...]
    """Names, the original first."""

    @property
    def key(self) -> Key:
        """Where its record is kept."""
        return ("speed", self.regime, self.length, *self.contenders)


def plan_races(config: SuiteConfig, contenders: Sequence[str]) -> list[Race]:
    """List what is timed: every length at batch 1, and the published lengths at constant tokens per batch.

    Args:
        config: lengths and fixed_tokens.
        contenders: names, the original first.
    Returns:
        The races, short lengths first.
    """
    races = [
        Race(regime="fixed_batch", length=length, batch=1, contenders=tuple(contenders))
        for length in sorted(config.lengths)
    ]
    pair = tuple(name for name in contenders if name in PUBLISHED_PAIR)
    for length in sorted(config.lengths):
        # From half the tokens on, a batch holds one sequence: that is the other regime already.
        if len(pair) == 2 and 2 * length <= config.fixed_tokens:
            batch = batch_for("fixed_tokens", length, fixed_tokens=config.fixed_tokens)
            races.append(Race(regime="fixed_tokens", length=length, batch=batch, contenders=pair))
    return races


def run_race(race: Race, models: Mapping[str, Any], config: SuiteConfig) -> dict[str, Any]:
    """Time one length, then measure the memory of each contender.

    Args:
        race: what is timed.
        models: contender to model, in eval mode.
        config: how.
    Returns:
        The record: samples in seconds and peak bytes, by contender.
    """
    vocabulary = models[ORIGINAL].config.vocab_size
    ids = random_tokens(vocabulary, race.batch * race.length, seed=config.seed, index=race.length)
    ids = ids.view(race.batch, race.length).to(config.device)
    # All or none: the logits of every position cost as much as a small model's layers.
    last_only = all(keeps_logits(models[name]) for name in race.contenders)
    calls = {name: prefill_call(models[name], ids, last_logits_only=last_only) for name in race.contenders}
    record: dict[str, Any] = {"samples": time_calls(calls, config.speed, device=config.device)}
    record["last_logits_only"] = last_only
    if config.measure_memory and race.regime == "fixed_batch":
        peaks = {name: peak_bytes(call, device=config.device) for name, call in calls.items()}
        record["peak_bytes"] = {name: peak for name, peak in peaks.items() if peak is not None}
    return record


def finished(races: Sequence[Race], store: RecordStore) -> list[tuple[Race, dict[str, Any]]]:
    """Races that have been run, with their records.

    Args:
        races: planned.
        store: the records.
    Returns:
        Pairs, in the order planned.
    """
    return [(race, store.get(race.key)) for race in races if race.key in store]


def speed_rows(done: Sequence[tuple[Race, Mapping[str, Any]]], *, positions: int | None) -> list[dict[str, Any]]:
    """Rows of scaling_results.json.

    Args:
        done: from `finished`.
        positions: positions the model was trained on; lengths beyond are marked as extrapolated.
    Returns:
        time_s, tokens_per_s, speedup and peak_bytes by length, regime and contender.
    """
    made = []
    for race, record in done:
        where = {"length": race.length, "batch": race.batch, "regime": race.regime}
        extra: dict[str, Any] = {"volatile": True}
        if positions is not None and race.length > positions:
            extra["extrapolated"] = True
        tokens = race.length * race.batch
        for name in race.contenders:
            samples = record["samples"][name]
            time = time_estimate(samples)
            rate = time_estimate([tokens / sample for sample in samples])
            made.append(row("speed", "time_s", name, where, time, "s", extra=extra))
            made.append(row("speed", "tokens_per_s", name, where, rate, "tokens/s", extra=extra))
            if name != ORIGINAL:
                ratio = speedup_estimate(record["samples"][ORIGINAL], samples)
                made.append(row("speed", "speedup", name, where, ratio, "ratio", extra=extra))
            if name in record.get("peak_bytes", {}):
                peak = record["peak_bytes"][name]
                made.append(row("speed", "peak_bytes", name, where, float(peak), "bytes", extra=extra))
    return made


def exponent_rows(done: Sequence[tuple[Race, Mapping[str, Any]]], *, seed: int) -> list[dict[str, Any]]:
    """Rows of scaling_exponents.json.

    Args:
        done: from `finished`.
        seed: of the bootstrap.
    Returns:
        At fixed batch exponent, constant_s, coefficient, loglog_slope, local_slope, the terms of the physical
        model, and crossover_length against the original; at constant tokens per batch, where time is no
        function of the length alone, only loglog_slope as published.
    """
    made: list[dict[str, Any]] = []
    for regime in dict.fromkeys(race.regime for race, _ in done):
        mine = [(race, record) for race, record in done if race.regime == regime]
        samples: dict[str, dict[int, list[float]]] = {}
        for race, record in mine:
            for name in race.contenders:
                samples.setdefault(name, {})[race.length] = record["samples"][name]
        lengths = [race.length for race, _ in mine]
        where = {"regime": regime, "fit_from": min(lengths), "fit_to": max(lengths)}
        for name, timings in samples.items():
            slope = loglog_slope(timings, seed=seed)
            if slope is not None:
                made.append(_volatile("loglog_slope", name, where, slope, "exponent"))
        if regime == "fixed_batch":
            fits = {name: fit_scaling(timings, seed=seed) for name, timings in samples.items()}
            for name, timings in samples.items():
                made += _fit_rows(name, where, fits[name], timings)
                made += _crossover_rows(name, where, fits[ORIGINAL], fits[name])
    return made


def legacy_speed(done: Sequence[tuple[Race, Mapping[str, Any]]]) -> dict[str, Any]:
    """The published file's keys, at constant tokens per batch.

    Args:
        done: from `finished`.
    Returns:
        "original" and "bsbr": one entry per length; empty where that regime was not run.
    """
    made: dict[str, list[dict[str, Any]]] = {}
    for race, record in done:
        if race.regime != "fixed_tokens":
            continue
        for name in race.contenders:
            samples = np.asarray(record["samples"][name])
            made.setdefault("original" if name == ORIGINAL else "bsbr", []).append(
                {
                    "mean_time": float(samples.mean()),
                    "std_time": float(samples.std()),
                    "median_time": float(np.median(samples)),
                    "min_time": float(samples.min()),
                    "max_time": float(samples.max()),
                    "seq_length": race.length,
                    "batch_size": race.batch,
                    "tokens_per_batch": race.length * race.batch,
                }
            )
    return dict(made)


def legacy_exponents(rows: Sequence[Mapping[str, Any]], speed: Mapping[str, Any]) -> dict[str, Any]:
    """The published file's keys: straight log-log slopes at constant tokens per batch.

    Args:
        rows: from `exponent_rows`.
        speed: from `legacy_speed`.
    Returns:
        original_exponent, bsbr_exponent, speedup_at_max_length; empty where not measured.
    """
    slopes = {
        entry["variant"]: entry["value"]
        for entry in rows
        if entry["metric"] == "loglog_slope" and entry["slice"]["regime"] == "fixed_tokens"
    }
    if not set(PUBLISHED_PAIR) <= set(slopes):
        return {}
    first, second = (speed[side][-1]["mean_time"] for side in ("original", "bsbr"))
    return {
        "original_exponent": slopes[ORIGINAL],
        "bsbr_exponent": slopes["converted"],
        "speedup_at_max_length": first / second,
    }


def _fit_rows(
    name: str, where: Mapping[str, Any], fit: ScalingFit | None, timings: Mapping[int, list[float]]
) -> list[dict[str, Any]]:
    made = [
        _volatile("local_slope", name, dict(where) | {"length": length}, slope, "exponent")
        for length, slope in local_slopes(timings)
    ]
    if fit is None:
        return made
    for metric, unit in (("exponent", "exponent"), ("constant_s", "s"), ("coefficient", "s/token^k")):
        made.append(_volatile(metric, name, where, fit.estimate(metric), unit))
    physical = physical_fit(timings)
    if physical is not None:
        units = {"constant_s": "s", "linear": "s/token", "quadratic": "s/token^2", "relative_error": "ratio"}
        made += [_volatile(f"physical_{key}", name, where, physical[key], unit) for key, unit in units.items()]
    return made


def _crossover_rows(
    name: str, where: Mapping[str, Any], base: ScalingFit | None, fit: ScalingFit | None
) -> list[dict[str, Any]]:
    if name == ORIGINAL or base is None or fit is None:
        return []
    found, outside = crossover(base, fit)
    if found is None:
        missing = row("exponents", "crossover_length", name, where, 0.0, "tokens", extra={"volatile": True})
        return [missing | {"value": None, "reason": "the fitted curves do not cross, or not clearly"}]
    return [_volatile("crossover_length", name, where, found, "tokens", extra={"extrapolated": outside})]


def _volatile(
    metric: str,
    name: str,
    where: Mapping[str, Any],
    value: Any,
    unit: str,
    *,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return row("exponents", metric, name, where, value, unit, extra={"volatile": True, **(extra or {})})
