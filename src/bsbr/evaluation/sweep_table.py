"""The table at the end of a sweep: every method at every point, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_QUALITY = {
    "kl": ("KL, nats \N{DOWNWARDS ARROW}", "{:.5f}"),
    "top1_agreement": ("same top-1 \N{UPWARDS ARROW}", "{:.2%}"),
    "ppl_ratio": ("PPL ratio \N{DOWNWARDS ARROW}", "\N{MULTIPLICATION SIGN}{:.4f}"),
}
_ABSENT = "\N{EN DASH}"


def sweep_tables(content: Mapping[str, Any]) -> list[Table]:
    """Draw the main figures of a sweep: one table for each text and length.

    Args:
        content: of sweep.json.
    Returns:
        The tables, with intervals.

    Example:
        >>> sweep_tables({"rows": [], "protocol": {"positions": {}}})
        []
    """
    rows = content["rows"]
    found: dict[tuple[str, int], dict[tuple[int, int, str], dict[str, Any]]] = {}
    for row in rows:
        where = row["slice"]
        main = content["protocol"]["positions"][str(where["length"])]
        if row["metric"] in _QUALITY and where["bucket"] == main:
            point = (where["retrieval_block_size"] * where["top_k"], where["retrieval_block_size"], row["variant"])
            found.setdefault((where["text"], where["length"]), {}).setdefault(point, {})[row["metric"]] = row
    tables = []
    for (text, length), points in found.items():
        table = Table(title=f"Quality against density: {text}, windows of {length:,} tokens", title_justify="left")
        for head in ("keys read", "blocks", "method", *(head for head, _ in _QUALITY.values()), "time"):
            table.add_column(head, justify="left" if head == "method" else "right", no_wrap=head == "method")
        for last, ((_, unit, method), cells) in _with_ends(points):
            where = {"length": length, "retrieval_block_size": unit, "top_k": cells["kl"]["slice"]["top_k"]}
            share, seconds = _value(rows, "keys_read", "all_methods", where), _value(rows, "time_s", method, where)
            table.add_row(
                f"{share:.1%}", f"{where['top_k']} of {unit}", method,
                *(_with_interval(cells[metric], form) for metric, (_, form) in _QUALITY.items()),
                _ABSENT if seconds is None else f"{1e3 * seconds:.1f} ms",
                style="bold" if method == "converted" else None, end_section=last,
            )  # fmt: skip
        tables.append(table)
    return tables


def _with_ends(points: Mapping[tuple[int, int, str], Any]) -> list[tuple[bool, tuple[Any, Any]]]:
    """Each entry, and whether it is the last of its point."""
    items = list(points.items())
    return [(i + 1 == len(items) or items[i + 1][0][:2] != item[0][:2], item) for i, item in enumerate(items)]


def _value(rows: list[Mapping[str, Any]], metric: str, variant: str, where: Mapping[str, Any]) -> Any:
    mine = (row for row in rows if (row["metric"], row["variant"]) == (metric, variant))
    return next((row["value"] for row in mine if where.items() <= row["slice"].items()), None)


def _with_interval(row: Mapping[str, Any], form: str) -> str:
    ends = [form.format(row[end]).lstrip("\N{MULTIPLICATION SIGN}") for end in ("ci_low", "ci_high") if end in row]
    return form.format(row["value"]) + (f" [{', '.join(ends)}]" if ends else "")
