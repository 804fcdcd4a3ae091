"""The sweep on a tiny model: its figures, its resuming, and what is refused."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bsbr import BSBRConfig, convert
from bsbr.errors import UserError
from bsbr.evaluation.agreement import compare, read_teacher
from bsbr.evaluation.fidelity import spread_windows
from bsbr.evaluation.speed import SpeedSettings
from bsbr.evaluation.sweep import run_sweep
from bsbr.evaluation.sweep_points import METHODS, Point, SweepConfig, keys_read
from bsbr.evaluation.sweep_table import sweep_tables
from bsbr.report import render

CONFIG = SweepConfig(
    attention=BSBRConfig(block_size=8, dense_below=0),
    budgets=(8, 16),
    units=(4, 8),
    lengths=(48, 64),
    windows=2,
    documents=3,
    batch_tokens=64,
    speed=SpeedSettings(rounds=2, warmup=1, min_sample_s=0.0, least_rounds=2),
)


class Calibrate:
    """Changes the scalars in a way that depends on the settings, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, length: int) -> None:
        self.calls += 1
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bsbr.calibration"):
                    parameter[:, 3] = 0.1 * model.config.bsbr["top_k"] + 0.001 * length


@pytest.fixture(scope="module")
def setting(tiny: SimpleNamespace) -> SimpleNamespace:
    texts = {"book": tiny.texts(4, length=400), "short": tiny.texts(2, length=400, seed=5)}
    return SimpleNamespace(original=tiny.model(), tokenizer=tiny.tokenizer(), texts=texts)


def sweep(setting: SimpleNamespace, folder: Path, calibrate: Any, config: SweepConfig = CONFIG, **more: Any) -> Any:
    arguments = (setting.original, setting.tokenizer, setting.texts, calibrate, config, folder)
    return run_sweep(*arguments, **more, name="tiny", command=["bsbr", "evaluate", "--sweep"])


@pytest.fixture(scope="module")
def done(setting: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sweep")
    content = sweep(setting, folder, Calibrate())
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(content))
    return SimpleNamespace(folder=folder, content=content)


def value(content: dict[str, Any], metric: str, variant: str, **where: Any) -> dict[str, Any]:
    (found,) = (
        row
        for row in content["rows"]
        if (row["metric"], row["variant"]) == (metric, variant) and where.items() <= row["slice"].items()
    )
    return found


def test_every_method_is_measured_at_every_point_and_position(done: SimpleNamespace) -> None:
    assert done.content["status"] == "complete"
    rows = [row for row in done.content["rows"] if row["metric"] == "kl"]
    buckets = {48: ["12-48", "0-8", "8-16", "16-32", "32-48"], 64: ["16-64", "0-8", "8-16", "16-32", "32-64"]}
    expected = {
        (text, length, bucket, unit, budget // unit, method)
        for text in ("book", "short")
        for length, names in buckets.items()
        for bucket in names
        for unit in (4, 8)
        for budget in (8, 16)
        for method in METHODS
    }
    keys = ("text", "length", "bucket", "retrieval_block_size", "top_k")
    assert {(*(row["slice"][key] for key in keys), row["variant"]) for row in rows} == expected
    assert len(rows) == len(expected)
    main = value(done.content, "kl", "moba", text="book", length=64, bucket="16-64", retrieval_block_size=4, top_k=2)
    assert main["clusters"] == 3
    assert main["n"] == 3 * 2 * 47
    assert main["ci_low"] <= main["value"] <= main["ci_high"]


def test_the_figures_are_those_of_the_model_run_by_hand(done: SimpleNamespace, setting: SimpleNamespace) -> None:
    model = convert(setting.original, BSBRConfig(block_size=8, retrieval_block_size=4, top_k=4, dense_below=0))
    Calibrate()(model, 64)
    sums, count = {"kl": 0.0, "top1_agreement": 0.0, "log_ratio": 0.0}, 0
    for windows in spread_windows(setting.tokenizer, setting.texts["book"][:3], 64, 2):
        for ids in windows:
            with torch.no_grad():
                p, q = (m(ids[None]).logits[0, 16:-1] for m in (setting.original, model))
            found = compare(read_teacher(p, ids[17:]), q)
            for name in sums:
                sums[name] += float(found[name].sum())
            count += len(p)
    where = {"text": "book", "length": 64, "bucket": "16-64", "retrieval_block_size": 4, "top_k": 4}
    for name in ("kl", "top1_agreement"):
        assert value(done.content, name, "converted", **where)["value"] == pytest.approx(sums[name] / count, rel=1e-4)
    ratio = value(done.content, "ppl_ratio", "converted", **where)["value"]
    assert ratio == pytest.approx(torch.tensor(sums["log_ratio"] / count).exp().item(), rel=1e-4)


def test_what_reads_everything_is_at_no_distance(done: SimpleNamespace) -> None:
    for method in METHODS:  # positions 0 to 15 have at most two blocks of 8 before the own one
        found = value(done.content, "kl", method, text="book", length=64, bucket="0-8", retrieval_block_size=8, top_k=2)
        assert found["value"] < 1e-9
    differing = [
        value(done.content, "kl", m, text="book", length=64, bucket="32-64", retrieval_block_size=8, top_k=1)["value"]
        for m in METHODS
    ]
    assert min(differing) > 1e-6
    assert len(set(differing)) == len(METHODS)


def test_a_window_of_one_budget_is_the_same_in_any_unit(done: SimpleNamespace) -> None:
    where = {"text": "book", "length": 64, "bucket": "16-64"}
    small = value(done.content, "kl", "window", **where, retrieval_block_size=4, top_k=4)["value"]
    assert small == pytest.approx(
        value(done.content, "kl", "window", **where, retrieval_block_size=8, top_k=2)["value"], rel=1e-4
    )


def test_density_counts_the_keys(done: SimpleNamespace) -> None:
    config = CONFIG.settings("converted", Point(4, 2))
    counted = sum(min(t // 8 * 8, 8) + t % 8 + 1 for t in range(16, 63)) / sum(range(17, 64))
    assert keys_read(config, 16, 63) == pytest.approx(counted)
    row = value(done.content, "keys_read", "all_methods", length=64, retrieval_block_size=4, top_k=2)
    assert row["value"] == pytest.approx(counted)
    assert keys_read(dataclasses.replace(config, top_k=100), 16, 63) == 1


def test_times_are_of_the_methods_that_have_one(done: SimpleNamespace) -> None:
    rows = [row for row in done.content["rows"] if row["metric"] == "time_s" and row["slice"]["length"] == 64]
    assert all(row["volatile"] and row["value"] > 0 for row in rows)
    points = [row["variant"] for row in rows if "top_k" in row["slice"]]
    assert sorted(points) == sorted(["converted", "uncalibrated", "moba", "window"] * 4)
    assert {row["variant"] for row in rows if "top_k" not in row["slice"]} == {"original", "value_only"}


class Stop:
    """Counts the forwards of the original's embedding, which all models share, and presses Ctrl-C at the n-th."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.calls = after, 0

    def __deepcopy__(self, memo: object) -> "Stop":
        return self  # models that share weights copy their hooks: the count is of all of them

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.after:
            raise KeyboardInterrupt


def test_nothing_is_timed_where_no_device_is_named(setting: SimpleNamespace, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lengths=(48,), documents=1, windows=1, time_device="none")
    content = sweep(setting, tmp_path, Calibrate(), config)
    assert content["status"] == "complete"
    assert not [row for row in content["rows"] if row["metric"] == "time_s"]
    render(tmp_path)
    assert "median with 20 and 80" not in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "kl_vs_time.png").exists()


@pytest.mark.parametrize("after", [3, 450])
def test_resuming_gives_the_file_of_an_uninterrupted_run(
    setting: SimpleNamespace, done: SimpleNamespace, tmp_path: Path, after: int
) -> None:
    calibrate = Calibrate()
    hook = setting.original.transformer.wte.register_forward_pre_hook(Stop(after))
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(setting, tmp_path, calibrate)
    finally:
        hook.remove()
    assert json.loads((tmp_path / "sweep.json").read_text())["status"] == "partial"
    content = sweep(setting, tmp_path, calibrate, resume=True)
    assert content["digest"] == done.content["digest"]
    assert calibrate.calls == 8  # two lengths, four points: none twice
    assert content["run"]["resumed_records"] > 0


def test_where_only_times_are_missing_models_run_only_to_be_timed(
    setting: SimpleNamespace, done: SimpleNamespace, tmp_path: Path
) -> None:
    folder = shutil.copytree(done.folder, tmp_path / "sweep")
    lines = (folder / "sweep_records.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("key", ["header"])[0] != "time"]
    assert len(lines) - len(kept) == len(CONFIG.lengths)
    (folder / "sweep_records.jsonl").write_text("".join(kept))
    console = Console(file=io.StringIO())
    calibrate, forwards = Calibrate(), Stop()  # counts alone
    hook = setting.original.transformer.wte.register_forward_pre_hook(forwards)
    try:
        content = sweep(setting, folder, calibrate, resume=True, console=console)
    finally:
        hook.remove()
    contenders = 2 + 4 * len(CONFIG.points)  # the original and no attention; four methods have a time of their own
    each = CONFIG.speed.warmup + 2 * CONFIG.speed.rounds
    assert calibrate.calls == 0
    assert forwards.calls == 2 + len(CONFIG.lengths) * contenders * each  # the check of its head takes two
    assert content["digest"] == done.content["digest"]
    said = console.file.getvalue()
    assert said.count("Measuring") == said.count("Measuring speed") == 1


def test_records_of_another_sweep_are_refused(setting: SimpleNamespace, done: SimpleNamespace) -> None:
    other = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(UserError, match="belong to another run"):
        sweep(setting, done.folder, Calibrate(), other, resume=True)


def test_without_calibration_the_calibrated_method_is_absent(setting: SimpleNamespace, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lengths=(48,), units=(8,), budgets=(8,), documents=1)
    content = sweep(setting, tmp_path, None, config)
    variants = {row["variant"] for row in content["rows"]}
    assert "converted" not in variants
    assert {"uncalibrated", "oracle", "random"} <= variants
    assert "ci_low" not in value(content, "kl", "moba", text="book", bucket="12-48")


def test_the_terminal_table_shows_every_method(done: SimpleNamespace) -> None:
    console = Console(file=io.StringIO(), width=160)
    tables = sweep_tables(done.content)
    assert len(tables) == 4
    for table in tables:
        console.print(table)
    shown = console.file.getvalue()
    assert all(shown.count(f" {method} ") >= 16 for method in METHODS)
    main = value(done.content, "kl", "oracle", text="book", length=64, bucket="16-64", retrieval_block_size=4, top_k=2)
    assert f"{main['value']:.5f} [" in shown


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budgets": (10,)}, "no multiple of the retrieval block"),
        ({"units": (3,), "budgets": (9,)}, "must divide block_size"),
        ({"lengths": (24,)}, "read exactly"),
        ({"after": 63}, "after must lie within"),
        ({"attention": BSBRConfig(block_size=8, far="drop", dense_below=0)}, "MoBA"),
        ({"windows": 0}, "windows must be >= 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **change)


def test_windows_that_do_not_fit_are_refused(setting: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 positions"):
        sweep(setting, tmp_path, None, dataclasses.replace(CONFIG, lengths=(128,)))
    brief = SimpleNamespace(**(vars(setting) | {"texts": {"a": ["too short"]}}))
    with pytest.raises(UserError, match="no document has 48 tokens"):
        sweep(brief, tmp_path, None)
