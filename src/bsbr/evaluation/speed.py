"""Time and memory of a call: the one place where they are measured."""

import ctypes
import gc
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bsbr.evaluation.statistics import Estimate, quantiles

Regime = Literal["fixed_batch", "fixed_tokens"]
Call = Callable[[], object]

_MAX_INNER = 64
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """How contenders are timed."""

    rounds: int = 4
    """Rounds A B ... B A: each gives every contender two samples."""

    warmup: int = 2
    """Calls of each contender before the first sample; one, where a call lasts longer than a second."""

    min_sample_s: float = 0.05
    """A sample repeats the call until it lasts about this long, and divides."""

    budget_s: float = 30.0
    """Rounds are cut where one length would take longer than this."""

    least_rounds: int = 3
    """Rounds that are run whatever they take."""

    def __post_init__(self) -> None:
        for name in ("rounds", "warmup", "least_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def time_calls(
    calls: Mapping[str, Call], settings: SpeedSettings | None = None, *, device: str | torch.device = "cpu"
) -> dict[str, list[float]]:
    """Time contenders against each other, interleaved so that drift of the machine hits all alike.

    1. Warm each contender up (compilation and caches stay outside) and see how long a call lasts.
    2. In each round, sample the contenders in their order and then in reverse (A B C C B A).
    3. The device is synchronised around every sample.

    Args:
        calls: contender name to a call without arguments.
        settings: rounds, warm-up and sample length.
        device: where the work happens.
    Returns:
        Seconds per call, [2 * rounds] for each contender, in the order measured.

    Example:
        >>> samples = time_calls({"a": lambda: None}, SpeedSettings(rounds=2, min_sample_s=0.0))
        >>> len(samples["a"])
        4
    """
    settings = settings or SpeedSettings()
    inner = {}
    for name, call in calls.items():
        last = math.inf
        for _ in range(settings.warmup):
            last = min(last, _sample(call, 1, device))
            if last > 1.0:
                break
        inner[name] = min(_MAX_INNER, max(1, math.ceil(settings.min_sample_s / max(last, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, rounds, started = list(calls), settings.rounds, time.perf_counter()
    done = 0
    while done < rounds:
        for name in [*order, *reversed(order)]:
            samples[name].append(_sample(calls[name], inner[name], device))
        done += 1
        per_round = (time.perf_counter() - started) / done
        rounds = min(settings.rounds, max(settings.least_rounds, int(settings.budget_s / per_round)))
    return samples


def time_estimate(samples: list[float]) -> Estimate:
    """Median time with its 20 and 80 % quantiles.

    Args:
        samples: seconds, from `time_calls`.
    Returns:
        The estimate in seconds.
    """
    low, middle, high = quantiles(samples, [0.2, 0.5, 0.8])
    return Estimate(value=middle, low=low, high=high, n=len(samples), method="quantiles 20-80 of samples")


def speedup_estimate(base: list[float], other: list[float]) -> Estimate:
    """How many times faster `other` is than `base`, paired within rounds.

    A round's ratio is that of the summed two samples of each, so a steady drift within it cancels.

    Args:
        base, other: samples of the same `time_calls`.
    Returns:
        Median ratio with 20 and 80 % quantiles over rounds.

    Example:
        >>> speedup_estimate([2.0, 2.0], [1.0, 1.0]).value
        2.0
    """
    a, b = (np.asarray(samples).reshape(-1, 2).sum(1) for samples in (base, other))
    low, middle, high = quantiles(a / b, [0.2, 0.5, 0.8])
    return Estimate(value=middle, low=low, high=high, n=len(a), method="quantiles 20-80 of paired rounds")


def peak_bytes(call: Call, *, device: str | torch.device = "cpu") -> int | None:
    """Most memory in use during a call, above what was in use before it.

    On CUDA the allocator's own peak. On Linux the kernel's high-water mark of resident memory, reset just
    before the call after free memory has been given back: pages really touched, library buffers included.

    Args:
        call: the work; run once.
        device: where it happens.
    Returns:
        Bytes, or None where the system has no such counter.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if memory_method(device) is None:
        return None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def memory_method(device: str | torch.device = "cpu") -> str | None:
    """Say how `peak_bytes` measures here.

    Args:
        device: where the work happens.
    Returns:
        A phrase for the protocol, or None where memory cannot be measured.
    """
    if torch.device(device).type == "cuda":
        return "CUDA allocator peak above the level before the call"
    if sys.platform == "linux" and _CLEAR.exists() and hasattr(ctypes.CDLL(None), "malloc_trim"):
        return "resident-set high-water mark (VmHWM, reset before the call) above the level before the call"
    return None


def batch_for(regime: Regime, length: int, *, fixed_tokens: int) -> int:
    """Sequences per batch in a regime.

    Args:
        regime: "fixed_batch" is one sequence; "fixed_tokens" is the published one, where the tokens of a
            batch stay constant, so that total work hardly changes with the length.
        length: tokens of a sequence.
        fixed_tokens: tokens of a batch in the published regime.
    Returns:
        At least 1.

    Example:
        >>> [batch_for("fixed_tokens", length, fixed_tokens=2048) for length in (128, 1024, 4096)]
        [16, 2, 1]
    """
    return 1 if regime == "fixed_batch" else max(1, fixed_tokens // length)


def keeps_logits(model: Any) -> bool:
    """Whether a model can be told to compute the logits of the last position only.

    Args:
        model: a Hugging Face causal language model.
    Returns:
        True if its forward takes `logits_to_keep`.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def prefill_call(model: Any, input_ids: torch.Tensor, *, last_logits_only: bool = True) -> Call:
    """A forward over whole sequences, without cache or gradient, to be timed.

    Args:
        model: a Hugging Face causal language model in eval mode.
        input_ids: [B, T].
        last_logits_only: compute the logits of the last position only (a prefill); needs `keeps_logits`.
    Returns:
        A call without arguments.
    """
    extra = {"logits_to_keep": 1} if last_logits_only else {}

    def call() -> object:
        with torch.no_grad():
            return model(input_ids=input_ids, use_cache=False, **extra)

    return call


def _sample(call: Call, inner: int, device: str | torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(inner):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / inner


def _synchronise(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: expected it on Linux")
