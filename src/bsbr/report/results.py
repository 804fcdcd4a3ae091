"""What a results folder holds, as objects: rows, histograms, sections."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsbr.report.names import NOISE, VARIANTS

_BUCKETS = ("exposed", "all")
_TEXTS = ("wikitext", "book")


@dataclass(frozen=True)
class Row:
    """One measured value, as the result file states it."""

    metric: str
    variant: str
    slice: Mapping[str, Any]
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    ci_method: str = ""
    n: float | None = None
    clusters: float | None = None
    extrapolated: bool = False


@dataclass(frozen=True)
class Unmeasured:
    """A row of the result file that holds no value, and why."""

    metric: str
    variant: str
    slice: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class Histogram:
    """How one metric of one variant is distributed."""

    metric: str
    variant: str
    slice: Mapping[str, Any]
    edges: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Section:
    """One result file."""

    name: str
    document: Mapping[str, Any]
    rows: tuple[Row, ...]
    unmeasured: tuple[Unmeasured, ...]
    histograms: tuple[Histogram, ...]

    def part(self, key: str) -> Mapping[str, Any]:
        """Return a top-level object of the file.

        Args:
            key: for instance "machine".
        Returns:
            The object; empty if the file has none.
        """
        value = self.document.get(key)
        return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Results:
    """One results folder; sections that were not measured are absent."""

    folder: Path
    sections: Mapping[str, Section]

    def rows(
        self,
        section: str,
        metric: str | None = None,
        variant: str | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[Row]:
        """Return the measured rows that match.

        Args:
            section: file name without .json.
            metric, variant: None matches any.
            where: values that the slice must hold.
        Returns:
            Rows with a value, in the order of the file.
        """
        found = self.sections.get(section)
        return [
            row
            for row in (found.rows if found else ())
            if metric in (None, row.metric)
            and variant in (None, row.variant)
            and all(row.slice.get(key) == value for key, value in (where or {}).items())
        ]

    def best(self, section: str, metric: str, variant: str, where: Mapping[str, Any] | None = None) -> Row | None:
        """Return the one row to quote when a slice is not fully named.

        Positions where the sparse part acts come before all positions, WikiText before other texts, the
        last layer before others, real text before random tokens, the longest window first.

        Args:
            section, metric, variant, where: as in `rows`.
        Returns:
            The row, or None if it was not measured.
        """
        return min(self.rows(section, metric, variant, where), key=preference, default=None)

    def unmeasured(self, section: str, metric: str, variant: str, where: Mapping[str, Any] | None = None) -> str:
        """Return the reason the file gives for a value that is missing.

        Args:
            section, metric, variant, where: as in `rows`.
        Returns:
            The reason, or "" if none is given.
        """
        found = self.sections.get(section)
        for row in found.unmeasured if found else ():
            named = (row.metric, row.variant) == (metric, variant)
            if named and all(row.slice.get(key) == value for key, value in (where or {}).items()):
                return row.reason
        return ""

    def variants(self, section: str, metric: str | None = None) -> list[str]:
        """Return the variants measured, known ones first and in their usual order, without the noise floor.

        Args:
            section, metric: as in `rows`.
        Returns:
            Names of variants.
        """
        found = {row.variant for row in self.rows(section, metric)}
        return [name for name in VARIANTS if name in found] + sorted(found - set(VARIANTS) - set(NOISE))


def preference(row: Row) -> tuple:
    """Sort key that puts the row to quote first.

    Args:
        row: a row.
    Returns:
        A tuple that sorts.
    """
    place = row.slice.get
    length = place("length")
    return (
        _rank(place("bucket"), _BUCKETS),
        _rank(place("text"), _TEXTS),
        _rank(place("layer"), ("last",)),
        _rank(place("input"), ("text",)),
        -length if isinstance(length, int | float) else 0,
        json.dumps(row.slice, sort_keys=True, default=str),
    )


def _rank(value: Any, order: Iterable[str]) -> int:
    ranks = {name: rank for rank, name in enumerate(order)}
    return ranks.get(value, len(ranks)) if isinstance(value, str) else len(ranks)
