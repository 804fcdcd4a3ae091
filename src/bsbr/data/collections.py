"""Texts by what a user names: a file, a folder of files, or a data set of the hub."""

from pathlib import Path

from bsbr.data.text import SEPARATOR, read_text
from bsbr.errors import UserError

DATASETS = "datasets:"
"""What stands before the name of a data set."""

_SUFFIXES = (".txt", ".md", ".txt.xz", ".txt.gz")


def read_collection(name: str | Path) -> str:
    r"""Read one text out of whatever holds it, documents between lines `<|endoftext|>`.

    - A file: as `read_text`.
    - A folder: every .txt, .md, .txt.xz and .txt.gz in it and below, in order of their paths; each is at least one
      document.
    - `datasets:NAME[,CONFIG[,SPLIT]]`: the column `text` of a data set, each row a document; SPLIT is train by default.

    Args:
        name: path or name.
    Returns:
        The text.
    Raises:
        UserError: it cannot be read, or holds no text.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for word in ("b", "a"):
        ...         _ = Path(folder, f"{word}.txt").write_text(word)
        ...     read_collection(folder)
        'a\n<|endoftext|>\nb'
    """
    if str(name).startswith(DATASETS):
        return _read_dataset(str(name).removeprefix(DATASETS))
    path = Path(name)
    if not path.is_dir():
        return read_text(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(_SUFFIXES))
    if not files:
        raise UserError(f'text "{path}": no file in this folder ends in {", ".join(_SUFFIXES)}. Give another folder')
    return _join([read_text(file) for file in files])


def _join(texts: list[str]) -> str:
    return f"\n{SEPARATOR}\n".join(text.removesuffix("\n") for text in texts)


def _read_dataset(name: str) -> str:
    dataset, *rest = (part.strip() for part in name.split(","))
    config, split = ([*rest, None][0] or None, rest[1] if len(rest) > 1 else "train")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"text {DATASETS}{name}: needs the package datasets. pip install 'bsbr[datasets]', or give a file"
        ) from None
    try:
        rows = load_dataset(dataset, config, split=split)["text"]
    except Exception as error:  # whatever the hub, the network or the cache raise: the user needs one line
        raise UserError(
            f"text {DATASETS}{name}: cannot be had ({type(error).__name__}: {error}). Check the name, or give a file"
        ) from error
    documents = [row for row in rows if row.strip()]
    if not documents:
        raise UserError(f"text {DATASETS}{name}: holds no text. Give another split")
    return _join(documents)
