"""Reading text: plain or compressed files, strict UTF-8, split into documents."""

import gzip
import hashlib
import lzma
import re
import zlib
from itertools import pairwise
from pathlib import Path

from bsbr.errors import UserError

SEPARATOR = "<|endoftext|>"

_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>(?:\r?\n|\r?\Z)", re.MULTILINE)
# A blank line on both sides tells a title from a formula that happens to begin and end with an equals sign.
_ARTICLE_TITLE = re.compile(r"(?:\A|(?<=\n))[ ]*\n = [^=\n][^\n]* = \n(?= *\n)|\A = [^=\n][^\n]* = \n(?= *\n)")


def read_text(path: str | Path) -> str:
    """Read a whole text file (plain, `.xz` or `.gz`) as strict UTF-8, line ends untouched.

    Args:
        path: the file; its suffix says how it is compressed.
    Returns:
        The text.
    Raises:
        UserError: the file is missing, a folder, unreadable, damaged, without text or not UTF-8, and which.
    """
    content = _read_bytes(Path(path))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UserError(
            f'text "{path}": byte 0x{byte:02x} at offset {error.start} is not UTF-8. '
            "Save the file as UTF-8 or remove that byte"
        ) from error
    if not split_documents(text):
        raise UserError(f'text "{path}": holds no text. Give a file with more than blanks and {SEPARATOR} lines')
    return text


def split_documents(text: str) -> list[str]:
    r"""Split a text at the lines that are exactly `<|endoftext|>`; blank documents are left out.

    Args:
        text: any text; without a separator line it is one document.
    Returns:
        The documents in order, each with its line ends.

    Example:
        >>> split_documents("one\n<|endoftext|>\ntwo <|endoftext|>\n")
        ['one\n', 'two <|endoftext|>\n']
    """
    return [document for document in _SEPARATOR_LINE.split(text) if document.strip()]


def split_articles(text: str) -> list[str]:
    r"""Split a word-level WikiText file into articles at its level-1 titles (` = Title = `).

    Source: Merity et al., "Pointer Sentinel Mixture Models" (arXiv 1609.07843), which defines the format. A
    title stands between blank lines; ` = = Section = = ` and formulas inside a paragraph begin no article.

    Args:
        text: the file's text.
    Returns:
        The articles in order: joined they give the text, and what precedes the first title is in the first.

    Example:
        >>> split_articles(" \n = A = \n \n a \n = = B = = \n \n b \n \n = C = \n \n c \n")
        [' \n = A = \n \n a \n = = B = = \n \n b \n', ' \n = C = \n \n c \n']
    """
    starts = [match.start() for match in _ARTICLE_TITLE.finditer(text)]
    bounds = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in pairwise(bounds) if text[start:end].strip()]


def split_segments(text: str, characters: int) -> list[str]:
    r"""Split a long text at paragraph ends into contiguous segments of about equal length.

    One book is one document, and one document has no spread; segments much longer than what a model sees at once
    stand in for documents.

    Args:
        text: any text; blank lines end paragraphs.
        characters: least length of a segment; a shorter rest joins the last one.
    Returns:
        The segments in order: joined they give the text.

    Example:
        >>> split_segments("one\n\ntwo\n\nthree\n\nfour", 8)
        ['one\n\ntwo\n\n', 'three\n\nfour']
    """
    segments, current = [], ""
    for paragraph in re.split(r"(?<=\n\n)(?=[^\n])", text):
        current += paragraph
        if len(current) >= characters:
            segments.append(current)
            current = ""
    if current:
        segments[-1:] = [segments[-1] + current] if segments else [current]
    return segments


def read_documents(path: str | Path) -> list[str]:
    """Read a text file and split it at `<|endoftext|>` lines.

    Args:
        path: plain, `.xz` or `.gz` file.
    Returns:
        At least one document that is not blank.
    Raises:
        UserError: as `read_text`.
    """
    return split_documents(read_text(path))


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8: what `sha256sum` says of the unpacked file.

    Args:
        text: as `read_text` gave it.
    Returns:
        64 hexadecimal digits.

    Example:
        >>> text_digest("abc")[:8]
        'ba7816bf'
    """
    return hashlib.sha256(text.encode()).hexdigest()


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f'text "{path}": no such file. Check the path')
    if path.is_dir():
        raise UserError(f'text "{path}": is a folder. Give a file')
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rb") as file:
                return file.read()
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                return file.read()
        return path.read_bytes()
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f'text "{path}": damaged {path.suffix} file ({error}). Copy the file again') from error
    except OSError as error:
        raise UserError(f'text "{path}": cannot be read ({error.strerror or error}). Check its permissions') from error
