"""Committed result files are whole and say under which conditions they came about."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_every_result_file_names_its_conditions():
    files = sorted(RESULTS.rglob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        assert content["schema"]["name"].startswith("bsbr"), file
        assert content.get("status", "complete") == "complete", file
        assert content["code"]["torch"], file
        assert content["command"], file
