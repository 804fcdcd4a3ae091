"""Texts by file, folder and name."""

import gzip
import sys
from types import ModuleType

import pytest

from bsbr.data.collections import read_collection
from bsbr.data.text import split_documents
from bsbr.errors import UserError


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two\n<|endoftext|>\nthree\n")
    (tmp_path / "a").mkdir()
    with gzip.open(tmp_path / "a" / "x.txt.gz", "wt") as file:
        file.write("one\n")
    (tmp_path / "picture.png").write_bytes(b"\x00\xff")
    assert split_documents(read_collection(tmp_path)) == ["one\n", "two\n", "three"]
    assert read_collection(tmp_path / "b.txt") == "two\n<|endoftext|>\nthree\n"


def test_a_folder_without_texts_says_so(tmp_path):
    with pytest.raises(UserError, match="no file in this folder ends in"):
        read_collection(tmp_path)


def test_a_data_set_is_its_rows(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return {"text": ["one", " ", "two"]}

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert split_documents(read_collection("datasets:some/books,small,test")) == ["one\n", "two"]
    assert read_collection("datasets:some/books")
    assert asked == [("some/books", "small", "test"), ("some/books", None, "train")]


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    def load_dataset(name, config, split):
        raise ConnectionError("no network")

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match="cannot be had"):
        read_collection("datasets:some/books")
