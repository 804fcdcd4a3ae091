"""Checkpoints that are there whole or not at all, verified before use, and free of pickle.

A checkpoint is a folder `step-00000020` with safetensors files, `state.json` and, written last,
`manifest.json` with the size and SHA-256 of every other file. A folder without a valid one is ignored.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsbr.errors import ResourceError, UserError
from bsbr.files import sync_folder, write_atomic, write_error, write_json

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read back: the step, the groups of tensors (on the CPU) and the JSON state."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of one step, then remove all but the newest ones.

    1. Refuse when the disk has not room for 1.1 times the tensors.
    2. Write every file, and the manifest last, into a fresh folder beside the target; fsync each.
    3. Rename the folder to its place and fsync the parent.
    4. Only then remove the oldest checkpoints.

    Args:
        folder: holds the run's checkpoints; made if missing.
        step: finished steps; a whole checkpoint of the same step is left as it is.
        tensors: groups of named tensors, one safetensors file each.
        state: JSON content.
        keep: checkpoints to keep.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: no room, or the folder cannot be written; older checkpoints stay as they are.
    """
    from safetensors.torch import save

    target = folder / f"step-{step:08d}"
    if target.exists():
        if _is_whole(target, step):
            return target
        _remove(target)
    temporary = folder / f".writing-{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _check_room(folder, tensors)
        manifest: dict[str, Any] = {"format": _FORMAT, "step": step, "files": {}}

        def write(name: str, content: bytes) -> None:
            write_atomic(temporary / name, content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        for name, group in tensors.items():  # one at a time, so that only one is in memory twice
            write(f"{name}.safetensors", save(_portable(group)))
        write("state.json", (json.dumps(dict(state), indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
        write_json(temporary / "manifest.json", manifest)
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        raise write_error("checkpoint", target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for _, old in _candidates(folder)[keep:]:
        _remove(old)
    return target


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; a damaged one is skipped with a one-line warning.

    Args:
        folder: where `save_checkpoint` wrote.
    Returns:
        The checkpoint, or None where there is none at all.
    Raises:
        UserError: there are checkpoints, but every one is damaged; the message names the newest one's fault.
    """
    fault = None
    for step, path in _candidates(folder):
        try:
            return _read(path, step)
        except _Damaged as error:
            fault = fault or f'checkpoint "{path}": {error}'
            warnings.warn(f'checkpoint "{path}" is left out: {error}', stacklevel=2)
    if fault:
        raise UserError(f"{fault}, and there is no older one to resume from. Start again with another output")
    return None


def remove_unfinished(folder: Path) -> None:
    """Remove what a save or a removal that was killed has left; no run may be writing there.

    Args:
        folder: holds the run's checkpoints; it need not exist.
    """
    for path in folder.glob(".*") if folder.is_dir() else ():
        if path.name.startswith((".writing-step-", ".removing-step-")):
            shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """A checkpoint that must not be used."""


def _is_whole(path: Path, step: int) -> bool:
    try:
        _read(path, step)
    except _Damaged:
        return False
    return True


def _read(path: Path, step: int) -> Checkpoint:
    from safetensors.torch import load

    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        form, manifest_step = manifest["format"], manifest["step"]
    except FileNotFoundError as error:
        raise _Damaged("manifest.json missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged("manifest.json unreadable") from error
    if form != _FORMAT or manifest_step != step or "state.json" not in listed:
        raise _Damaged("manifest.json does not describe it")
    content = {name: _verified(path, name, *entry) for name, entry in listed.items()}
    try:
        tensors = {Path(n).stem: load(data) for n, data in content.items() if n.endswith(".safetensors")}
        return Checkpoint(step=step, tensors=tensors, state=json.loads(content["state.json"]))
    except Exception as error:  # safetensors has its own exception types for each fault of a file
        raise _Damaged(f"unreadable ({error})") from error


def _verified(path: Path, name: str, size: int, digest: str) -> bytes:
    if Path(name).name != name:
        raise _Damaged("manifest.json names a file outside the folder")
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise _Damaged(f"{name} missing") from error
    if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
        raise _Damaged(f"{name} differs from the manifest")
    return content


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Folders named like checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _portable(group: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, each in memory of its own: safetensors refuses tensors that share it, as tied weights do."""
    found: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in group.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in taken or own.untyped_storage().nbytes() != own.nbytes:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _check_room(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    need = int(1.1 * sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ResourceError(
            f'checkpoint "{folder}": needs {need} bytes, {free} free. Free space or choose another output'
        )


def _remove(path: Path) -> None:
    # Renamed first: a removal that is cut short must not leave something that looks like a checkpoint.
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
