"""What the documentation shows runs, what it names exists, and nothing in it waits to be filled in."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import socket
from pathlib import Path

import pytest

from bsbr.cli import COMMANDS, _parser
from bsbr.evaluation.suite import RECORDS
from bsbr.evaluation.sweep import RECORDS as SWEEP_RECORDS
from bsbr.files import MANIFEST
from bsbr.report.definitions import METRICS
from bsbr.report.names import CAPTIONS, SECTIONS, SPEED_VARIANTS, VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = [page for page in PAGES if "```python" in page.read_text()]
ROOTS = (ROOT, ROOT / "src" / "bsbr")
WRITTEN = {
    *CAPTIONS,
    *(f"{name}.json" for name in SECTIONS),
    "report.html",
    "summary.md",
    RECORDS,
    SWEEP_RECORDS,
    MANIFEST,
}
"""Files that an evaluation or a conversion writes, which pages name without a folder."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:results/)?[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|json|jsonl|toml|svg|png|html|txt|xz))")


def by_name(pages):
    return [pytest.param(page, id=page.name) for page in pages]


def blocks(page, *languages):
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def prose(page):
    return FENCE.sub("", page.read_text())


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page):
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A folder to work in, and no network."""

    def refuse(*args, **kwargs):
        raise AssertionError("the documentation's code must not need a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


def run_quietly(work):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        work()
    return said.getvalue()


@pytest.mark.parametrize("page", by_name(CODE))
def test_python_blocks_run(page, offline):
    names = {"__name__": page.stem}
    for code in blocks(page, "python"):
        run_quietly(lambda code=code: exec(compile(code, page.name, "exec"), names))


def test_the_readme_shows_python():
    assert ROOT / "README.md" in CODE


def test_quickstart_runs_and_is_exact_where_it_says(offline):
    said = run_quietly(lambda: runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__"))
    exact, later = (float(share) for share in re.findall(r"positions: ([\d.]+)%", said))
    assert exact == 100
    assert later > 80  # of its next tokens; a model that lost the past agrees on about a third


@pytest.mark.parametrize("page", by_name(PAGES))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    for target in targets:
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", by_name(PAGES))
def test_files_named_exist(page):
    for span in spans(page):
        if FILE.fullmatch(span) and span.removeprefix("results/") not in WRITTEN:
            assert any((root / span).exists() for root in (page.parent, *ROOTS)), f"{page.name}: {span}"


def commands(page):
    lines = "\n".join(blocks(page, "bash", "")).replace("\\\n", " ").splitlines()
    return [line for line in (*lines, *spans(page)) if line.startswith("bsbr ")]


@pytest.mark.parametrize("page", by_name(PAGES))
def test_commands_are_understood(page):
    parser = _parser()
    known = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if words == ["COMMAND", "--help"]:
            continue
        assert words[0] in COMMANDS, f"{page.name}: {line}"
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert set(flags) <= set(known[words[0]]._option_string_actions), f"{page.name}: {line}"
        if len(words) > 1:
            parser.parse_args(words)


@pytest.mark.parametrize("page", by_name(PAGES))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in (*"\n".join(blocks(page, "bash")).splitlines(), *spans(page)):
        if line.startswith("make "):
            words = shlex.split(line, comments=True)[1:]
            assert {word for word in words if "=" not in word} <= targets, f"{page.name}: {line}"


@pytest.mark.parametrize("page", by_name(PAGES))
def test_nothing_waits_to_be_filled_in(page):
    assert re.findall(r"\{\{.*?\}\}", page.read_text()) == []


def test_every_metric_and_variant_of_a_report_is_explained():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    explained = {name.removesuffix("@k") for name in re.findall(r"^\| `([\w@]+)`", page, re.MULTILINE)}
    assert set(METRICS) <= explained
    assert {*VARIANTS, *SPEED_VARIANTS} <= explained
