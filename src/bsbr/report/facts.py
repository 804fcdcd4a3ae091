"""Conditions of the figures, in words: settings, versions, commands, exposure."""

import shlex
from collections.abc import Mapping
from typing import Any

from bsbr.report.metrics import EXPOSURE
from bsbr.report.names import AGREEMENT, PERPLEXITY, SIMILARITY
from bsbr.report.results import Results, Row, Section, preference
from bsbr.report.wording import count_text

_PARTS = ("model", "data", "protocol", "config", "machine", "code")


def find(part: Any, key: str) -> Any:
    """Return the first value stored under a key at any depth, that of the converted model before others.

    Args:
        part: nested dicts and lists, as JSON holds them.
        key: the key.
    Returns:
        The value, or None.

    Example:
        >>> find({"additive": {"top_k": None}, "converted": {"top_k": 2}, "local": {"top_k": 0}}, "top_k")
        2
    """
    if isinstance(part, Mapping):
        if part.get(key) is not None:
            return part[key]
        part = [part[name] for name in sorted(part, key=lambda name: name != "converted")]
    if isinstance(part, list):
        depths = sorted(part, key=lambda item: not (isinstance(item, Mapping) and "converted" in item))
        return next((value for item in depths if (value := find(item, key)) is not None), None)
    return None


def flatten(part: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Write nested settings as dotted names and values.

    Args:
        part: nested dicts and lists, as JSON holds them.
        prefix: put before each name.
    Returns:
        Pairs of name and text, sorted by name.
    """
    if isinstance(part, Mapping):
        pairs = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in sorted(part.items()))
        return [pair for group in pairs for pair in group]
    if isinstance(part, list):
        text = (
            ", ".join(str(item) for item in part) if not any(isinstance(i, Mapping | list) for i in part) else str(part)
        )
        return [(prefix, text)]
    return [(prefix, "none" if part is None else str(part))]


def model_name(results: Results) -> str:
    """Return the name of the model that was measured.

    Args:
        results: a results folder.
    Returns:
        The name; "the model" if the files do not say.
    """
    names = (section.part("model").get("name") for section in results.sections.values())
    return next((str(name) for name in names if name), "the model")


def settings_text(section: Section, *, model: bool = True) -> str:
    """Return the conditions of one file in a line, for the foot of a plot.

    Args:
        section: the result file.
        model: begin with the name of the model.
    Returns:
        Model, window, block size, top_k, device, dtype and versions, as far as the file states them.
    """
    config, protocol, machine = section.part("config"), section.part("protocol"), section.part("machine")
    code = section.part("code")
    words = [str(section.part("model").get("name") or "")] if model else []
    for key, label in (("block_size", "block"), ("top_k", "top_k"), ("dense_below", "dense below")):
        value = find(config, key)
        words.append(f"{label} {value}" if value is not None else "")
    window = find(protocol, "window") if section.name in (AGREEMENT, PERPLEXITY, SIMILARITY) else None
    words.append(f"window {window}" if isinstance(window, int) else "")
    threads = machine.get("threads")
    words.append(" ".join(str(machine[key]) for key in ("device", "dtype") if machine.get(key)))
    words.append(f"{threads} thread{'' if threads == 1 else 's'}" if threads else "")
    words.extend(f"{key} {code[key]}" for key in ("bsbr", "torch", "transformers") if code.get(key))
    if section.document.get("status") == "partial":
        words.append("PARTIAL RUN")
    return " \N{MIDDLE DOT} ".join(word for word in words if word)


def conditions(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return everything the files say about how they were made, each part once.

    Args:
        results: a results folder.
    Returns:
        Heading and pairs of name and text; a part that differs between files is listed per file.
    """
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for part in _PARTS:
        stated: dict[tuple, list[str]] = {}
        for name, section in results.sections.items():
            pairs = tuple(flatten(section.part(part)))
            if pairs:
                stated.setdefault(pairs, []).append(name)
        for pairs, names in stated.items():
            heading = part if len(stated) == 1 else f"{part} ({', '.join(names)})"
            groups.append((heading, list(pairs)))
    return groups


def commands(results: Results) -> list[str]:
    """Return the commands that made the files, each once.

    Args:
        results: a results folder.
    Returns:
        Lines to paste into a shell.
    """
    lines = []
    for section in results.sections.values():
        words = section.document.get("command")
        if isinstance(words, list) and words:
            lines.append(shlex.join(str(word) for word in words))
    return list(dict.fromkeys(lines))


def exposure(results: Results) -> Row | None:
    """Return the share of scored positions where the sparse part acts.

    Args:
        results: a results folder.
    Returns:
        The row, or None if it was not measured.
    """
    for section in (AGREEMENT, PERPLEXITY):
        for name in EXPOSURE:
            rows = results.rows(section, name)
            rows = [row for row in rows if row.variant == "converted"] or rows
            if rows:
                return min(rows, key=preference)
    return None


def fit_range(row: Row) -> str:
    """Say over which lengths a curve was fitted.

    Args:
        row: a row of the exponents.
    Returns:
        For instance "128 to 32,768"; "" if the file does not say.
    """
    start, end = row.slice.get("fit_from"), row.slice.get("fit_to")
    if not isinstance(start, int | float) or not isinstance(end, int | float):
        return ""
    return f"{count_text(start)} to {count_text(end)}"


def is_extrapolated(row: Row, lengths: list[int | float]) -> bool:
    """Tell whether a crossover lies outside the lengths measured.

    Args:
        row: a crossover row.
        lengths: the lengths measured; if empty, the row's own fit range is used.
    Returns:
        True if it is said or seen to be extrapolated.
    """
    ends = [row.slice.get("fit_from"), row.slice.get("fit_to")]
    lengths = lengths or [end for end in ends if isinstance(end, int | float)]
    outside = bool(lengths) and not min(lengths) <= row.value <= max(lengths)
    return row.extrapolated or outside
