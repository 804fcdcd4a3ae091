"""What was saved loads again or says why not: full disks, damage, kills. `tests/long` does much more of each."""

import os
import random
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bsbr.errors import ResourceError, UserError
from bsbr.files import MANIFEST, check_writable, remove_temporaries, staged_folder, write_atomic, write_error
from bsbr.hf.loading import load_model
from bsbr.manifest import check_manifest, read_manifest, write_manifest
from bsbr.training.hub_trainer import newest_checkpoint
from tests.long import damage, disk_full, forks, tiny


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("given"))


@pytest.fixture
def converted(given: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(given / "converted", tmp_path / "converted"))


def flip(path: Path, place: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_saved_model_carries_a_manifest_that_both_loaders_check(converted: Path) -> None:
    assert {"config.json", "model.safetensors", "bsbr_hub.py"} <= set(read_manifest(converted) or {})
    load_model(converted)
    flip(converted / "model.safetensors")
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            UserError, match=r"model\.safetensors has another SHA-256 than manifest\.json says"
        ) as error:
            load(converted)
        assert "\n" not in str(error.value)


def test_a_folder_without_a_manifest_or_with_an_edited_config_loads(converted: Path, given: Path) -> None:
    config = converted / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.warns(UserWarning, match=r"config\.json has \d+ bytes, manifest\.json says \d+: edited or damaged"):
        load_model(converted)
    (converted / MANIFEST).unlink()
    flip(converted / "model.safetensors")
    load_model(converted)
    assert not (given / "model" / MANIFEST).exists()  # transformers alone saved it


def test_saving_over_a_model_renews_its_manifest_and_removes_old_shards(converted: Path) -> None:
    model = load_model(converted)
    model.save_pretrained(converted, max_shard_size="10KB")
    assert len(list(converted.glob("model-*.safetensors"))) > 1
    assert not (converted / "model.safetensors").exists()
    assert torch.equal(load_model(converted).lm_head.weight, model.lm_head.weight)
    model.save_pretrained(converted)
    assert not list(converted.glob("model-*")) + list(converted.glob("*.index.json"))
    check_manifest(converted)
    assert (converted / "tokenizer.json").exists()


def test_a_damaged_manifest_is_said(converted: Path) -> None:
    flip(converted / MANIFEST, 200)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_model(converted)


def test_files_of_a_staged_folder_come_all_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as folder:
        (folder / "config.json").write_text("old")
        (folder / "a").write_text("old")
    (target / "mine").write_text("kept")

    def fail() -> None:
        with staged_folder(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (target / "a").read_text() == "old"
    with staged_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert sorted(os.listdir(target)) == ["a", "config.json", "mine"]
    assert os.listdir(tmp_path) == ["target"]


def test_permissions_are_those_of_an_ordinary_file(converted: Path, tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "b")
    before = os.umask(0)
    os.umask(before)
    for path in (tmp_path / "a", converted / "model.safetensors", converted / MANIFEST):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~before


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".a.json.abcdefgh.tmp.json").write_text("")
    (tmp_path / ".out.abcdefgh.tmp").mkdir()
    (tmp_path / "..out.abcdefgh.tmp.abcdefgh.tmp").mkdir()
    kept = [out / ".hidden", out / "a.tmp", tmp_path / ".other.abcdefgh.tmp"]
    for path in kept:
        path.write_text("")
    remove_temporaries(out)
    assert sorted(tmp_path.rglob("*")) == sorted([out, *kept])


def test_a_full_disk_is_told_from_other_faults(tmp_path: Path) -> None:
    assert isinstance(write_error("file", tmp_path, OSError(28, "No space left on device")), ResourceError)
    assert type(write_error("file", tmp_path, OSError(13, "Permission denied"))) is UserError
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["a JSON file", "a training checkpoint", "save_pretrained", "evaluation records"])
def test_a_full_disk_costs_nothing_that_was_there(name: str, given: Path, tmp_path: Path) -> None:
    writes, faults = disk_full.fill(*disk_full.jobs(given)[name], tmp_path, every=7)
    assert writes >= 4
    assert not faults


def test_damage_is_noticed(tmp_path: Path) -> None:
    for kind, (place, load) in damage.saved(tmp_path, train=False).items():
        assert not damage.harm(place, load, 8, 4, random.Random(kind)), kind


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path / "none") is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert newest_checkpoint(tmp_path) is None
    write_manifest(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"checkpoint-4.* it was not finished"):
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{ }")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="no older one"):
        newest_checkpoint(tmp_path)


def test_a_killed_conversion_goes_on_to_the_same_model(given: Path, tmp_path: Path) -> None:
    """Killed just before its last rename, where most of the files are in their places already."""
    words = ["convert", str(given / "model"), str(tmp_path / "out"), "--calibrate", "none", *tiny.ATTENTION]
    killed = forks.run(lambda: disk_full.bsbr(words), tmp_path / "log", kill_at_write=12)
    assert killed.code == -9, killed.said
    assert not (tmp_path / "out" / "config.json").exists()
    assert disk_full.bsbr(words) == 0
    whole = [*words[:2], str(tmp_path / "whole"), *words[3:]]
    assert disk_full.bsbr(whole) == 0
    assert tiny.outcome(tmp_path / "out") == tiny.outcome(tmp_path / "whole")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
