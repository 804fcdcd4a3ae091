"""Read a results folder, and check what it says; nothing else of the report opens result files."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from bsbr.errors import UserError
from bsbr.report.names import SECTIONS
from bsbr.report.results import Histogram, Results, Row, Section, Unmeasured
from bsbr.report.wording import visible

SCHEMA_VERSION = 1

_LARGEST = sys.float_info.max


def load(folder: str | Path) -> Results:
    """Read the result files of a folder.

    Args:
        folder: holds some of scaling_results.json, scaling_exponents.json, quality_results_wikitext.json,
            similarity_metrics.json, agreement_rates.json; a file that is missing is a section that is absent.
    Returns:
        The results, text made visible (no control characters).
    Raises:
        UserError: the folder or all files are missing, or a file is damaged or of a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f'results folder "{visible(str(folder))}" does not exist: run `bsbr evaluate --output DIR` first'
        )
    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    sections = {name: _read(name, path) for name, path in paths.items() if path.is_file()}
    if not sections:
        wanted = ", ".join(path.name for path in paths.values())
        raise UserError(f'folder "{visible(str(folder))}" holds no results: expected at least one of {wanted}')
    return Results(folder, sections)


def _read(name: str, path: Path) -> Section:
    try:
        document = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
        document = _clean(document)
        _check_version(document)
        items = _list(document, "rows")
        rows = tuple(_row(item) for item in items if item["value"] is not None)
        unmeasured = tuple(_unmeasured(item) for item in items if item["value"] is None)
        histograms = tuple(_histogram(item) for item in _list(document, "histograms"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
        raise UserError(
            f'result file "{visible(str(path))}" cannot be used: {visible(reason)}. '
            "Expected a file written by `bsbr evaluate`: run it again, or remove the file to leave it out"
        ) from error
    return Section(name, document, rows, unmeasured, histograms)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which JSON does not have")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {visible(key): _clean(item) for key, item in value.items()}
    return value


def _check_version(document: Any) -> None:
    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")
    schema = document.get("schema")
    if not isinstance(schema, dict) or "rows" not in document:
        raise ValueError("has no schema or rows")
    version = str(schema.get("version", "")).split(".")[0]
    if not version.isdigit() or int(version) > SCHEMA_VERSION:
        raise ValueError(f"has schema version {schema.get('version')!r}, this bsbr reads up to {SCHEMA_VERSION}")


def _list(document: dict, key: str) -> list:
    items = document.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{key} must be a list of objects")
    return items


def _row(item: dict) -> Row:
    position = _slice(item)
    low, high, n, clusters = (_optional(item, key) for key in ("ci_low", "ci_high", "n", "clusters"))
    return Row(
        metric=_name(item, "metric"),
        variant=_name(item, "variant"),
        slice=position,
        value=_number(item, "value", item["value"]),
        ci_low=low,
        ci_high=high,
        ci_method=str(item.get("ci_method") or ""),
        n=n,
        clusters=clusters,
        extrapolated=bool(item.get("extrapolated") or position.get("extrapolated")),
    )


def _unmeasured(item: dict) -> Unmeasured:
    reason = str(item.get("reason") or "")
    return Unmeasured(_name(item, "metric"), _name(item, "variant"), _slice(item), reason)


def _slice(item: dict) -> dict:
    position = item.get("slice") or {}
    if not isinstance(position, dict) or any(isinstance(value, dict | list) for value in position.values()):
        raise ValueError(f"slice must be an object of plain values, got {str(position)[:60]}")
    return position


def _histogram(item: dict) -> Histogram:
    edges, counts = (tuple(_number(item, key, number) for number in item[key]) for key in ("edges", "counts"))
    if len(edges) != len(counts) + 1 or not counts:
        raise ValueError("a histogram needs numbers, one edge more than counts")
    if any(high <= low for low, high in itertools.pairwise(edges)):
        raise ValueError("the edges of a histogram must rise")
    return Histogram(_name(item, "metric"), _name(item, "variant"), _slice(item), edges, counts)


def _name(item: dict, key: str) -> str:
    name = item[key]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key} must be a name, got {name!r}")
    return name


def _optional(item: dict, key: str) -> float | None:
    return None if item.get(key) is None else _number(item, key, item[key])


def _number(item: dict, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{key} of {item.get('metric')!r} must be a finite number, got {str(value)[:40]}")
    return value
