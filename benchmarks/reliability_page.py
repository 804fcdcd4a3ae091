"""docs/reliability.md from the committed results of long tests; `benchmarks.reliability` says what a result holds.

python -m benchmarks.reliability_page
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability import FOLDER, SECTIONS
from bsbr.files import write_atomic

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"

_START = """# Reliability

Written by `python -m benchmarks.reliability_page` from the files in
[benchmarks/results/reliability](../benchmarks/results/reliability); not to be edited. Each row is one claim and the run
that tried to break it: `make test-long` runs them again. What is quick enough of each is also part of `make test`.
"""


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read all results, in the order of the page.

    Args:
        folder: where they are.
    Returns:
        The files' contents, each with its name under "name".
    """
    results = [json.loads(file.read_text()) | {"name": file.stem} for file in folder.glob("*.json")]
    return sorted(results, key=lambda result: (SECTIONS.index(result["section"]), result["name"]))


def render(results: Sequence[dict[str, Any]]) -> str:
    """Write the page.

    Args:
        results: from `read_results`.
    Returns:
        Its text.
    """
    total, failed = (sum(result[key] for result in results) for key in ("cases", "failures"))
    lines = [_START, f"{len(results)} claims, {_count(total)} cases, {_failures(failed)} open failures.", ""]
    for section in SECTIONS:
        own = [result for result in results if result["section"] == section]
        if own:
            lines += _section(section, own)
    return "\n".join(lines)


def _section(section: str, results: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"## {section}", "", "| claim | cases | failures | measured | under which conditions | file |"]
    lines.append("|---|--:|--:|---|---|---|")
    for result in results:
        link = f"[{result['name']}](../benchmarks/results/reliability/{result['name']}.json)"
        cells = (
            _cell(result["claim"]), _count(result["cases"]), _failures(result["failures"]), _cell(result["measured"]),
            _cell(result["conditions"]), link,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for title, key in (("What such tests found, and what was done", "mended"), ("Not covered", "not_covered")):
        said = list(dict.fromkeys(sentence for result in results for sentence in result[key]))
        if said:
            lines += ["", f"{title}:", "", *(f"- {sentence}" for sentence in said)]
    commands = list(dict.fromkeys(result["command"] for result in results))
    return [*lines, "", "Made by:", "", "```bash", *commands, "```", ""]


def _count(number: int) -> str:
    return f"{number:,}"


def _failures(number: int) -> str:
    return f"**{number:,}**" if number else "0"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Write the page."""
    write_atomic(PAGE, render(read_results()))
    print(f"{PAGE.name}: {len(read_results())} claims")


if __name__ == "__main__":
    main()
