"""One forward per window and model, feeding perplexity, agreement and similarity alike."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsbr.evaluation.agreement import Teacher, compare, read_teacher
from bsbr.evaluation.buckets import KEY_TOKEN_NATS, bucket_masks, sum_by_bucket
from bsbr.evaluation.perplexity import context_windows, score_tokens, scored_rows
from bsbr.evaluation.progress import EvaluationProgress
from bsbr.evaluation.records import RecordStore, pack, unpack
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.similarity import compare_states, cosine_between_tokens, layer_names, random_tokens
from bsbr.evaluation.windows import Document, Window, cut_windows

ORIGINAL = "original"
NOISE_BATCH, NOISE_DTYPE = "noise_floor", "noise_bfloat16"
KEPT_PER_TOKEN = ("nll", "kl", "delta_p", "confidence", "correct", "teacher_rank")

Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One window of one document of one text."""

    text: str
    """Name of the text."""

    ordinal: int
    """Place of the document among those chosen."""

    document: Document
    """Its tokens."""

    window: Window
    """Which of them."""

    states: bool
    """Whether hidden states are compared here."""

    noise: bool
    """Whether the original is compared with itself here."""

    def key(self, variant: str) -> Key:
        """Where the record of a variant is kept."""
        return ("text", self.text, self.ordinal, self.window.start, variant)

    def models(self, variants: Iterable[str]) -> list[str]:
        """What is measured here: the original, the variants, and the noise floor where it is wanted."""
        return [ORIGINAL, *variants, *((NOISE_BATCH, NOISE_DTYPE) if self.noise else ())]


def plan_places(documents: Mapping[str, Sequence[Document]], config: SuiteConfig) -> list[Place]:
    """List the windows to be measured, in order.

    Args:
        documents: chosen documents of each text, in the order of the texts.
        config: window, stride, and for how many documents hidden states and the noise floor are measured.
    Returns:
        One place per window. States and noise are measured in the first text's first documents.
    """
    first = next(iter(documents))
    return [
        Place(
            text=text,
            ordinal=ordinal,
            document=document,
            window=window,
            states=text == first and ordinal < config.similarity_documents and window.start == 0,
            noise=text == first and ordinal < config.noise_documents and window.start == 0,
        )
        for text, chosen in documents.items()
        for ordinal, document in enumerate(chosen)
        for window in cut_windows(len(document.tokens), config.window, config.resolved_stride)
    ]


@dataclass(frozen=True, kw_only=True)
class QualityPass:
    """Runs the models over windows and keeps one record for each."""

    original: Any
    """The model everything is compared with."""

    variants: Mapping[str, Any]
    """The models compared."""

    config: SuiteConfig
    """Settings."""

    exposed_from: int | None
    """First exposed position."""

    def missing(self, place: Place, store: RecordStore) -> list[str]:
        """Models whose record of a place is not there yet.

        Args:
            place: the window.
            store: the records.
        Returns:
            Names in the order of measuring.
        """
        return [name for name in place.models(self.variants) if place.key(name) not in store]

    def measure(self, place: Place, store: RecordStore, progress: EvaluationProgress) -> None:
        """Measure all models on one window that have not been.

        Args:
            place: the window.
            store: takes a record after each model.
            progress: counts tokens; Ctrl-C stops between models.
        """
        missing = self.missing(place, store)
        if not missing:
            return
        window = place.window
        progress.stage(place.text, ORIGINAL)
        ids = torch.tensor(place.document.tokens[window.start : window.stop], device=self.config.device)
        logits, states = forward(self.original, ids[None], states=place.states)
        teacher = read_teacher(scored_rows(logits, window), ids[window.first_scored - window.start :])
        if ORIGINAL in missing:
            store.append(place.key(ORIGINAL), self._original_record(place, teacher, states))
            progress.advance(place_units(ORIGINAL, len(ids)))
        masks = self._masks(place, teacher, store.get(place.key(ORIGINAL)))
        for name, run in self._students(ids, missing):
            progress.check()
            progress.stage(place.text, name)
            student_logits, student_states = run(place.states and name in self.variants)
            values = compare(teacher, scored_rows(student_logits, window))
            record = _record(values, masks, place)
            if student_states is not None and states is not None:
                record |= _packed(compare_states(states, student_states, self._state_masks(len(ids))))
            store.append(place.key(name), record)
            progress.advance(place_units(name, len(ids)))

    def measure_random(self, index: int, store: RecordStore, progress: EvaluationProgress) -> None:
        """Compare hidden states on one window of random tokens.

        Args:
            index: which window.
            store: takes a record after each model.
            progress: counts tokens; Ctrl-C stops between models.
        """
        missing = [name for name in self.variants if random_key(index, name) not in store]
        if not missing:
            return
        vocabulary = self.original.config.vocab_size
        ids = random_tokens(vocabulary, self.config.window, seed=self.config.seed, index=index)
        ids = ids.to(self.config.device)
        _, states = forward(self.original, ids[None], states=True)
        for name in missing:
            progress.check()
            progress.stage("random tokens", name)
            _, student = forward(self.variants[name], ids[None], states=True)
            found = compare_states(states or [], student or [], self._state_masks(len(ids)))
            store.append(random_key(index, name), _packed(found))
            progress.advance(len(ids))

    def _students(self, ids: Tensor, missing: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for name in missing:
            if name in self.variants:
                model = self.variants[name]
                yield name, lambda states, model=model: forward(model, ids[None], states=states)
            elif name == NOISE_BATCH:
                yield name, lambda states: forward(self.original, ids.repeat(2, 1), states=states)
            elif name == NOISE_DTYPE:
                yield name, lambda states: forward(_in_bfloat16(self.original), ids[None], states=states)

    def _original_record(self, place: Place, teacher: Teacher, states: Sequence[Tensor] | None) -> dict[str, Any]:
        values = {
            "nll": teacher.nll,
            "confidence": teacher.confidence,
            "correct": (teacher.top[:, 0] == teacher.targets).double(),
        }
        context = self.config.context
        short = np.full(place.window.scored, np.nan, dtype=np.float32)
        # Only documents' first windows: later ones would need the context of the window before.
        if context is not None and place.window.start == 0:
            tokens = place.document.tokens[: place.window.stop]
            scores = score_tokens(
                self.original,
                tokens,
                context_windows(len(tokens), context),
                batch_size=16,
                device=self.config.device,
            )
            if scores:
                short[2 * context - 1 :] = torch.cat(scores).float().numpy()
        extra: dict[str, Any] = {"short_nll": pack(short)}
        masks = self._masks(place, teacher, {"short_nll": extra["short_nll"]})
        values["short_nll"] = torch.from_numpy(unpack(extra["short_nll"]).copy()).nan_to_num(0.0).to(teacher.nll)
        if states is not None:
            extra["between_tokens"] = {
                str(name): float(cosine_between_tokens(state).sum())
                for name, state in zip(layer_names(states), states[1:], strict=True)
            }
            extra["state_n"] = len(states[0])
        return _record(values, masks, place) | extra

    def _masks(self, place: Place, teacher: Teacher, original: Mapping[str, Any]) -> dict[str, Tensor]:
        window, device = place.window, teacher.nll.device
        first = window.first_scored - 1 - window.start
        # Read back from the record, so that a resumed run sees the very numbers of the first one.
        short = torch.from_numpy(unpack(original["short_nll"]).copy()).to(teacher.nll)
        known = ~short.isnan()
        masks = bucket_masks(
            torch.arange(first, first + window.scored, device=device),
            window=self.config.window,
            exposed_from=self.exposed_from,
            margin=teacher.margin,
            key_tokens=known & (short - teacher.nll > KEY_TOKEN_NATS) if known.any() else None,
        )
        return masks | ({"long context": known} if known.any() else {})

    def _state_masks(self, length: int) -> dict[str, Tensor]:
        positions = torch.arange(length, device=self.config.device)
        masks = bucket_masks(positions, window=self.config.window, exposed_from=self.exposed_from)
        return {name: masks[name] for name in ("all", "exposed") if name in masks}


def place_units(name: str, tokens: int) -> float:
    """How much work a window is for a model, for the progress bar.

    Args:
        name: the model; the original also runs over short contexts, the noise floor runs two rows.
        tokens: of the window.
    Returns:
        Tokens through a model.
    """
    return float(tokens * (2 if name in (ORIGINAL, NOISE_BATCH) else 1))


def random_key(index: int, variant: str) -> Key:
    """Where the record of a variant on random tokens is kept.

    Args:
        index: which window of random tokens.
        variant: name of the model.
    Returns:
        A key of the record store.
    """
    return ("random", index, variant)


@torch.no_grad()
def forward(model: Any, ids: Tensor, *, states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Run a causal language model over whole sequences.

    Args:
        model: a Hugging Face causal language model in eval mode.
        ids: [B, T].
        states: whether hidden states are wanted.
    Returns:
        Logits of the first row, [T, V], and its hidden states, each [T, D], or None.
    """
    output = model(input_ids=ids, use_cache=False, output_hidden_states=states)
    return output.logits[0], tuple(state[0] for state in output.hidden_states) if states else None


def _in_bfloat16(model: Any) -> Any:
    return copy.deepcopy(model).to(torch.bfloat16)


def _record(values: Mapping[str, Tensor], masks: Mapping[str, Tensor], place: Place) -> dict[str, Any]:
    window, sizes = place.window, place.document.token_bytes
    if sizes is not None:
        scored = torch.tensor(sizes[window.first_scored : window.stop], device=values["nll"].device)
        values = {**values, "bytes": scored}
    return {
        "n": window.scored,
        "first_position": window.first_scored - 1 - window.start,
        "buckets": sum_by_bucket(values, masks),
        "tokens": {name: pack(values[name].cpu().numpy()) for name in KEPT_PER_TOKEN if name in values},
    }


def _packed(states: dict[str, Any]) -> dict[str, Any]:
    tokens = {metric: pack(value.cpu().numpy()) for metric, value in states["tokens"].items()}
    return {"layers": states["layers"], "state_tokens": tokens}
