"""The whole run on tiny models: the files, their figures, resuming, and what is refused."""

import dataclasses
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from bsbr.errors import UserError
from bsbr.evaluation.perplexity import perplexity
from bsbr.evaluation.settings import SuiteConfig
from bsbr.evaluation.speed import SpeedSettings
from bsbr.evaluation.suite import run_suite
from bsbr.evaluation.table import summary_tables
from bsbr.evaluation.windows import choose_documents

CONFIG = SuiteConfig(
    window=32,
    stride=16,
    documents=3,
    document_tokens=40,
    context=4,
    similarity_documents=2,
    random_samples=2,
    noise_documents=1,
    lengths=(4, 8, 16, 32),
    fixed_tokens=32,
    speed=SpeedSettings(rounds=3, warmup=1, min_sample_s=0.0, budget_s=60.0),
    measure_memory=False,
)
FILES = (
    "scaling_results",
    "scaling_exponents",
    "quality_results_wikitext",
    "similarity_metrics",
    "agreement_rates",
)
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def setting(tiny: SimpleNamespace) -> SimpleNamespace:
    original = tiny.model()
    return SimpleNamespace(
        original=original,
        tokenizer=tiny.tokenizer(),
        variants={
            "converted": tiny.disturbed(original, 0.02, block_size=8, top_k=1),
            "local": lambda: tiny.disturbed(original, 0.2, block_size=8, top_k=0),
            "value_only": tiny.disturbed(original, 0.0),
        },
        texts={"wikitext": tiny.texts(4, seed=1), "book": tiny.texts(3, seed=2)},
    )


def evaluate(setting: SimpleNamespace, folder: Path, config: SuiteConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    arguments = {
        "original": setting.original,
        "tokenizer": setting.tokenizer,
        "variants": setting.variants,
        "texts": setting.texts,
        "config": config,
        "output_dir": folder,
        **changes,
    }
    return run_suite(**arguments)


def read(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in FILES}


def find(rows: list[dict[str, Any]], metric: str, variant: str, **where: Any) -> dict[str, Any]:
    found = [r for r in rows if (r["metric"], r["variant"]) == (metric, variant) and r["slice"] == where]
    assert len(found) == 1, (metric, variant, where, len(found))
    return found[0]


@pytest.fixture(scope="module")
def done(setting: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("results")
    summary = evaluate(setting, folder, command=["bsbr", "evaluate", str(folder)], name="tiny")
    return SimpleNamespace(folder=folder, summary=summary, files=read(folder))


def test_files_follow_the_format(done: SimpleNamespace) -> None:
    for name, file in done.files.items():
        keys = {
            "schema",
            "status",
            "command",
            "code",
            "machine",
            "model",
            "data",
            "protocol",
            "config",
            "rows",
        }
        assert keys <= set(file), name
        assert file["status"] == "complete"
        for row in file["rows"]:
            assert {"evaluation", "metric", "variant", "slice", "value", "unit"} <= set(row)
            assert row["value"] is None or math.isfinite(row["value"])
            if row["value"] is None:
                assert row["reason"]
            elif "ci_low" in row:
                assert row["ci_low"] <= row["value"] + 1e-12
                assert row["value"] <= row["ci_high"] + 1e-12
                assert row["ci_method"]
        identities = [json.dumps([r["metric"], r["variant"], r["slice"]], sort_keys=True) for r in file["rows"]]
        assert len(set(identities)) == len(identities), f"{name}: a row is there twice"
    assert done.folder.name in done.files["agreement_rates"]["command"]


def test_files_name_no_folder_of_this_machine(done: SimpleNamespace) -> None:
    for name in FILES:
        assert str(done.folder.parent) not in (done.folder / f"{name}.json").read_text()


def test_quality_covers_the_variants_and_speed_its_own(done: SimpleNamespace) -> None:
    agreement = {row["variant"] for row in done.files["agreement_rates"]["rows"]}
    assert agreement == {"original", "converted", "local", "noise_floor", "noise_bfloat16"}
    perplexities = {row["variant"] for row in done.files["quality_results_wikitext"]["rows"]}
    assert perplexities == {"original", "converted", "local"}
    speed = {row["variant"] for row in done.files["scaling_results"]["rows"]}
    assert speed == {"original", "converted", "value_only"}


def test_perplexity_is_that_of_the_documents(done: SimpleNamespace, setting: SimpleNamespace) -> None:
    for text in ("wikitext", "book"):
        documents = choose_documents(setting.tokenizer, setting.texts[text], documents=3, tokens=40)
        for name, model in (("original", setting.original), ("converted", setting.variants["converted"])):
            expected = perplexity(model, documents, window=32, stride=16)
            for metric, estimate in expected.items():
                rows = done.files["quality_results_wikitext"]["rows"]
                row = find(rows, metric, name, text=text, bucket="all", length=32)
                assert row["value"] == pytest.approx(estimate.value, rel=1e-6)
                assert row["ci_low"] == pytest.approx(estimate.low, rel=1e-6)
                assert row["n"] == estimate.n


def test_ratio_and_gain_are_those_of_the_means(done: SimpleNamespace) -> None:
    rows = done.files["quality_results_wikitext"]["rows"]
    for bucket in ("all", "exposed", "key tokens"):
        where = {"text": "wikitext", "bucket": bucket, "length": 32}
        before, after = (find(rows, "perplexity", name, **where)["value"] for name in ("original", "local"))
        assert find(rows, "ppl_ratio", "local", **where)["value"] == pytest.approx(after / before)
    where = {"text": "wikitext", "bucket": "long context", "length": 32}
    gains = [find(rows, "context_gain", name, **where)["value"] for name in ("original", "local")]
    nlls = [find(rows, "nll", name, **where)["value"] for name in ("original", "local")]
    assert gains[0] - gains[1] == pytest.approx(nlls[1] - nlls[0])


def test_exposure_is_counted_from_the_settings(done: SimpleNamespace) -> None:
    """block_size 8, top_k 1: position 16 is the first with an unread block."""
    row = find(done.files["agreement_rates"]["rows"], "exposure", "converted", text="book", bucket="all")
    # Of 40 tokens, the first window scores positions 0 ... 30, the second positions 15 ... 22 of its own.
    assert row["value"] == pytest.approx((15 + 7) / 39)


def test_a_model_that_is_the_original_differs_by_nothing(
    setting: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, lengths=())
    same = {"converted": tiny.disturbed(setting.original, 0.0, block_size=8, top_k=1)}
    evaluate(setting, tmp_path, config, variants=same)
    rows = json.loads((tmp_path / "agreement_rates.json").read_text())["rows"]
    for text in ("wikitext", "book"):
        for bucket in ("all", "exposed"):
            assert find(rows, "kl", "converted", text=text, bucket=bucket)["value"] == 0
            assert find(rows, "top1_agreement", "converted", text=text, bucket=bucket)["value"] == 1
            assert find(rows, "ln_ppl_ratio", "converted", text=text, bucket=bucket)["value"] == 0
    similar = json.loads((tmp_path / "similarity_metrics.json").read_text())["rows"]
    for inputs in ("text", "random"):
        assert find(similar, "relative_l2", "converted", layer="last", input=inputs)["value"] == 0
        assert find(similar, "cosine", "converted", layer=1, input=inputs)["value"] == pytest.approx(1)
    assert not (tmp_path / "scaling_results.json").exists()


def test_published_keys_are_there(done: SimpleNamespace) -> None:
    assert set(done.files["agreement_rates"]) >= {"1", "5", "10"}
    rows = done.files["agreement_rates"]["rows"]
    overlap = find(rows, "any_overlap@5", "converted", text="wikitext", bucket="all")["value"]
    assert done.files["agreement_rates"]["5"] == overlap
    assert len(done.files["similarity_metrics"]["all_samples"]) == 2
    assert set(done.files["similarity_metrics"]["average"]) == {"cosine_similarity", "mse", "kl_divergence"}
    quality = done.files["quality_results_wikitext"]
    difference = (quality["bsbr_perplexity"] / quality["original_perplexity"] - 1) * 100
    assert quality["perplexity_difference_percent"] == pytest.approx(difference)
    scaling = done.files["scaling_results"]
    assert [entry["batch_size"] for entry in scaling["original"]] == [8, 4, 2]
    assert set(scaling["original"][0]) == set(scaling["bsbr"][0]) >= {"mean_time", "seq_length"}
    exponents = done.files["scaling_exponents"]
    assert {"original_exponent", "bsbr_exponent", "speedup_at_max_length"} <= set(exponents)


def test_histograms_count_every_token_over_common_edges(done: SimpleNamespace) -> None:
    histograms = done.files["similarity_metrics"]["histograms"]
    assert {entry["variant"] for entry in histograms} == {"converted", "local"}
    for entry in histograms:
        assert sum(entry["counts"]) == 64
        assert all(low < high for low, high in zip(entry["edges"], entry["edges"][1:], strict=False))
    edges = [entry["edges"] for entry in histograms if entry["metric"] == "cosine"]
    assert edges[0] == edges[1]


def test_summary_quotes_exposed_positions(done: SimpleNamespace) -> None:
    rows = done.files["agreement_rates"]["rows"]
    exposed = find(rows, "kl", "local", text="book", bucket="exposed")["value"]
    assert done.summary["positions"] == "exposed"
    assert done.summary["quality"]["book"]["local"]["kl"] == exposed
    console = Console(file=io.StringIO(), width=140)
    for table in summary_tables(done.summary):
        console.print(table)
    shown = console.file.getvalue()
    assert "Quality on wikitext, where the sparse part acts" in shown
    assert "value_only" in shown
    assert "32" in shown


class Stop:
    """Presses Ctrl-C at the n-th forward of any of the models."""

    def __init__(self, models: list[torch.nn.Module], after: int) -> None:
        self.left = after
        self.hooks = [model.register_forward_pre_hook(self.count) for model in models]

    def count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def stable(folder: Path) -> dict[str, Any]:
    """What two runs of the same thing must have in common: all but times."""
    files = read(folder)
    for file in files.values():
        del file["run"]
    timed = {name: files.pop(name)["digest"] for name in ("scaling_results", "scaling_exponents")}
    return files | timed


def test_ctrl_c_leaves_gradients_as_they_were(setting: SimpleNamespace, tmp_path: Path) -> None:
    """It may come within the end of torch.no_grad, before this has put back what was."""

    def variant() -> None:
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(setting, tmp_path, variants={"converted": variant})
    assert torch.is_grad_enabled()


def test_resuming_gives_the_files_of_an_uninterrupted_run(
    setting: SimpleNamespace, done: SimpleNamespace, tmp_path: Path
) -> None:
    expected = stable(done.folder)
    made = setting.variants | {"local": setting.variants["local"]()}
    models = [setting.original, *made.values()]
    counter = Stop(models, -1)
    with counter:
        evaluate(setting, tmp_path / "count", variants=made, name="tiny")
    forwards = -1 - counter.left
    assert forwards > 100
    points = random.Random(0).sample(range(1, forwards), 3)
    for number, point in enumerate([*points, 1]):
        folder = tmp_path / str(number)
        with Stop(models, point), pytest.raises(KeyboardInterrupt):
            evaluate(setting, folder, variants=made, name="tiny")
        for path in folder.glob("*.json"):
            assert json.loads(path.read_text())["status"] == "partial"
        kept = len((folder / "records.jsonl").read_text().splitlines()) - 1
        evaluate(
            setting,
            folder,
            variants=made,
            resume=True,
            command=["bsbr", "evaluate", str(done.folder)],
            name="tiny",
        )
        assert stable(folder) == expected
        assert read(folder)["agreement_rates"]["run"]["resumed_records"] == kept


def test_speed_alone_needs_no_text(setting: SimpleNamespace, tmp_path: Path) -> None:
    summary = evaluate(
        setting,
        tmp_path,
        SuiteConfig(
            lengths=(4, 8),
            quality_variants=(),
            speed_variants=("value_only",),
            fixed_tokens=0,
            speed=SpeedSettings(rounds=1, warmup=1, min_sample_s=0.0),
        ),
        tokenizer=None,
        texts={},
    )
    assert summary["status"] == "complete"
    assert set(summary["speedup"]) == {"value_only"}
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "scaling_exponents.json",
        "scaling_results.json",
    ]


def test_resuming_a_complete_run_measures_nothing(
    setting: SimpleNamespace, done: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "records.jsonl").write_bytes((done.folder / "records.jsonl").read_bytes())
    with Stop([setting.original], 1):
        evaluate(setting, folder, resume=True, command=["bsbr", "evaluate", str(done.folder)], name="tiny")
    assert stable(folder) == stable(done.folder)
    before, after = (json.loads((place / "scaling_results.json").read_text()) for place in (done.folder, folder))
    assert before["rows"] == after["rows"]


def test_resuming_under_other_settings_is_refused(
    setting: SimpleNamespace, done: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    records = (done.folder / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(records)
    changes: list[dict[str, Any]] = [
        {"config": dataclasses.replace(CONFIG, seed=1)},
        {"texts": setting.texts | {"book": tiny.texts(3, seed=9)}},
        {"variants": setting.variants | {"converted": tiny.disturbed(setting.original, 0.03, block_size=8, top_k=1)}},
        {"original": tiny.model(5)},
    ]
    for change in changes:
        with pytest.raises(UserError, match="another run"):
            evaluate(setting, tmp_path, resume=True, **change)
    assert (tmp_path / "records.jsonl").read_bytes() == records


def test_a_new_run_leaves_no_file_of_the_old_one(
    setting: SimpleNamespace, done: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "scaling_results.json").write_bytes((done.folder / "scaling_results.json").read_bytes())
    with Stop([setting.original], 1), pytest.raises(KeyboardInterrupt):
        evaluate(setting, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.jsonl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"config": dataclasses.replace(CONFIG, lengths=(32, 128))},
            "length 128: the model has 64 positions",
        ),
        ({"config": dataclasses.replace(CONFIG, window=80)}, "length 80: the model has 64 positions"),
        ({"config": dataclasses.replace(CONFIG, quality_variants=("moba",))}, '"moba" is not among'),
        ({"config": dataclasses.replace(CONFIG, speed_variants=("moba",))}, '"moba" is not among'),
        ({"config": dataclasses.replace(CONFIG, quality_variants=(), lengths=())}, "nothing to measure"),
        ({"texts": {}}, "no text to evaluate on"),
        ({"texts": {"wikitext": ["x", ""]}}, "at least 2 tokens"),
        ({"config": dataclasses.replace(CONFIG, bos=True), "tokenizer": None}, "no BOS token"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_file_is_touched(
    setting: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    if change.get("tokenizer", "") is None:
        plain = tiny.tokenizer()
        plain.bos_token = None
        change = change | {"tokenizer": plain}
    with pytest.raises(UserError, match=words) as refused:
        evaluate(setting, tmp_path / "results", **change)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300
    assert not (tmp_path / "results").exists()


def test_models_that_cannot_be_compared_are_refused(
    setting: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    for variants, words in (
        ({"original": tiny.model()}, "must not hold"),
        ({"converted": tiny.model().train()}, "training mode"),
        ({"converted": tiny.model(vocabulary=100)}, "one vocabulary"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(setting, tmp_path, variants=variants)


def test_a_folder_that_cannot_be_written_is_told(setting: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(setting, tmp_path / "results")
    assert (tmp_path / "results").read_text() == "a file in the way"


def test_a_model_that_gives_nan_is_told_and_nothing_kept_of_it(
    setting: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    broken = tiny.disturbed(setting.original, 0.0, block_size=8, top_k=1)
    with torch.no_grad():
        broken.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        evaluate(setting, tmp_path, variants={"converted": broken})
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"window": 1},
        {"stride": 32},
        {"documents": 0},
        {"lengths": (0,)},
        {"lengths": (8, 8)},
        {"seed": -1},
        {"context": 0},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)


def test_global_random_state_is_left_alone(setting: SimpleNamespace, tmp_path: Path) -> None:
    before = torch.random.get_rng_state(), random.getstate()
    evaluate(setting, tmp_path, dataclasses.replace(CONFIG, lengths=()))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
