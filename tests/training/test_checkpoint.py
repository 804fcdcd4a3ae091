"""A checkpoint is whole or it does not exist."""

import errno
import os
from pathlib import Path

import pytest
import torch

from bsbr.errors import UserError
from bsbr.training.checkpoint import load_checkpoint, save_checkpoint


def _save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"weights": {"w": torch.full((3, 4), float(step))}, "optimizer": {"w/m": torch.arange(step)}}
    return save_checkpoint(folder, step, tensors, {"note": step}, keep=keep)


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 3
    assert found.state == {"note": 3}
    assert torch.equal(found.tensors["weights"]["w"], torch.full((3, 4), 3.0))
    assert torch.equal(found.tensors["optimizer"]["w/m"], torch.arange(3))


def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_skipped_with_one_line(tmp_path: Path, name: str, damage: str) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 0x80
        path.write_bytes(content)
    with pytest.warns(UserWarning, match=name) as caught:
        found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    files = sorted(newest.iterdir())
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        path = files[case % len(files)]
        good = path.read_bytes()
        place, bit = (int(torch.randint(n, (1,), generator=generator)) for n in (len(good), 8))
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="left out"):
            found = load_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 1, f"{path.name} byte {place} bit {bit}"
        path.write_bytes(good)


def test_when_all_are_damaged_the_user_is_told_which_file(tmp_path: Path) -> None:
    (_save(tmp_path, 1) / "optimizer.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(UserError, match=r"step-00000001.*optimizer\.safetensors missing"),
    ):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the n-th fsync, for every n that a save makes."""
    _save(tmp_path, 1)
    real = os.fsync
    failures = 0
    for broken in range(100):
        calls = 0

        def fsync(handle: int, broken: int = broken) -> None:
            nonlocal calls
            calls += 1
            if calls == broken + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        refusal = ""
        try:
            _save(tmp_path, 2)
        except UserError as error:
            refusal = str(error)
            failures += 1
        assert not refusal or "No space left" in refusal
        monkeypatch.setattr(os, "fsync", real)
        assert {p.name for p in tmp_path.iterdir()} <= {"step-00000001", "step-00000002"}
        found = load_checkpoint(tmp_path)
        assert found is not None
        if calls <= broken:
            break
        if found.step == 2:  # the rename was done, only its flush failed: the checkpoint is whole
            break
    assert failures >= 8
