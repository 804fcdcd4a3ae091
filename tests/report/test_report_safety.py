"""Foreign text stays text, the page asks for nothing, and a damaged file is one line."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bsbr.errors import UserError
from bsbr.report import load, render
from bsbr.report.html import report_html
from bsbr.report.markdown import summary_markdown
from bsbr.report.plots import draw_all
from bsbr.report.wording import visible

Sample = Callable[..., Path]
Edit = Callable[..., Path]
PNG = b"\x89PNG\r\n\x1a\n"
PUBLISHED = {
    "inference_time_vs_seq_length.png",
    "throughput_vs_seq_length.png",
    "speedup_vs_seq_length.png",
    "scaling_exponent_analysis.png",
    "perplexity_comparison_wikitext.png",
    "metrics_distribution.png",
    "agreement_rates.png",
}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</title><h1>gone</h1>",
    "</td></tr></table><table><tr><td>",
    "javascript:alert(1)//<a href='javascript:alert(1)'>x</a>",
    "{{ 7 * 7 }}{% for x in y %}",
    "<!--<style>*{display:none}</style>",
    "\x1b[2J\x1b]0;owned\x07\u202egnp.exe\u2066",
    "\ud800 lone $\\frac{1}{0}$ | pipe `tick` [a](http://example.invalid) \n# head",
)


class Elements(HTMLParser):
    """Collects elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_asks_for_nothing_from_outside(rendered: Path) -> None:
    page = Elements((rendered / "report.html").read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "base", "video", "audio", "svg"}
    assert not [name for name, _ in page.values if name.startswith("on") or name in ("srcset", "action", "style")]
    assert all(value.startswith("data:image/png;base64,") for name, value in page.values if name == "src")
    assert all(value.startswith("#") for name, value in page.values if name == "href")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in "".join(
        v for n, v in page.values if n == "content"
    )
    style = re.search(r"<style>(.*?)</style>", (rendered / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert not [word for word in ("url(", "@import", "expression(") if word in style[1]]


def test_links_of_the_page_lead_somewhere_and_ids_are_unique(rendered: Path) -> None:
    page = Elements((rendered / "report.html").read_text(encoding="utf-8"))
    ids = [value for name, value in page.values if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.values if name == "href"} <= set(ids)


def hostile_folder(sample: Sample, edit: Edit, folder: Path, text: str) -> Path:
    """A small folder with `text` wherever foreign text can stand."""
    sample(folder, ("scaling_exponents", "quality_results_wikitext"), model=text, note=text)

    def change(document: dict) -> None:
        row = document["rows"][0]
        document["rows"] = [entry for entry in document["rows"] if entry["slice"].get("bucket") == "all"]
        document["rows"].append(row | {"metric": text, "variant": "converted"})
        document["rows"].append(row | {"variant": text, "ci_method": text, "slice": {"text": text, "bucket": text}})
        document["rows"].append(row | {"metric": "nll", "value": None, "reason": text})
        document |= {
            "warnings": [text],
            "not_measured": [{"what": text, "reason": text}],
            "command": ["bsbr", text],
        }

    return edit(folder, "quality_results_wikitext", change)


@pytest.fixture(scope="module")
def benign_elements(edit: Edit, sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = hostile_folder(sample, edit, tmp_path_factory.mktemp("benign"), "plain words")
    return sorted(Elements(report_html(load(folder), {})).elements)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_changes_no_element_of_the_page(
    edit: Edit, sample: Sample, text: str, tmp_path: Path, benign_elements: list
) -> None:
    page = report_html(load(hostile_folder(sample, edit, tmp_path / "r", text)), {})
    elements = Elements(page)
    assert sorted(elements.elements) == benign_elements
    assert visible(text).strip()[:12] in "".join(elements.text)
    page.encode("utf-8")
    assert not set(page) & {"\x1b", "\x07", "\u202e", "\u2066"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_the_summary(edit: Edit, sample: Sample, text: str, tmp_path: Path) -> None:
    folder = hostile_folder(sample, edit, tmp_path / "r", text)
    summary = summary_markdown(load(folder))
    assert "<" not in summary.split("Run again:")[0]
    assert not set(summary) & {"\x1b", "\x07", "\u202e", "\ud800"}
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    assert sum(line.startswith("#") for line in summary.splitlines()) == 1


def test_hostile_names_can_be_drawn(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    folder = hostile_folder(sample, edit, tmp_path / "r", HOSTILE[-1])
    assert "perplexity_comparison_wikitext.png" in draw_all(load(folder))


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as missing:
        render(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no results: expected at least one of") as empty:
        render(tmp_path)
    assert "\n" not in str(missing.value) + str(empty.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"{}",
        b'{"schema": {"version": 1}, "rows": [1]}',
        b'{"schema": {"version": 1}, "rows": [{}]}',
        b'{"schema": {"version": 1}, "rows": [{"metric": "kl", "variant": "converted", "value": "0"}]}',
        b'{"schema": {"version": 1}, "rows": [{"metric": "kl", "variant": "converted", "value": NaN}]}',
        b'{"schema": {"version": 1}, "rows": [{"metric": "kl", "variant": "converted", "value": 1e999}]}',
        b'{"schema": {"version": 1}, "rows": [{"metric": "a", "variant": "c", "value": 1, "slice": [2]}]}',
        b'{"schema": {"version": 2}, "rows": []}',
        b'{"schema": {"version": 1}, "rows": [], "histograms": [{"metric": "a", "variant": "c"}]}',
        b"[" * 100_000,
        b'{"original_exponent": 0.08}',
    ],
)
def test_a_damaged_file_is_named_in_one_line_and_nothing_is_written(
    sample: Sample, content: bytes, tmp_path: Path
) -> None:
    folder = sample(tmp_path / "r", ("scaling_results",))
    (folder / "agreement_rates.json").write_bytes(content)
    with pytest.raises(UserError, match=r"agreement_rates\.json.*cannot be used") as error:
        render(folder)
    assert "\n" not in str(error.value)
    assert {path.suffix for path in folder.iterdir()} == {".json"}
