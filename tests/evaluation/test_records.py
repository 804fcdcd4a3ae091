"""The record file: nothing kept is lost, nothing foreign is taken up."""

import json
from pathlib import Path

import numpy as np
import pytest

from bsbr.errors import UserError
from bsbr.evaluation.records import RecordStore, digest, pack, unpack


def filled(path: Path, count: int = 3) -> bytes:
    with RecordStore(path, "protocol") as store:
        for index in range(count):
            store.append(("item", index), {"value": index / 3})
    return path.read_bytes()


def test_every_truncation_keeps_the_whole_lines(tmp_path: Path) -> None:
    """A kill may leave any prefix of the file: the torn line is dropped, and the run goes on from there."""
    path = tmp_path / "records.jsonl"
    data = filled(path)
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        with RecordStore(path, "protocol", resume=True) as store:
            assert store.resumed == max(0, whole - 1)
            for index in range(store.resumed, 3):
                store.append(("item", index), {"value": index / 3})
        assert path.read_bytes() == data


def test_another_protocol_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    data = filled(path)
    with pytest.raises(UserError, match="another run"):
        RecordStore(path, "other", resume=True)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line", [b"{\n", b"[]\n", b'{"key": 3}\n', b'{"key": [9], "content": {}, "sha256": "0"}\n', b"\xff\xfe\n"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(filled(path) + line)
    with pytest.raises(UserError, match="line 5 is damaged"):
        RecordStore(path, "protocol", resume=True)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"schema": {"name": "x", "version": 9}, "protocol": "protocol"}) + "\n")
    with pytest.raises(UserError, match="another format"):
        RecordStore(path, "protocol", resume=True)


def test_without_resume_it_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    filled(path)
    with RecordStore(path, "other") as store:
        assert ("item", 0) not in store
    assert len(path.read_text().splitlines()) == 1


def test_an_item_is_kept_once_and_without_nan(tmp_path: Path) -> None:
    with RecordStore(tmp_path / "records.jsonl", "protocol") as store:
        store.append(("a",), {"value": 1.0})
        with pytest.raises(ValueError, match="once"):
            store.append(("a",), {"value": 2.0})
        with pytest.raises(ValueError, match="JSON"):
            store.append(("b",), {"value": float("nan")})
        assert store.get(("a",)) == {"value": 1.0}


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        RecordStore(tmp_path, "protocol")
    with pytest.raises(UserError, match="cannot be read"):
        RecordStore(tmp_path, "protocol", resume=True)


def test_vectors_come_back_in_float32() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    assert np.array_equal(unpack(pack(values)), values.astype(np.float32))
    assert unpack(pack([])).shape == (0,)


def test_digest_tells_contents_apart() -> None:
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
