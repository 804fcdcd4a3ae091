"""The report says what the result files say: all of it, nothing else, and safely."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bsbr.report import load, render
from bsbr.report.cautions import not_measured, warnings
from bsbr.report.html import report_html
from bsbr.report.markdown import escape, summary_markdown
from bsbr.report.metrics import metric
from bsbr.report.names import CAPTIONS, SECTIONS
from bsbr.report.plots import PLOTS
from bsbr.report.tables import summary_table, tables
from bsbr.report.verdict import verdict
from bsbr.report.wording import interval_text, value_text

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
SWEPT = {"quality_vs_density.png", "kl_vs_time.png", "kl_by_position.png"}


def test_every_published_plot_is_drawn_beside_the_page_and_the_summary(rendered: Path) -> None:
    written = {path.name for path in rendered.iterdir()} - {f"{name}.json" for name in SECTIONS}
    assert written == PUBLISHED | SWEPT | {"report.html", "summary.md"}
    assert set(PLOTS) == set(CAPTIONS) == PUBLISHED | SWEPT
    assert all((rendered / name).read_bytes().startswith(PNG) for name in PUBLISHED | SWEPT)


def test_render_names_the_files_it_wrote_and_leaves_no_other(sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("agreement_rates",))
    paths = render(folder)
    assert sorted(path.name for path in paths) == [
        "agreement_rates.png",
        "metrics_distribution.png",
        "report.html",
        "summary.md",
    ]
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {"agreement_rates.json"}


@pytest.mark.parametrize("name", SECTIONS)
def test_each_file_alone_makes_a_report_that_names_the_missing_ones(sample: Sample, name: str, tmp_path: Path) -> None:
    results = load(sample(tmp_path / "r", (name,)))
    page, summary = report_html(results, {}), summary_markdown(results)
    for other, title in SECTIONS.items():
        said = f"{title}: no {other}.json in this folder." in not_measured(results)
        assert said == (other != name)
        assert (f'id="{other.replace("_", "-")}"' in page) == (other == name)
        assert (f"no {escape(other)}.json" in summary) == (other != name)


def test_what_was_not_measured_is_said_and_never_a_zero(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("agreement_rates",))

    def drop(document: dict) -> None:
        document["rows"] = [
            row
            for row in document["rows"]
            if row["metric"] not in ("overlap@10", "overlap@5")
            or (row["variant"], row["metric"]) == ("local", "overlap@5")
        ]

    results = load(edit(folder, "agreement_rates", drop))
    cells = {row[0].text: row for row in summary_table(results).rows}
    column = next(i for i, head in enumerate(summary_table(results).columns) if "overlap@5" in head)
    assert cells["converted"][column].text == "not measured"
    assert cells["local only"][column].text.endswith("%")
    assert any("overlap@10" in line for line in not_measured(results))
    assert not any(cell.text.startswith(("0.0 %", "0 %")) for row in cells.values() for cell in row)


def test_a_reason_for_a_missing_value_is_passed_on(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("scaling_exponents",))

    def no_crossing(document: dict) -> None:
        for row in document["rows"]:
            if row["metric"] == "crossover_length":
                row |= {"value": None, "reason": "the fitted curves do not cross"}
        document["rows"].append(document["rows"][-1] | {"variant": "value_only", "value": 300.0})

    results = load(edit(folder, "scaling_exponents", no_crossing))
    texts = [cell.text for row in tables(results)["scaling_exponents"][0].rows for cell in row]
    assert "not measured: the fitted curves do not cross" in texts


def test_no_measured_row_is_left_out_of_the_page(rendered: Path) -> None:
    results = load(rendered)
    page = report_html(results, {})
    for section in SECTIONS:
        for row in results.rows(section):
            words = metric(row.metric)
            assert value_text(words.kind, row.value).replace(">", "&gt;").replace("<", "&lt;") in page, row


def test_the_verdict_states_the_figures_of_the_files(rendered: Path) -> None:
    found = verdict(load(rendered))
    text = " ".join(found.sentences)
    assert "same next token as the original 95.6 % (interval 95.2 to 96.0) of the time" in text
    assert "\N{MULTIPLICATION SIGN}1.012 of the original's (31.80 against 31.42)" in text
    assert "mean KL divergence of 0.00970 nats" in text
    assert "0.40 % with the published additive design" in text
    assert re.search(r"from 2,048 tokens on it is 1\.\d\d. as fast as the original, rising to 8\.\d\d. at 32,768", text)
    assert found.figures[0].label == "same next token"


def test_a_sweep_alone_is_a_report_of_its_points(sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("sweep",))
    written = {path.name for path in render(folder)}
    assert written == SWEPT | {"report.html", "summary.md"}
    results = load(folder)
    (sentence,) = verdict(results).sentences
    assert sentence.startswith("With 3.9 % of the keys read (book, windows of 8,192 tokens, 8 blocks of 32)")
    assert "0.0100 (converted)" in sentence
    assert "0.600 (window)" in sentence
    main = [table for table in tables(results)["sweep"] if not table.minor]
    assert [table.title for table in main] == [
        "Book, windows of 2,048 tokens, positions 512-2048",
        "Book, windows of 8,192 tokens, positions 2048-8192",
    ]
    rows = [[cell.text for cell in row] for row in main[1].rows]
    assert len(rows) == 2 + 3 * 6
    converted = [row for row in rows if row[0] == "converted"]
    assert [row[1] for row in converted] == ["8 of 32", "2 of 128", "8 of 128"]
    assert [row[2] for row in converted] == ["3.9 %", "3.9 %", "13.3 %"]
    assert [row[3] for row in converted] == ["0.0100", "0.0200", "0.00500"]
    assert [row[6] for row in rows if row[0].startswith("oracle")] == ["a control"] * 3
    summary = (folder / "summary.md").read_text()
    assert "## Book, windows of 8,192 tokens" in summary
    assert "| converted | 8 of 32 | 3.9 % | 0.0100" in summary


def test_a_collapse_at_late_positions_stands_in_the_tables(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    def collapse(document: dict) -> None:
        for row in document["rows"]:
            if row["metric"] == "kl" and row["slice"]["bucket"] == "1024-8192" and row["variant"] == "converted":
                row |= {"value": 7.77, "ci_low": 7.0, "ci_high": 8.0}

    results = load(edit(sample(tmp_path / "r", ("sweep",)), "sweep", collapse))
    found = [
        cell.text
        for table in tables(results)["sweep"]
        if table.minor and "8,192" in table.title and "KL" in table.title
        for row in table.rows
        for head, cell in zip(table.columns, row, strict=True)
        if head == "positions 1024-8192" and row[0].text.startswith("converted, 8 of 32")
    ]
    assert found == ["7.77"]


def test_a_slower_model_is_said_to_be_slower(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("scaling_results",))

    def slow(document: dict) -> None:
        for row in document["rows"]:
            if row["metric"] == "speedup":
                row |= {"value": 0.55, "ci_low": 0.5, "ci_high": 0.6}

    text = " ".join(verdict(load(edit(folder, "scaling_results", slow))).sentences)
    assert "it is not reliably faster at any length measured: at 128 to 32,768 tokens it runs at 0.55" in text
    assert "as fast as" not in text


def test_the_summary_is_the_same_for_the_same_files(edit: Edit, sample: Sample, tmp_path: Path) -> None:
    first = summary_markdown(load(sample(tmp_path / "a")))
    second = sample(tmp_path / "b")
    for name in SECTIONS:
        edit(second, name, lambda document: document["rows"].reverse())
    assert first == summary_markdown(load(second))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("agreement_rates", lambda d: d.update(status="partial"), "not finished: agreement_rates.json"),
        ("agreement_rates", lambda d: d["machine"].update(device="cuda"), "do not agree on their machine"),
        ("agreement_rates", lambda d: d["protocol"].update(window=1152), "cannot show what sparsity costs"),
        (
            "agreement_rates",
            lambda d: [r.update(clusters=7) for r in d["rows"]],
            "only 7 independent pieces of text",
        ),
        ("agreement_rates", lambda d: [r.pop("ci_low", 0) for r in d["rows"]], "No interval was computed"),
        (
            "agreement_rates",
            lambda d: d["rows"][-1].update(value=0.0),
            "no scored position had an earlier block",
        ),
        ("agreement_rates", lambda d: d["model"].update(positions=4096), "beyond the 4,096 positions"),
        (
            "scaling_exponents",
            lambda d: d["rows"][-1].update(value=90_000.0),
            "90,000 tokens is extrapolated",
        ),
        ("scaling_results", lambda d: d["rows"][0].update(extrapolated=True), "beyond the positions"),
        ("scaling_results", lambda d: d.update(warnings=["the fan was loud"]), "the fan was loud"),
        ("scaling_results", lambda d: None, "run exact attention by choice"),
    ],
)
def test_what_weakens_a_figure_stands_beside_it(
    edit: Edit, sample: Sample, name: str, change, expected: str, tmp_path: Path
) -> None:
    results = load(edit(sample(tmp_path / "r"), name, change))
    assert any(expected in warning for warning in warnings(results))
    assert expected in report_html(results, {})
    assert escape(expected) in summary_markdown(results)


def test_a_plot_of_an_earlier_run_is_pointed_out(sample: Sample, tmp_path: Path) -> None:
    folder = sample(tmp_path / "r", ("quality_results_wikitext",))
    (folder / "agreement_rates.png").write_bytes(PNG)
    render(folder)
    assert "agreement_rates.png in this folder: from an earlier run" in (folder / "report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("share", 1.0, "100.0 %"),
        ("share", 0.99996, "> 99.99 %"),
        ("share", 0.9999, "99.99 %"),
        ("share", 0.0, "0.0 %"),
        ("share", 0.00001, "< 0.01 %"),
        ("ratio", 39659.1, "\N{MULTIPLICATION SIGN}39,659"),
        ("speedup", 0.5504, "0.55\N{MULTIPLICATION SIGN}"),
        ("seconds", 2.014, "2.01 s"),
        ("seconds", 4e-6, "4.00 \N{MICRO SIGN}s"),
        ("bytes", 1536, "1.50 KiB"),
        ("bytes", 0, "0 B"),
        ("small", -0.0, "0.0"),
        ("small", 1.2e-7, "1.20e\N{MINUS SIGN}07"),
        ("plain", 2073936.5, "2,073,936"),
    ],
)
def test_numbers_read_as_they_are(kind, value: float, expected: str) -> None:
    assert value_text(kind, value) == expected


def test_the_ends_of_a_narrow_interval_can_be_told_apart() -> None:
    assert interval_text("share", 0.956, 0.95601, 0.95604) == "[95.601, 95.604]"


def test_reports_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, bsbr.report.html, bsbr.report.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
