"""summary.md: the verdict and one table to paste into a model card or an issue."""

import re

from bsbr.report.cautions import not_measured, warnings
from bsbr.report.cells import Cell, Table
from bsbr.report.density import density_tables
from bsbr.report.facts import commands, settings_text
from bsbr.report.results import Results
from bsbr.report.tables import summary_table
from bsbr.report.verdict import verdict

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$!])")


def escape(text: str) -> str:
    """Make text stand for itself in Markdown, tables included.

    Args:
        text: any text; control characters are already visible.
    Returns:
        One line in which nothing is markup.

    Example:
        >>> print(escape("a|b <script>"))
        a\\|b &lt;script&gt;
    """
    text = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return text.replace("\\<", "&lt;").replace("\\>", "&gt;")


def summary_markdown(results: Results) -> str:
    """Write the summary.

    Args:
        results: a results folder.
    Returns:
        Markdown, the same for the same result files.
    """
    settings = next(settings_text(section) for section in results.sections.values())
    lines = [*(escape(sentence) for sentence in verdict(results).sentences), _table(summary_table(results))]
    table = summary_table(results)
    lines.append(escape(table.note))
    for table in density_tables(results):
        if not table.minor:
            lines += [f"## {escape(table.title)}", _table(table), escape(table.note)]
    lines.append(f"Conditions: {escape(settings)}.")
    lines.append(_list("Warnings", warnings(results)))
    lines.append(_list("Not measured", not_measured(results)))
    lines.append(_replay(commands(results)))
    return "# BSBR evaluation\n\n" + "\n\n".join(line for line in lines if line) + "\n"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    body = [[_cell(cell) for cell in row] for row in table.rows]
    rows = [[escape(head) for head in table.columns], ["---", *["---:"] * (len(table.columns) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: Cell) -> str:
    return escape(f"{cell.text} {cell.interval}".strip())


def _list(title: str, items: list[str]) -> str:
    return "\n".join([f"{title}:", "", *(f"- {escape(item)}" for item in items)]) if items else ""


def _replay(lines: list[str]) -> str:
    """Commands as an indented block: no fence that their text could close."""
    return "\n".join(["Run again:", "", *(f"    {line}" for line in lines)]) if lines else ""
