"""Hidden-state rows and distributions, computed from the records of the quality part alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bsbr.evaluation.quality import ORIGINAL, Place, random_key
from bsbr.evaluation.records import RecordStore, unpack
from bsbr.evaluation.rows import histogram, row
from bsbr.evaluation.similarity import HISTOGRAM_METRICS, LAST
from bsbr.evaluation.statistics import Estimate, ratio_mean, transformed

MEANS = ("cosine", "centred_cosine", "mse", "feature_kl_legacy")
_UNITS = {"mse": "squared", "feature_kl_legacy": "nats", "relative_l2": "ratio"}

Records = dict[str, list[Mapping[str, Any]]]


def text_records(places: Sequence[Place], store: RecordStore, names: Iterable[str]) -> Records:
    """Gather the records with hidden states on real text, where every variant has one.

    Args:
        places: planned windows.
        store: the records.
        names: variants, without the original.
    Returns:
        Variant to its records, the original's (for the floor of the cosine) among them.
    """
    wanted = [ORIGINAL, *names]
    done = [place for place in places if place.states and all(place.key(name) in store for name in wanted)]
    return {name: [store.get(place.key(name)) for place in done] for name in wanted} if done else {}


def random_records(count: int, store: RecordStore, names: Iterable[str]) -> Records:
    """Gather the records on random tokens, where every variant has one.

    Args:
        count: windows planned.
        store: the records.
        names: variants, without the original.
    Returns:
        Variant to its records.
    """
    wanted = list(names)
    done = [index for index in range(count) if all(random_key(index, name) in store for name in wanted)]
    return {name: [store.get(random_key(index, name)) for index in done] for name in wanted} if done else {}


def similarity_rows(inputs: str, records: Records) -> list[dict[str, Any]]:
    """Rows of similarity_metrics.json for one kind of input.

    Args:
        inputs: "text" or "random".
        records: from `text_records` or `random_records`; each record is one cluster.
    Returns:
        cosine, centred_cosine, mse, relative_l2, feature_kl_legacy and linear_cka by layer and variant; the
        last layer over exposed positions as well; quantiles of the last layer's cosine.
    """
    made: list[dict[str, Any]] = []
    for name, mine in records.items():
        if name == ORIGINAL:
            made += _floor_rows(inputs, mine)
            continue
        for layer in sorted(mine[0]["layers"], key=_layer_order):
            where = {"layer": int(layer) if layer != LAST else LAST, "input": inputs}
            made += _layer_rows(name, where, [record["layers"][layer]["all"] for record in mine])
        where = {"layer": LAST, "input": inputs}
        cosines = np.concatenate([unpack(record["state_tokens"]["cosine"]) for record in mine])
        low = Estimate(value=float(np.quantile(cosines, 0.05)), n=len(cosines))
        made.append(row("similarity", "cosine_p5", name, where, low, "cosine", extra={"direction": "higher"}))
        exposed = [record["layers"][LAST]["exposed"] for record in mine if "exposed" in record["layers"][LAST]]
        if exposed:
            made += _layer_rows(name, where | {"bucket": "exposed"}, exposed)
    return made


def similarity_histograms(inputs: str, records: Records) -> list[dict[str, Any]]:
    """Distributions over tokens at the last layer, over edges common to all variants.

    Args:
        inputs: "text" or "random".
        records: from `text_records` or `random_records`.
    Returns:
        One histogram per metric and variant.
    """
    where = {"layer": LAST, "input": inputs}
    return [
        made
        for metric in HISTOGRAM_METRICS
        for made in histogram(
            metric,
            where,
            {
                name: [unpack(record["state_tokens"][metric]) for record in mine]
                for name, mine in records.items()
                if name != ORIGINAL
            },
        )
    ]


def legacy_similarity(records: Records, variant: str = "converted") -> dict[str, Any]:
    """The published file's keys: means of the last layer on random tokens, a sample each.

    Args:
        records: from `random_records`.
        variant: the model that stands for the converted one.
    Returns:
        average, std_dev and all_samples, with the published names (`kl_divergence` is the KL of softmaxes
        over features); empty where nothing was measured.
    """
    if variant not in records:
        return {}
    names = {"cosine_similarity": "cosine", "mse": "mse", "kl_divergence": "feature_kl_legacy"}
    samples = []
    for record in records[variant]:
        sums = record["layers"][LAST]["all"]
        samples.append({legacy: sums[metric] / sums["n"] for legacy, metric in names.items()})
    return {
        "average": {key: float(np.mean([sample[key] for sample in samples])) for key in names},
        "std_dev": {key: float(np.std([sample[key] for sample in samples])) for key in names},
        "all_samples": samples,
    }


def _layer_rows(name: str, where: Mapping[str, Any], sums: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    counts = [entry["n"] for entry in sums]
    made = [
        row(
            "similarity",
            metric,
            name,
            where,
            ratio_mean([entry[metric] for entry in sums], counts),
            _UNITS.get(metric, "cosine"),
        )
        for metric in MEANS
    ]
    # Frobenius norms: the squared distance over the squared norm, then the root of both ends.
    squared = ratio_mean([entry["squared_error"] for entry in sums], [entry["squared_norm"] for entry in sums])
    relative = transformed(squared, lambda value: math.sqrt(max(value, 0.0)))
    relative = Estimate(
        value=relative.value,
        low=relative.low,
        high=relative.high,
        n=int(sum(counts)),
        clusters=relative.clusters,
        method=relative.method,
    )
    made.append(row("similarity", "relative_l2", name, where, relative, _UNITS["relative_l2"]))
    cka = [entry["linear_cka"] for entry in sums if "linear_cka" in entry]
    if cka:
        made.append(row("similarity", "linear_cka", name, where, ratio_mean(cka, np.ones(len(cka))), "cka"))
    return made


def _floor_rows(inputs: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for layer in sorted(records[0].get("between_tokens", {}), key=_layer_order):
        where = {"layer": int(layer) if layer != LAST else LAST, "input": inputs}
        sums = [record["between_tokens"][layer] for record in records]
        counts = [record["state_n"] for record in records]
        made.append(row("similarity", "cosine_between_tokens", ORIGINAL, where, ratio_mean(sums, counts), "cosine"))
    return made


def _layer_order(layer: str) -> tuple[bool, int]:
    return layer == LAST, int(layer) if layer != LAST else 0
