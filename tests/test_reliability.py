"""The page on reliability is what the committed results say, and every result says what it has to."""

import json

import pytest
from benchmarks.reliability import FOLDER, SCHEMA, SECTIONS, record
from benchmarks.reliability_page import PAGE, read_results, render

from tests.long.faults import LIST, check_list

ROOT = FOLDER.parents[2]
OPEN: set[str] = set()
"""Results with an open failure, which the page shows in bold and docs/log.md explains."""
FILES = sorted(FOLDER.glob("*.json"))


def test_the_page_is_that_of_the_committed_results():
    assert PAGE.read_text() == render(read_results()), "run python -m benchmarks.reliability_page"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_result_is_whole_and_has_no_failure_that_is_not_listed(file):
    result = json.loads(file.read_text())
    assert result["schema"] == SCHEMA
    assert result["section"] in SECTIONS
    assert (result["failures"] > 0) == (file.stem in OPEN)
    assert result["cases"] > 0
    assert result["claim"].endswith(".")
    assert "\n" not in result["claim"] + result["conditions"] + result["measured"]
    assert result["command"].startswith(("python", "make", "bsbr"))
    assert all(isinstance(sentence, str) for key in ("mended", "not_covered") for sentence in result[key])


def test_the_list_of_faults_fits_the_sources():
    check_list()
    assert len(LIST) >= 40
    missing = {test for fault in LIST for test in fault.tests if not (ROOT / "tests" / test).exists()}
    assert not missing


def test_what_failed_and_what_would_break_a_table_is_shown(tmp_path):
    settings = {"section": "Soak", "command": "make soak", "conditions": "CPU"}
    record("b", claim="A | B.", cases=1200, failures=3, mended=["It was so."], folder=tmp_path, **settings)
    record("a", claim="C.", cases=1, failures=0, not_covered=["Nothing else."], folder=tmp_path, **settings)
    page = render(read_results(tmp_path))
    assert "2 claims, 1,201 cases, **3** open failures." in page
    assert "| A \\| B. | 1,200 | **3** |" in page
    assert page.index("| C. |") < page.index("| A ")
    assert "- It was so." in page
    assert "- Nothing else." in page
    with pytest.raises(ValueError, match="section"):
        record("c", claim="D.", cases=1, failures=0, folder=tmp_path, **settings | {"section": "Other"})
