"""The windows and the records of a sweep, decided before anything is measured."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsbr.errors import UserError
from bsbr.evaluation.fidelity import spread_windows
from bsbr.evaluation.provenance import texts_digest, tokenizer_digest
from bsbr.evaluation.quality import ORIGINAL, Key
from bsbr.evaluation.records import RecordStore, digest
from bsbr.evaluation.sweep_points import METHODS, TIMED, Point, SweepConfig


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows of one document that go through the models together."""

    text: str
    """Name of the text."""
    length: int
    """Tokens of a window."""
    document: int
    """Place of the document among those chosen."""
    first: int
    """Place of the first window in its document."""
    ids: Tensor
    """The windows, [B, length]."""

    def key(self, method: str, point: Point | None = None) -> Key:
        """Where the record of a method is kept."""
        return ("window", self.text, self.length, self.document, self.first, method, *(point or ()))


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that was planned: what is measured on what."""

    config: SweepConfig
    """Settings."""
    batches: Sequence[Batch]
    """Windows of all texts and lengths."""
    methods: Sequence[str]
    """What is measured at every point."""
    work: Mapping[Key, float]
    """Every record planned, and its work in tokens through a model."""

    def missing(self, store: RecordStore, length: int) -> bool:
        """Whether anything of a length is not measured yet."""
        return any(key not in store for key in self.work if length == (key[2] if key[0] == "window" else key[1]))


def plan_sweep(tokenizer: Any, texts: Mapping[str, Sequence[str]], config: SweepConfig, calibrated: bool) -> Sweep:
    """Cut the windows, and list every record with its work.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: name to documents.
        config: settings.
        calibrated: whether a calibrated conversion is among the methods.
    Returns:
        The plan.
    Raises:
        UserError: no document holds a window of some length.
    """
    methods = [method for method in METHODS if calibrated or method != "converted"]
    batches: list[Batch] = []
    work: dict[Key, float] = {}
    for length in config.lengths:
        cut = functools.partial(spread_windows, tokenizer, length=length, count=config.windows)
        mine = [batch for text, documents in texts.items() for batch in _batches(text, length, documents, cut, config)]
        if not mine:
            raise UserError(f"no document has {length} tokens, a whole window. Give longer text, or lower --lengths")
        batches += mine
        for point in config.points if calibrated else ():
            work["calibration", length, *point] = 8.0 * length  # about as long as some windows
        for batch in mine:
            work[batch.key(ORIGINAL)] = float(batch.ids.numel())
            work |= {
                batch.key(method, point): float(batch.ids.numel()) for point in config.points for method in methods
            }
        if config.time_device == "none":
            continue
        calls = (len(TIMED) * len(config.points) + 2) * (2 * config.speed.rounds + config.speed.warmup)
        work["time", length] = calls * length / 2.0  # no logits and no comparison
    return Sweep(config=config, batches=batches, methods=methods, work=work)


def _batches(
    text: str, length: int, documents: Sequence[str], cut: Callable[..., Any], config: SweepConfig
) -> Iterator[Batch]:
    taken = 0
    for document in documents:
        if taken == config.documents:
            break
        (windows,) = cut([document])
        if not windows:
            continue
        step = max(1, config.batch_tokens // length)
        for first in range(0, len(windows), step):
            ids = torch.stack(windows[first : first + step])
            yield Batch(text=text, length=length, document=taken, first=first, ids=ids)
        taken += 1


def describe_data(tokenizer: Any, texts: Mapping[str, Sequence[str]], sweep: Sweep) -> dict[str, Any]:
    """Identify what is read: digests of the texts, of the windows' tokens and of the tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: name to documents.
        sweep: from `plan_sweep`.
    Returns:
        The `data` part of a result file.
    """
    counts = [
        {
            "text": text,
            "length": length,
            "documents": len({batch.document for batch in mine}),
            "windows": sum(len(batch.ids) for batch in mine),
            "tokens": sum(batch.ids.numel() for batch in mine),
            "ids_sha256": digest([batch.ids.tolist() for batch in mine]),
        }
        for text in texts
        for length in sweep.config.lengths
        if (mine := [batch for batch in sweep.batches if (batch.text, batch.length) == (text, length)])
    ]
    return {
        "texts": {
            name: {"sha256": texts_digest(documents), "given": len(documents)} for name, documents in texts.items()
        },
        "windows": counts,
        "tokenizer": {"type": type(tokenizer).__name__, "sha256": tokenizer_digest(tokenizer)},
        "window_rule": "the first documents that hold a window; windows spread evenly over each, not overlapping",
    }
