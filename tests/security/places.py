"""Folders and files that are bad in one way each."""

import json
import shutil
from pathlib import Path


def make_bad(folder: Path, model: Path) -> Path:
    """Write bad texts and models.

    Args:
        folder: where to.
        model: a good model's folder.
    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_bytes(b" \n<|endoftext|>\n \n")
    (folder / "latin.txt").write_bytes("Wörter über Wörter".encode("latin-1"))
    (folder / "a.txt.xz").write_bytes(b"no xz")
    (folder / "a.txt.gz").write_bytes(b"\x1f\x8b broken")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "broken.json").write_text('{"digest": "0", "rows": []}')
    for name in ("pickled", "code", "encoder", "adapter", "shards_outside", "shards_absolute"):
        shutil.copytree(model, folder / name)
    for suffix in ("bin", "pt"):
        (folder / "pickled" / f"pytorch_model.{suffix}").write_bytes(b"\x80\x04")
    (folder / "pickled" / "model.safetensors").unlink()
    edit(folder / "code", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (folder / "code" / "mine.py").write_text("raise SystemExit('code was run')")
    edit(folder / "encoder", model_type="t5")
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "../pickled"}')
    for name, shard in (
        ("shards_outside", "../code/model.safetensors"),
        ("shards_absolute", str(model / "model.safetensors")),
    ):
        index = folder / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": shard}}))
    return folder


def edit(folder: Path, **changes: object) -> None:
    """Change a model's config.json.

    Args:
        folder: the model's.
        changes: keys to values.
    """
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
