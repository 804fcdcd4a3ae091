"""Headers tell how a figure was made and nothing about who made it."""

import json
from types import SimpleNamespace

import pytest
import torch

from bsbr.evaluation.provenance import (
    describe_model,
    header,
    texts_digest,
    tokenizer_digest,
    weights_digest,
    without_folders,
)


def test_header_has_the_keys_of_the_format(tiny: SimpleNamespace) -> None:
    made = header(
        status="complete",
        command=["bsbr", "evaluate", "/secret/folder/model", "--output=/secret/out", "--top-k", "2"],
        model=describe_model(tiny.model(), name="/secret/folder/model"),
        data={},
        protocol={},
        config={},
        device="cpu",
        dtype="float32",
    )
    assert made["schema"] == {"name": "bsbr.evaluation", "version": 1}
    assert made["command"] == ["bsbr", "evaluate", "model", "--output=out", "--top-k", "2"]
    assert made["model"]["name"] == "model"
    assert {"cpu", "threads", "device", "dtype"} <= set(made["machine"])
    assert {"bsbr", "torch", "transformers", "python"} <= set(made["code"])
    assert "secret" not in json.dumps(made, allow_nan=False)
    with pytest.raises(ValueError, match="partial"):
        header(status="done", command=[], model={}, data={}, protocol={}, config={}, device="cpu", dtype="")


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("gpt2", "gpt2"),
        ("org/name", "org/name"),
        ("./here/model", "./here/model"),
        ("/a/b/model", "model"),
        ("/a/b/model/", "model"),
        ("~/model", "model"),
        ("C:\\people\\me\\model", "model"),
        ("--text=/a/b.txt", "--text=b.txt"),
        ("a=/b/c", "a=/b/c"),
    ],
)
def test_folders_are_taken_off_absolute_paths(word: str, kept: str) -> None:
    assert without_folders(word) == kept


def test_weights_tell_models_apart(tiny: SimpleNamespace) -> None:
    first, again, other = tiny.model(0), tiny.model(0), tiny.model(1)
    assert describe_model(first)["sha256"] == describe_model(again)["sha256"]
    assert describe_model(first)["sha256"] != describe_model(other)["sha256"]
    assert describe_model(first)["parameters"] == sum(p.numel() for p in first.parameters())
    low = [("w", torch.ones(2, dtype=torch.bfloat16)), ("e", torch.zeros(0))]
    assert weights_digest(low) == weights_digest(reversed(low))


def test_texts_and_tokenizers_tell_apart(tiny: SimpleNamespace) -> None:
    assert texts_digest(["ab", "c"]) != texts_digest(["a", "bc"])
    assert tokenizer_digest(tiny.tokenizer()) == tokenizer_digest(tiny.tokenizer())
