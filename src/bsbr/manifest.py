"""What a folder's files were when they were saved: names, sizes and SHA-256, checked when it is loaded."""

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bsbr.errors import UserError
from bsbr.files import MANIFEST, write_json

FORMAT = 1

_WEIGHTS = ".safetensors"
_MEND = "Copy the folder again"
_REPLACED = f"or, if you replaced it yourself, remove {MANIFEST}"


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> Path:
    """Write the manifest of a folder.

    Args:
        folder: holds the files.
        names: what to list; None means every file.
    Returns:
        The manifest's path.
    Raises:
        UserError: it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = (Path(place) / "a.txt").write_text("kept")
        ...     _ = write_manifest(Path(place))
        ...     sorted(read_manifest(Path(place)))
        ['a.txt']
    """
    if names is None:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    files = {name: describe(folder / name) for name in sorted(names) if name != MANIFEST}
    return write_json(folder / MANIFEST, {"format": FORMAT, "files": files, "sha256": _digest(files)})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read the manifest of a folder.

    Args:
        folder: any folder.
    Returns:
        Names to sizes ("bytes") and digests ("sha256"); None where the folder has no manifest.
    Raises:
        UserError: the manifest is damaged.
    """
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        files = content["files"]
        good = content["format"] == FORMAT and content["sha256"] == _digest(files)
        good = good and all(Path(name).name == name and {"bytes", "sha256"} <= set(files[name]) for name in files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UserError(f'"{folder}": {MANIFEST} is damaged. {_MEND}, or remove that file to load without a check')
    return files


def check_manifest(folder: Path) -> None:
    """Compare a folder with its manifest, if it has one.

    Weights that differ are refused. Of other files (settings, tokenizer) people edit some by hand, so that a difference
    is a warning; files that were removed or added say nothing.

    Args:
        folder: any folder.
    Raises:
        UserError: weights differ from the manifest or are missing, or the manifest is damaged; which, in one line.
    """
    for name, entry in (read_manifest(folder) or {}).items():
        path, weights = folder / name, name.endswith(_WEIGHTS)
        if not path.is_file():
            if weights:
                raise UserError(f'"{folder}": {name} missing, which {MANIFEST} lists. {_MEND}')
            continue
        if fault := compare(path, entry):
            if weights:
                raise UserError(f'"{folder}": {name} {fault}: it is damaged. {_MEND}, {_REPLACED}')
            warnings.warn(f'"{folder}": {name} {fault}: edited or damaged. {_MEND}, {_REPLACED}', stacklevel=2)


def describe(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file.

    Args:
        path: the file.
    Returns:
        "bytes" and "sha256".
    """
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def compare(path: Path, entry: dict[str, Any]) -> str:
    """Say in a few words how a file differs from what a manifest says of it.

    Args:
        path: the file.
        entry: "bytes" and "sha256".
    Returns:
        For instance "has 10 bytes, manifest.json says 12"; "" where it does not differ.
    """
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes, {MANIFEST} says {entry['bytes']}"
    return "" if describe(path)["sha256"] == entry["sha256"] else f"has another SHA-256 than {MANIFEST} says"


def _digest(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
