"""The records of one text, gathered by variant, that rows of perplexity and agreement are computed from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsbr.evaluation.quality import ORIGINAL, Place
from bsbr.evaluation.records import RecordStore, unpack
from bsbr.evaluation.rows import row
from bsbr.evaluation.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The records of one text and one variant, by document."""

    records: tuple[tuple[int, Mapping[str, Any]], ...]
    """(document ordinal, record), in order."""

    documents: int
    """Documents planned."""

    def sums(self, bucket: str, metric: str) -> np.ndarray:
        """Per-document sums of a metric over a bucket, [documents]."""
        totals = np.zeros(self.documents)
        for ordinal, record in self.records:
            totals[ordinal] += record["buckets"].get(bucket, {}).get(metric, 0.0)
        return totals

    def counts(self, bucket: str) -> np.ndarray:
        """Per-document numbers of scored positions in a bucket, [documents]."""
        return self.sums(bucket, "n")

    def buckets(self) -> list[str]:
        """Buckets that hold a position: all and exposed first, then by place, then the others."""
        return sorted({name for _, record in self.records for name in record["buckets"]}, key=_bucket_order)

    def tokens(self, metric: str, *, exposed_from: int | None = None) -> np.ndarray:
        """All positions' values of a metric, or those from a position on."""
        parts = []
        for _, record in self.records:
            values = unpack(record["tokens"][metric])
            if exposed_from is not None:
                values = values[max(0, exposed_from - record["first_position"]) :]
            parts.append(values)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def collect(places: Sequence[Place], store: RecordStore, text: str, names: Iterable[str]) -> dict[str, Measured]:
    """Gather the records of one text that all of these models have.

    Windows that some model has not been measured on yet (a partial run) are left out for all, so that every
    row of a text rests on the same tokens.

    Args:
        places: planned windows.
        store: the records.
        text: name of the text.
        names: variants, the original among them.
    Returns:
        Variant to its records; empty where no window is complete.
    """
    wanted = list(names)
    mine = [place for place in places if place.text == text]
    done = [place for place in mine if all(place.key(name) in store for name in wanted)]
    if not done:
        return {}
    documents = max(place.ordinal for place in mine) + 1
    return {
        name: Measured(
            records=tuple((place.ordinal, store.get(place.key(name))) for place in done), documents=documents
        )
        for name in wanted
    }


def exposure_rows(evaluation: str, text: str, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """The share of scored positions whose query had an earlier block that was not read exactly.

    Args:
        evaluation: name of the evaluation the rows go to.
        text: name of the text.
        measured: from `collect`.
    Returns:
        One row; none where nothing says which positions are exposed.
    """
    mine = measured.get("converted") or next((m for name, m in measured.items() if name != ORIGINAL), None)
    if mine is None or not {"exposed", "not exposed"} & set(mine.buckets()):
        return []
    counts = mine.counts("all")
    share = Estimate(value=float(mine.counts("exposed").sum() / counts.sum()), n=int(counts.sum()))
    return [row(evaluation, "exposure", "converted", {"text": text, "bucket": "all"}, share, "share")]


def _bucket_order(name: str) -> tuple[int, int, str]:
    first = ("all", "exposed", "not exposed")
    if name in first:
        return 0, first.index(name), name
    start = name.split("-")[0]
    return (1, int(start), name) if start.isdigit() else (2, 0, name)
