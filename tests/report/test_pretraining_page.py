"""The page of a pretraining run holds its figures and curves, and nothing from outside."""

import json

import pytest

from bsbr.errors import UserError
from bsbr.report.pretraining import render_pretraining

RECORD = {
    "recipe": {"architecture": "llama", "attention": {"mixer": "bsbr"}, "seed": 0},
    "parameters": 12345,
    "steps": 10,
    "tokens_seen": 640,
    "training_s": 2.0,
    "text": {"train": {"name": "<b>evil</b>"}},
    "held_out": {"nll": 1.25, "bits_per_byte": 0.5},
    "history": [{"tokens": 320, "train_loss": 2.0, "held_out_nll": 1.9}, {"tokens": 640, "train_loss": 1.5, "held_out_nll": 1.25}],
    "versions": {"bsbr": "0"},
    "device": "cpu",
    "precision": "float32",
}  # fmt: skip


def test_the_page_needs_nothing_else(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    page = render_pretraining(tmp_path).read_text()
    assert "llama with bsbr attention, 12,345 parameters" in page
    assert "1.2500 nats per token" in page
    assert "data:image/png;base64," in page
    assert "<b>evil" not in page
    assert "http" not in page
    assert "<script" not in page


def test_accuracy_is_shown_by_distance(tmp_path):
    found = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 8}
    held_out = {"nll": 1.0, "accuracy": found, "by_distance": [{"least": 4, "most": 7, **found}]}
    history = [{**row, "accuracy": 0.5} for row in RECORD["history"]]
    (tmp_path / "training.json").write_text(json.dumps({**RECORD, "held_out": held_out, "history": history}))
    page = render_pretraining(tmp_path).read_text()
    assert "50.00% (25.00% to 75.00%)" in page
    assert "at distance 4 to 7" in page


def test_a_missing_or_damaged_record_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no training\.json"):
        render_pretraining(tmp_path)
    (tmp_path / "training.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be used"):
        render_pretraining(tmp_path)
