"""Model folders that are there whole or not at all, with a manifest."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from bsbr.errors import UserError
from bsbr.files import staged_folder
from bsbr.manifest import write_manifest

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_whole(directory: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Let a function write a model folder somewhere else, then move its files to their places.

    Weights of an earlier save that the new one does not replace (other shards) are removed: transformers would load
    them in place of the new ones.

    Args:
        directory: the target; files of other names stay.
        write: called with an empty folder; may write nothing, as processes other than the first do.
    Raises:
        UserError: the target is a file or cannot be written; what was there before is untouched.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise UserError(f'output "{target}": is a file. Choose a folder')
    with staged_folder(target) as folder:
        try:
            write(folder)
        except SafetensorError as error:
            raise _system_error(error) from error
        names = {path.name for path in folder.iterdir()}
        if names:
            write_manifest(folder)
    if names:
        for path in target.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.name not in names:
                path.unlink()


def _system_error(error: SafetensorError) -> OSError:
    """What the system said, which safetensors wraps in words."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    code = int(found[1]) if found else 0
    return OSError(code, os.strerror(code) if code else " ".join(str(error).split())[:200])
