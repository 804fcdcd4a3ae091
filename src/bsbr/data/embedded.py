"""The model and the texts that come with the package, so that everything runs without a hub."""

from pathlib import Path

from bsbr.data.text import read_text, split_articles, split_segments

EMBEDDED = "embedded"
"""What a user writes to mean the embedded model or text."""

_ASSETS = Path(__file__).parent.parent / "assets"

EMBEDDED_MODEL = _ASSETS / "model"
"""Folder of the embedded language model and its tokenizer."""


_SEGMENT = 30_000
"""Characters of a segment of the book, several times what a window holds."""


def calibration_text() -> str:
    """Return the text that conversion calibrates on: part of a book that no evaluation reads.

    Returns:
        The text.

    Example:
        >>> len(calibration_text()) > 100_000
        True
    """
    return read_text(_ASSETS / "text" / "calibration.txt.xz")


def evaluation_texts() -> dict[str, list[str]]:
    """Return the texts an evaluation reads: the articles of WikiText-2's test split, and segments of a book.

    Returns:
        "wikitext" and "book" to their documents.

    Example:
        >>> sorted(evaluation_texts())
        ['book', 'wikitext']
    """
    return {
        "wikitext": split_articles(read_text(_ASSETS / "text" / "wikitext-2-test.txt.xz")),
        "book": split_segments(read_text(_ASSETS / "text" / "book.txt.xz"), _SEGMENT),
    }
