"""What a reader must know before believing a figure, and what was not measured."""

from collections.abc import Iterable, Mapping

from bsbr.report.facts import exposure, find, flatten, is_extrapolated
from bsbr.report.metrics import metric
from bsbr.report.names import (
    AGREEMENT,
    CAPTIONS,
    EXPECTED,
    EXPONENTS,
    PERPLEXITY,
    QUALITY_VARIANTS,
    SECTIONS,
    SIMILARITY,
    SPEED,
    SWEEP,
    variant,
)
from bsbr.report.results import Results, Section
from bsbr.report.wording import count_text, join_words, value_text

_FEW_CLUSTERS = 20
_SHARED_PARTS = ("model", "machine", "code")


def warnings(results: Results) -> list[str]:
    """Return what a reader must know before believing a figure.

    Args:
        results: a results folder.
    Returns:
        Sentences: unfinished runs, dense windows, few clusters, missing intervals, extrapolation, mixed runs.
    """
    found = [
        *_partial(results),
        *_mixed(results),
        *_dense(results),
        *_statistics(results),
        *_extrapolated(results),
    ]
    for section in results.sections.values():
        told = section.document.get("warnings")
        found.extend(str(item) for item in told if item) if isinstance(told, list) else None
    return list(dict.fromkeys(found))


def _partial(results: Results) -> Iterable[str]:
    names = [f"{name}.json" for name, s in results.sections.items() if s.document.get("status") != "complete"]
    if names:
        yield f"The run is not finished: {join_words(names)} hold what was measured so far."


def _mixed(results: Results) -> Iterable[str]:
    for part in _SHARED_PARTS:
        stated = {tuple(flatten(section.part(part))) for section in results.sections.values()}
        if len(stated) > 1:
            yield f"The files of this folder do not agree on their {part}: they may come from different runs."


def _dense(results: Results) -> Iterable[str]:
    share = exposure(results)
    if share is not None and share.value < 0.5:
        text = (
            "no scored position" if share.value == 0 else f"only {value_text('share', share.value)} of scored positions"
        )
        yield (
            f"Sparse exposure: {text} had an earlier block that was not read exactly. "
            "The rest of the attention was dense, so figures over all positions say little about sparsity."
        )
    quality = results.sections.get(AGREEMENT) or results.sections.get(PERPLEXITY)
    if quality:
        block, top_k = find(quality.part("config"), "block_size"), find(quality.part("config"), "top_k")
        window, dense = (
            find(quality.part("protocol"), "window"),
            find(quality.part("config"), "dense_below") or 0,
        )
        if all(isinstance(number, int) for number in (block, top_k, window, dense)):
            unit = find(quality.part("config"), "retrieval_block_size") or block
            exposed = share is not None and share.value > 0
            # where positions were exposed, `dense_below` was off in this part
            reach = max(block + top_k * unit, 0 if exposed else dense)
            if window <= reach:
                yield (
                    f"The quality window of {count_text(window)} tokens is read exactly with these settings: "
                    f"everything up to {count_text(reach)} tokens is, so it cannot show what sparsity costs."
                )
    speed = results.sections.get(SPEED)
    below = find(speed.part("config"), "dense_below") if speed else None
    lengths = [row.slice.get("length") for row in results.rows(SPEED, "time_s", "converted")]
    if isinstance(below, int) and any(isinstance(length, int) and length <= below for length in lengths):
        yield (
            f"Lengths up to {count_text(below)} tokens run exact attention by choice (dense_below), so the "
            "converted model is as fast as the original there; "
            'the line "sparse forced" shows the sparse code at these lengths.'
        )


def _statistics(results: Results) -> Iterable[str]:
    rows = [row for name in (AGREEMENT, PERPLEXITY, SIMILARITY, SWEEP) for row in results.rows(name)]
    clusters = [row.clusters for row in rows if row.clusters]
    if clusters and min(clusters) < _FEW_CLUSTERS:
        yield (
            f"Some intervals rest on only {count_text(min(clusters))} independent pieces of text "
            f"(fewer than {_FEW_CLUSTERS}): take them as rough."
        )
    bare = [
        f"{metric(name).label} of {variant(kind).label}"
        for section, name in ((AGREEMENT, "top1_agreement"), (AGREEMENT, "kl"), (PERPLEXITY, "ppl_ratio"))
        for kind in ("converted",)
        if (row := results.best(section, name, kind)) and row.ci_low is None
    ]
    if bare:
        yield f"No interval was computed for {join_words(bare)}: its error is unknown."


def _extrapolated(results: Results) -> Iterable[str]:
    measured = [row.slice.get("length") for row in results.rows(SPEED, "time_s")]
    lengths = [length for length in measured if isinstance(length, int | float)]
    for row in results.rows(EXPONENTS, "crossover_length"):
        if is_extrapolated(row, lengths):
            yield (
                f"The crossover of {variant(row.variant).label} at {count_text(row.value)} tokens is "
                "extrapolated: it lies outside the lengths measured."
            )
    for name, section in results.sections.items():
        window, positions = find(section.part("protocol"), "window"), section.part("model").get("positions")
        positions = find(section.part("protocol"), "trained_positions") or positions
        if isinstance(window, int) and isinstance(positions, int) and name in (AGREEMENT, PERPLEXITY):
            words = f"{count_text(window)} tokens is beyond the {count_text(positions)} positions of the model"
            yield from [f"The window of {words} (extrapolated)."] if window > positions else []
    for name, title in SECTIONS.items():
        if name != EXPONENTS and any(row.extrapolated for row in results.rows(name)):
            yield f"{title}: some lengths are beyond the positions the model was trained on (extrapolated)."


def not_measured(results: Results) -> list[str]:
    """Return what a full evaluation holds and this folder does not.

    Args:
        results: a results folder.
    Returns:
        Sentences; whole sections first, then metrics and variants, then what the files themselves list.
    """
    found = []
    for section, title in SECTIONS.items():
        if section not in results.sections:
            found.append(f"{title}: no {section}.json in this folder.")
            continue
        missing = [metric(name).label for name in EXPECTED[section] if not results.rows(section, name)]
        if missing:
            found.append(f"{title}: {', '.join(missing)}.")
        if section in (AGREEMENT, PERPLEXITY, SIMILARITY):
            present = set(results.variants(section)) | ({"original"} if section != PERPLEXITY else set())
            absent = [variant(name).label for name in QUALITY_VARIANTS if name not in present]
            if absent:
                found.append(f"{title}, variants: {', '.join(absent)}.")
        found.extend(_told(results.sections[section]))
    return list(dict.fromkeys(found))


def _told(section: Section) -> Iterable[str]:
    for key in ("not_measured", "failed"):
        told = section.document.get(key)
        for item in told if isinstance(told, list) else []:
            yield (": ".join(text for _, text in flatten(item) if text) if isinstance(item, Mapping) else str(item))


def stale_plots(results: Results, drawn: Iterable[str]) -> list[str]:
    """Return a warning for plots in the folder that these results did not draw.

    Args:
        results: a results folder.
        drawn: names of the plots just drawn.
    Returns:
        At most one sentence.
    """
    drawn = set(drawn)
    left = [name for name in CAPTIONS if name not in drawn and (results.folder / name).exists()]
    return [f"{join_words(left)} in this folder: from an earlier run, not from these results."] if left else []
