"""What a run will measure, decided and checked before anything is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bsbr.errors import UserError
from bsbr.evaluation.buckets import first_exposed
from bsbr.evaluation.legacy import LEGACY_PAIR, legacy_key
from bsbr.evaluation.quality import ORIGINAL, Key, Place, place_units, plan_places, random_key
from bsbr.evaluation.scaling import Race, plan_races
from bsbr.evaluation.settings import SPEED_FIRST, SPEED_ONLY, SuiteConfig
from bsbr.evaluation.windows import Document, choose_documents

Model = Any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that will be measured."""

    documents: Mapping[str, Sequence[Document]]
    """Chosen documents of each text."""

    places: Sequence[Place]
    """Windows of the quality part."""

    races: Sequence[Race]
    """Timings."""

    quality_names: Sequence[str]
    """Variants of the quality part."""

    exposed_from: int | None
    """First exposed position; None where no variant says how it is sparse."""

    legacy: str | None
    """Text of the published row-by-row perplexity, where there is one."""

    work: Mapping[Key, float]
    """Every record planned, and its work in tokens through a model, for the progress bar."""


def make_plan(
    original: Model,
    tokenizer: Any,
    models: Mapping[str, Model],
    texts: Mapping[str, Sequence[str]],
    config: SuiteConfig,
) -> Plan:
    """Choose documents, windows, variants and timings, and refuse what does not fit the model.

    Args:
        original: the model compared with.
        tokenizer: its tokenizer.
        models: name to model, the original among them.
        texts: name to documents.
        config: settings.
    Returns:
        The plan.
    Raises:
        UserError: an unknown variant, a length beyond the positions, no text or too short a one, nothing to
            measure.
    """
    known = [name for name in models if name != ORIGINAL]
    quality = _chosen(config.quality_variants, known, [name for name in known if name not in SPEED_ONLY])
    speed = _chosen(config.speed_variants, known, [name for name in SPEED_FIRST if name in known])
    positions = getattr(original.config, "max_position_embeddings", None)
    if not quality and not config.lengths:
        raise UserError("nothing to measure: expected a variant or a length. Give --lengths or a variant")
    longest = max([*config.lengths, config.window if quality else 0])
    if positions is not None and longest > positions:
        raise UserError(
            f"length {longest}: the model has {positions} positions. Lower it, or extend the positions first "
            "(--max-length)"
        )
    documents: dict[str, Sequence[Document]] = {}
    if quality:
        if not texts:
            raise UserError("no text to evaluate on: expected at least one. Give a text, or leave the quality part out")
        for name, items in texts.items():
            documents[name] = choose_documents(
                tokenizer,
                items,
                documents=config.documents,
                tokens=config.resolved_document_tokens,
                bos=config.bos,
            )
    places = plan_places(documents, config) if documents else []
    races = plan_races(config, [ORIGINAL, *speed]) if config.lengths else []
    legacy = "wikitext" if "wikitext" in documents and "converted" in quality else None
    return Plan(
        documents=documents,
        places=places,
        races=races,
        quality_names=quality,
        exposed_from=config.exposed_from if config.exposed_from is not None else _exposed_from(models),
        legacy=legacy,
        work=_work(places, races, quality, legacy, config),
    )


def race_units(race: Race, config: SuiteConfig) -> float:
    """How much work a race is, in tokens through a model, for the progress bar.

    Args:
        race: what is timed.
        config: rounds and warm-up.
    Returns:
        Tokens, more for long sequences, whose attention grows with the square.
    """
    calls = len(race.contenders) * (2 * config.speed.rounds + config.speed.warmup + 1)
    return calls * race.batch * race.length * (1 + race.length / 4096)


def _work(
    places: Sequence[Place],
    races: Sequence[Race],
    quality: Sequence[str],
    legacy: str | None,
    config: SuiteConfig,
) -> dict[Key, float]:
    work: dict[Key, float] = {}
    for place in places:
        tokens = place.window.stop - place.window.start
        for name in place.models(quality):
            work[place.key(name)] = place_units(name, tokens)
    if places:
        for index in range(config.random_samples):
            work |= {random_key(index, name): float(config.window) for name in quality}
    if legacy is not None:
        work |= {legacy_key(name): 0.0 for name in LEGACY_PAIR}
    return work | {race.key: race_units(race, config) for race in races}


def _chosen(wanted: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    if wanted is None:
        return list(default)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise UserError(f'variant "{missing[0]}" is not among the models given: expected some of {", ".join(known)}')
    return list(wanted)


def _exposed_from(models: Mapping[str, Model]) -> int | None:
    """First exposed position of the converted model, or of the first variant that says how it is sparse."""
    preferred = ("converted_sparse", "converted")
    ordered = sorted(models.items(), key=lambda item: preferred.index(item[0]) if item[0] in preferred else 2)
    for _, model in ordered:
        settings = getattr(model.config, "bsbr", None)
        if settings and "block_size" in settings:
            return first_exposed(
                block_size=settings["block_size"],
                top_k=settings.get("top_k", 0),
                retrieval_block_size=settings.get("retrieval_block_size"),
                dense_below=settings.get("dense_below", 0),
            )
    return None
