"""The one way the project writes files: whole or not at all."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bsbr.errors import ResourceError, UserError

MANIFEST = "manifest.json"
"""Lists the files of a folder with their SHA-256 (`bsbr.manifest`)."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = re.compile(r"\..+\.[A-Za-z0-9_]{8}\.tmp(\.\w+)?")


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
        sync_folder(path.parent)
    except OSError as error:
        raise write_error("file", path, error) from error
    return path


@contextlib.contextmanager
def staged_folder(folder: str | Path, marker: str = "config.json") -> Iterator[Path]:
    """Give a block an empty folder to fill; when it ends without error the files take their places in `folder`.

    For writers that make several files (`save_pretrained`). Everything is on the disk before the first file moves. A
    folder counts as written once it holds `marker`, so that moves last; where there is one already, the manifest does,
    so that old and new files side by side are found out. Files of other names stay.

    Args:
        folder: the target; made if missing.
        marker: the file without which the folder counts as empty.
    Yields:
        The folder to fill, beside the target.
    Raises:
        UserError: the target cannot be written; it is as it was.
    """
    folder = Path(os.path.realpath(folder))
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        yield temporary
        last = MANIFEST if (folder / marker).exists() else marker
        files = sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name == marker, file.name))
        for file in files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.chmod(file, 0o666 & ~_umask())
        _move(files, folder)
        sync_folder(folder)
    except OSError as error:
        raise write_error("folder", folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(files: list[Path], folder: Path) -> None:
    """Move files into a folder; where one cannot be, those before it are taken back."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for file in files:
            target, kept = folder / file.name, None
            if target.exists():
                kept = file.with_name(f"{file.name}.old")
                os.link(target, kept)
            os.replace(file, target)
            done.append((target, kept))
    except OSError:
        for target, kept in done:
            if kept is None:
                target.unlink()
            else:
                os.replace(kept, target)
        raise


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder and beside it. Nobody may be writing there.

    Args:
        folder: an output folder; it need not exist.
    """
    folder = Path(os.path.realpath(folder))
    # two dots: a folder staged inside a staged folder
    names = [f"{dots}{_literal(folder.name)}.*.tmp" for dots in (".", "..")]
    beside = [path for name in names if folder.parent.is_dir() for path in folder.parent.glob(name)]
    for path in [*(folder.glob(".*.tmp*") if folder.is_dir() else ()), *beside]:
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def check_writable(folder: Path) -> None:
    """Make a folder and see that files can be written there, before long work starts.

    Args:
        folder: the output folder.
    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # a name that holds a zero is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f'output "{folder}": cannot be written ({reason}). Choose another folder') from error


def write_error(what: str, path: Path, error: OSError) -> UserError:
    """Make the error that says that something cannot be written.

    Args:
        what: "file", "folder" ...
        path: where.
        error: what the system said.
    Returns:
        A ResourceError where the disk is full, else a UserError.
    """
    kind = ResourceError if error.errno in _FULL else UserError
    advice = "Free some space, or choose another place" if kind is ResourceError else "Choose another place or free it"
    return kind(f'{what} "{path}" cannot be written: {error.strerror or error}. {advice}')


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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power.

    Args:
        folder: what was changed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)
