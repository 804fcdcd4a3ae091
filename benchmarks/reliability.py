"""Results of long tests, one file a claim, in benchmarks/results/reliability/; docs/reliability.md is made of them.

A file `NAME.json` holds

    schema        {"name": "bsbr-reliability", "version": 1}
    section       one of SECTIONS: under which heading of the page the claim stands
    claim         one sentence that says what holds, without numbers of cases
    cases         how many were tried, an integer
    failures      how many of them failed in this run, an integer: 0, or the page says so in bold
    measured      what was measured besides, in words ("worst ratio to the bound 0.47"); "" for nothing
    mended        list of sentences: what such tests had found before, and what was done about it
    not_covered   list of sentences: what this claim does not say
    command       what makes the file again, as typed from the root of the checkout
    conditions    in words: device and processor, sizes, dtypes, backends
    seed          the first seed, an integer, or null where nothing is drawn
    seconds       how long the run took, or null where it was not timed
    code          versions, from `bsbr.evaluation.provenance.code_versions`, of the process that wrote the file; of
                  rows that other machines made, the conditions name those
    details       anything else as a dict, for readers of the file

`record` writes one. `python -m benchmarks.reliability_page` writes the page anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsbr.evaluation.provenance import code_versions
from bsbr.files import write_json

FOLDER = Path(__file__).parent / "results" / "reliability"

SECTIONS = (
    "Numerics",
    "Causality and isolation",
    "The tests themselves",
    "Persistence",
    "Input and security",
    "Reproducibility",
    "Soak",
)
"""Headings of the page, in order."""

SCHEMA = {"name": "bsbr-reliability", "version": 1}


def record(
    name: str,
    *,
    section: str,
    claim: str,
    cases: int,
    failures: int,
    command: str,
    conditions: str,
    measured: str = "",
    mended: Sequence[str] = (),
    not_covered: Sequence[str] = (),
    seed: int | None = None,
    seconds: float | None = None,
    details: dict[str, Any] | None = None,
    folder: Path = FOLDER,
) -> Path:
    """Write the result of one claim.

    Args:
        name: of the file, without its ending; words joined by underscores.
        section, claim, cases, failures, command, conditions, measured, mended, not_covered, seed, seconds, details:
            as the module says.
        folder: where to.
    Returns:
        The file.
    Raises:
        ValueError: no such section.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as there:
        ...     record("sums", section="Numerics", claim="Sums are right.", cases=3, failures=0, command="make sums",
        ...            conditions="CPU", folder=Path(there)).name
        'sums.json'
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    content = {
        "schema": SCHEMA,
        "section": section,
        "claim": claim,
        "cases": cases,
        "failures": failures,
        "measured": measured,
        "mended": list(mended),
        "not_covered": list(not_covered),
        "command": command,
        "conditions": conditions,
        "seed": seed,
        "seconds": None if seconds is None else round(seconds, 1),
        "code": code_versions(),
        "details": details or {},
    }
    return write_json(folder / f"{name}.json", content)
