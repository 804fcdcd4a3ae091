"""The whole evaluation: quality, similarity and speed of several variants against one original, resumable."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bsbr.errors import UserError
from bsbr.evaluation.legacy import LEGACY_PAIR, legacy_key, measure_legacy
from bsbr.evaluation.plan import Plan, make_plan
from bsbr.evaluation.progress import EvaluationProgress
from bsbr.evaluation.provenance import describe_model, texts_digest, tokenizer_digest, weights_digest
from bsbr.evaluation.quality import ORIGINAL, QualityPass
from bsbr.evaluation.records import RecordStore, digest
from bsbr.evaluation.results import RESULT_FILES, Run, headline, result_files
from bsbr.evaluation.scaling import run_race
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.windows import Document
from bsbr.files import remove_temporaries, write_json

RECORDS = "records.jsonl"
SCORING_VERSION = 2

Model = Any
Variant = Model | Callable[[], Model]


@torch.no_grad()  # Ctrl-C within an inner one can leave it on; this one puts back what was
def run_suite(
    original: Model,
    tokenizer: Any,
    variants: Mapping[str, Variant],
    texts: Mapping[str, Sequence[str]],
    config: SuiteConfig,
    output_dir: str | Path,
    resume: bool = False,
    *,
    name: str | None = None,
    command: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate variants of a model against the original and write the result files.

    1. Everything that can be wrong with the input is found before a file is touched.
    2. Each measurement is kept in records.jsonl at once; with `resume` those of an earlier run of the same
       models, texts and settings are not repeated.
    3. The five result files are computed from the records, after each part and whatever ends the run; until
       all is measured their status is "partial".

    Args:
        original: a Hugging Face causal language model, on `config.device`.
        tokenizer: its tokenizer.
        variants: name to a model or to a function that makes one; "converted" is the one that is quoted.
        texts: name ("wikitext", "book") to documents; the first one is used for hidden states.
        config: settings.
        output_dir: where the files go.
        resume: go on from the records there.
        name: what to call the model; None takes the name it was loaded by.
        command: arguments that repeat the run, for the files.
        console: where to show progress; None shows none.
    Returns:
        The headline figures: see `bsbr.evaluation.results.headline`.
    Raises:
        UserError: the input does not fit together, the folder cannot be written, or (with `resume`) the
            records belong to another run.
        KeyboardInterrupt: Ctrl-C; what was measured is kept and written.
    """
    started = time.monotonic()
    models = _models(original, variants)
    plan = make_plan(original, tokenizer, models, texts, config)
    run = Run(
        config=config,
        places=plan.places,
        races=plan.races,
        planned=tuple(plan.work),
        quality_names=plan.quality_names,
        exposed_from=plan.exposed_from,
        legacy=plan.legacy,
        model=describe_model(original, name=name),
        data=_describe_data(tokenizer, texts, plan.documents, config),
        variants={key: _describe_variant(original, model) for key, model in models.items() if key != ORIGINAL},
        command=tuple(command),
        dtype=str(next(original.parameters()).dtype).removeprefix("torch."),
        attention={key: str(getattr(model.config, "_attn_implementation", "")) for key, model in models.items()},
    )
    folder = Path(output_dir)
    remove_temporaries(folder)
    with RecordStore(folder / RECORDS, _protocol_digest(run), resume=resume) as store:
        if not resume:
            for file in RESULT_FILES:
                (folder / file).unlink(missing_ok=True)
        try:
            left = sum(units for key, units in plan.work.items() if key not in store)
            with EvaluationProgress(left, console) as progress:
                _measure(models, plan, config, tokenizer, texts, store, progress)
        finally:
            files = result_files(run, store, seconds=time.monotonic() - started)
            for file, content in files.items():
                write_json(folder / file, content)
    return headline(files)


def _models(original: Model, variants: Mapping[str, Variant]) -> dict[str, Model]:
    if ORIGINAL in variants:
        raise UserError('variants must not hold "original": it is the model the others are compared with')
    made = {ORIGINAL: original}
    for name, variant in variants.items():
        with torch.enable_grad():  # making it may mean fitting it
            made[name] = variant if isinstance(variant, torch.nn.Module) else variant()
    for name, model in made.items():
        if model.training:
            raise UserError(f'model "{name}" is in training mode: expected eval mode. Call its eval() first')
        if model.config.vocab_size != original.config.vocab_size:
            raise UserError(
                f'model "{name}" has {model.config.vocab_size} tokens in its vocabulary, the original '
                f"{original.config.vocab_size}. Only models of one vocabulary can be compared"
            )
    return made


def _measure(
    models: Mapping[str, Model],
    plan: Plan,
    config: SuiteConfig,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    store: RecordStore,
    progress: EvaluationProgress,
) -> None:
    quality = QualityPass(
        original=models[ORIGINAL],
        # a sequence below `dense_below` is exact attention and would show nothing of what the sparse part costs
        variants={name: models.get(f"{name}_sparse", models[name]) for name in plan.quality_names},
        config=config,
        exposed_from=plan.exposed_from,
    )
    for place in plan.places:
        progress.check()
        quality.measure(place, store, progress)
    for index in range(config.random_samples if plan.quality_names else 0):
        progress.check()
        quality.measure_random(index, store, progress)
    if plan.legacy is not None:
        for name in LEGACY_PAIR:
            progress.check()
            if legacy_key(name) not in store:
                found = measure_legacy(models[name], tokenizer, texts[plan.legacy], device=config.device)
                store.append(legacy_key(name), found)
    for race in plan.races:
        progress.check()
        if race.key not in store:
            progress.stage("speed", f"{race.length} tokens, batch {race.batch}")
            store.append(race.key, run_race(race, models, config))
            progress.advance(plan.work[race.key])


def _describe_variant(original: Model, model: Model) -> dict[str, Any]:
    """Settings of a variant, and the digest of the weights it does not share with the original."""
    shared = {tensor.data_ptr() for tensor in original.state_dict().values()}
    own = [(name, tensor) for name, tensor in model.state_dict().items() if tensor.data_ptr() not in shared]
    sizes = {tensor.data_ptr(): tensor.numel() for _, tensor in own}  # tied weights count once
    settings = getattr(model.config, "bsbr", None)
    return {
        **(dict(settings) if settings else {}),
        "own_parameters": sum(sizes.values()),
        "own_sha256": weights_digest(own),
    }


def _describe_data(
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    documents: Mapping[str, Sequence[Document]],
    config: SuiteConfig,
) -> dict[str, Any]:
    if not documents:
        return {}
    described: dict[str, Any] = {}
    for name, chosen in documents.items():
        tokens = sum(len(document.tokens) for document in chosen)
        sizes = [sum(document.token_bytes) for document in chosen if document.token_bytes is not None]
        described[name] = {
            "sha256": texts_digest(texts[name]),
            "given": len(texts[name]),
            "documents": len(chosen),
            "indices": [document.index for document in chosen],
            "tokens": tokens,
            "bytes": sum(sizes) if len(sizes) == len(chosen) else None,
        }
    return {
        "texts": described,
        "tokenizer": {"type": type(tokenizer).__name__, "sha256": tokenizer_digest(tokenizer)},
        "document_rule": "texts in order that reach document_tokens, then the longest others; each cut there",
    }


def _protocol_digest(run: Run) -> str:
    return digest(
        {
            "scoring": SCORING_VERSION,
            "config": run.config.to_dict(),
            "model": run.model["sha256"],
            "data": run.data,
            "variants": run.variants,
            "dtype": run.dtype,
            "exposed_from": run.exposed_from,
            "torch": torch.__version__,
        }
    )
