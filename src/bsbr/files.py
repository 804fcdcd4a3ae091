"""The one way the project writes files: whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bsbr.errors import UserError


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a file so that a reader sees either the old content or the new, never a part.

    1. Write a temporary file in the same folder, flush and fsync it.
    2. Give it the permissions an ordinary file would get (0o666 less the umask).
    3. Rename it over the target and fsync the folder.

    Args:
        path: the target; its folder is made if missing.
        data: bytes, or text to be stored as UTF-8 with the line ends it has.
    Returns:
        The path written.
    Raises:
        UserError: the target cannot be written (a folder in the way, no permission, a full disk).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder) / "note.txt", "kept").read_text()
        'kept'
    """
    content = data.encode() if isinstance(data, str) else data

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(content)

    return replace_atomic(path, write)


def replace_atomic(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` make a file under a temporary name, then move it to its place in one step.

    For writers that want a file name (safetensors, matplotlib). Same steps and errors as `write_atomic`.

    Args:
        path: the target; its folder is made if missing.
        write: called with the temporary path, in the target's folder and with its suffix.
    Returns:
        The path written.
    Raises:
        UserError: the target cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'file "{path}" cannot be written: {reason}. Choose another place or free it') from error
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON with sorted keys, two spaces and no NaN, atomically.

    Args:
        path: the target file.
        content: anything `json` takes; NaN and infinities are refused, since no JSON reader has to know them.
    Returns:
        The path written.
    Raises:
        UserError: the target cannot be written.
        ValueError: the content holds NaN or an infinity.
    """
    return write_atomic(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
