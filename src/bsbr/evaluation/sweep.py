"""The sweep: quality of several methods against the share of keys read and against time, resumable."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bsbr.errors import UserError
from bsbr.evaluation.fidelity import Predictions, check_head, compare_predictions, predict, sum_by_position
from bsbr.evaluation.progress import EvaluationProgress
from bsbr.evaluation.provenance import describe_model
from bsbr.evaluation.quality import ORIGINAL, Key
from bsbr.evaluation.records import RecordStore, digest, pack, unpack
from bsbr.evaluation.routing import Oracle, Random, Recent, route
from bsbr.evaluation.speed import keeps_logits, prefill_call, time_calls
from bsbr.evaluation.sweep_plan import Batch, Sweep, describe_data, plan_sweep
from bsbr.evaluation.sweep_points import TIMED, Point, SweepConfig
from bsbr.evaluation.sweep_rows import sweep_file
from bsbr.files import remove_temporaries, write_json
from bsbr.hf.convert import convert
from bsbr.peers import ValueOnlyConfig

RECORDS, RESULT = "sweep_records.jsonl", "sweep.json"
FLOOR = "value_only"

Calibrate = Callable[[Any, int], object]
"""Fits a converted model in place, for windows of so many tokens."""


@torch.no_grad()  # Ctrl-C within an inner one can leave it on; this one puts back what was
def run_sweep(
    original: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    calibrate: Calibrate | None,
    config: SweepConfig,
    output_dir: str | Path,
    resume: bool = False,
    *,
    calibration: Mapping[str, Any] | None = None,
    name: str | None = None,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the frontier of quality against density, and write sweep.json.

    1. For each length and point the conversion is calibrated once, and its scalars are kept.
    2. Each batch of windows goes through the original once and through every method at every point; each result is
       kept at once, so that `resume` repeats nothing.
    3. The methods that have a time of their own are timed in turn with the original and with no attention at all,
       on the first windows.

    Args:
        original: a Hugging Face causal language model in eval mode, on `config.device`.
        tokenizer: its tokenizer.
        texts: name to documents; the document is the unit of independence.
        calibrate: fits a converted model; None leaves the calibrated methods out.
        config: settings.
        output_dir: where the file goes.
        resume: go on from the records there.
        calibration: how `calibrate` fits, for the file; decides with the rest whether records belong to this run.
        name: what to call the model.
        command: arguments that repeat the run, for the file.
        console: where to show progress; None shows none.
    Returns:
        The content of sweep.json.
    Raises:
        UserError: the input does not fit together, or (with `resume`) the records belong to another run.
        KeyboardInterrupt: Ctrl-C; what was measured is kept and written.
    """
    started = time.monotonic()
    _check(original, config)
    sweep = plan_sweep(tokenizer, texts, config, calibrate is not None)
    about = {
        "model": describe_model(original, name=name),
        "data": describe_data(tokenizer, texts, sweep),
        "calibration": dict(calibration or {}),
        "dtype": str(original.dtype).removeprefix("torch."),
        "attention": str(original.config._attn_implementation),
        "command": command,
    }
    identity = {key: value for key, value in about.items() if key != "command"}
    protocol = digest(config.to_dict(), identity, torch.__version__)
    folder = Path(output_dir)
    remove_temporaries(folder)
    with RecordStore(folder / RECORDS, protocol, resume=resume) as store:
        if not resume:
            (folder / RESULT).unlink(missing_ok=True)
        try:
            left = sum(units for key, units in sweep.work.items() if key not in store)
            with EvaluationProgress(left, console) as progress:
                _Pass(original, sweep, calibrate, store, progress).run()
        finally:
            content = sweep_file(sweep, store, about, seconds=time.monotonic() - started)
            write_json(folder / RESULT, content)
    return content


class _Pass:
    """One run over everything that is not measured yet."""

    def __init__(
        self, original: Any, sweep: Sweep, calibrate: Calibrate | None, store: RecordStore, progress: EvaluationProgress
    ) -> None:
        self.original, self.sweep, self.calibrate = original, sweep, calibrate
        self.store, self.progress = store, progress

    def run(self) -> None:
        """Measure length by length, so that only one length's models are held."""
        for length in self.sweep.config.lengths:
            if not self.sweep.missing(self.store, length):
                continue
            batches = [batch for batch in self.sweep.batches if batch.length == length]
            models = {key: model for point in self.sweep.config.points for key, model in self._models(length, point)}
            for batch in batches:
                self._measure(batch, models)
            self._time(length, batches[0], models)

    def _models(self, length: int, point: Point) -> Iterator[tuple[tuple[str, Point], Any]]:
        """Make the methods of a point; the calibrated ones share one calibration."""
        config = self.sweep.config
        plain = convert(self.original, config.settings("uncalibrated", point))
        yield ("uncalibrated", point), plain
        dropped = convert(self.original, config.settings("moba", point))
        yield ("moba", point), dropped
        yield ("window", point), route(dropped, Recent())
        fitted = plain
        if self.calibrate is not None:
            fitted = convert(self.original, config.settings("converted", point))
            self._calibrate(length, point, fitted)
            yield ("converted", point), fitted
        yield ("oracle", point), route(fitted, Oracle())
        yield ("random", point), route(fitted, Random(config.seed))

    def _calibrate(self, length: int, point: Point, model: Any) -> None:
        """Fit a model, or give it what an earlier run had fitted."""
        key = ("calibration", length, *point)
        mine = {name: tensor for name, tensor in model.state_dict().items() if ".bsbr." in name}
        if key not in self.store:
            self.progress.check()
            self.progress.stage(f"{length} tokens", f"calibrating top_k {point.top_k} of {point.unit}")
            assert self.calibrate is not None
            with torch.enable_grad():  # the caller's own fitting may want them
                self.calibrate(model, length)
            scalars = {name: pack(tensor.flatten().cpu().numpy()) for name, tensor in mine.items()}
            self.store.append(key, {"scalars": scalars, "top_k_per_head": model.config.bsbr["top_k_per_head"]})
            self.progress.advance(self.sweep.work[key])
        kept = self.store.get(key)
        model.config.bsbr = {**model.config.bsbr, "top_k_per_head": kept["top_k_per_head"]}
        for name, values in kept["scalars"].items():
            mine[name].copy_(torch.from_numpy(unpack(values).copy()).view_as(mine[name]))

    def _measure(self, batch: Batch, models: Mapping[tuple[str, Point], Any]) -> None:
        keys = {batch.key(method, point): model for (method, point), model in models.items()}
        missing = [key for key in keys if key not in self.store]
        if not missing and batch.key(ORIGINAL) in self.store:
            return
        ids = batch.ids.to(self.sweep.config.device)
        targets = ids[:, 1:].flatten()
        original = predict(self.original, ids, 0)

        def measure(key: Key, predictions: Predictions) -> None:
            values = compare_predictions(original, predictions, targets)
            buckets = self.sweep.config.buckets(batch.length)
            self.store.append(key, sum_by_position(values, len(ids), buckets))
            self.progress.advance(self.sweep.work[key])

        if batch.key(ORIGINAL) not in self.store:
            measure(batch.key(ORIGINAL), original)
        for key in missing:
            self.progress.check()
            self.progress.stage(f"{batch.text}, {batch.length} tokens", str(key[5]))
            measure(key, predict(keys[key], ids, 0))

    def _time(self, length: int, batch: Batch, models: Mapping[tuple[str, Point], Any]) -> None:
        key = ("time", length)
        if key in self.store or key not in self.sweep.work:
            return
        self.progress.check()
        self.progress.stage("speed", f"{length} tokens")  # not the part that calibrates: a log tells them apart
        config = self.sweep.config
        device = config.time_device or config.device
        ids = batch.ids[:1].to(device)
        timed = {ORIGINAL: self.original, FLOOR: convert(self.original, ValueOnlyConfig())}
        for (method, point), model in models.items():
            if method in TIMED:
                timed[f"{method}/{point.unit}/{point.top_k}"] = model
        timed = {name: _on(model, device) for name, model in timed.items()}
        last = all(map(keeps_logits, timed.values()))
        calls = {name: prefill_call(model, ids, last_logits_only=last) for name, model in timed.items()}
        self.store.append(key, {"seconds": time_calls(calls, config.speed, device=device), "last_logits": last})
        self.progress.advance(self.sweep.work[key])


def _on(model: Any, device: str) -> Any:
    """The model where it is timed: itself, or a copy on another device."""
    return model if model.device.type == torch.device(device).type else copy.deepcopy(model).to(device)


def _check(original: Any, config: SweepConfig) -> None:
    if original.training:
        raise UserError("the original is in training mode: expected eval mode. Call its eval() first")
    positions = getattr(original.config, "max_position_embeddings", None)
    if positions is not None and max(config.lengths) > positions:
        raise UserError(f"--lengths {max(config.lengths)}: the model has {positions} positions. Lower it")
    check_head(original)
