"""Text files: what is read is what was written, and what cannot be read is said in one line."""

import gzip
import hashlib
import lzma
from pathlib import Path

import pytest

from bsbr.data.text import read_documents, read_text, split_articles, split_documents, text_digest
from bsbr.errors import UserError

TEXT = "One — line\r\n<|endoftext|>\nTwo \U0001f600\n\nstill two\n"


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz"])
def test_the_same_text_comes_back_from_plain_and_compressed_files(tmp_path: Path, suffix: str) -> None:
    pack = {".txt": bytes, ".txt.xz": lzma.compress, ".txt.gz": gzip.compress}[suffix]
    path = tmp_path / f"text{suffix}"
    path.write_bytes(pack(TEXT.encode()))
    assert read_text(path) == TEXT
    assert read_documents(path) == ["One — line\r\n", "Two \U0001f600\n\nstill two\n"]


def test_the_digest_is_that_of_the_unpacked_file() -> None:
    assert text_digest(TEXT) == hashlib.sha256(TEXT.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("a", ["a"]),
        ("a\n<|endoftext|>", ["a\n"]),
        ("<|endoftext|>\na\n<|endoftext|>\n<|endoftext|>\nb", ["a\n", "b"]),
        ("a\r\n<|endoftext|>\r\nb\r\n", ["a\r\n", "b\r\n"]),
        ("a <|endoftext|>\n <|endoftext|>\nb", ["a <|endoftext|>\n <|endoftext|>\nb"]),
    ],
    ids=["one", "at the end", "repeated", "carriage returns", "only whole lines"],
)
def test_documents_are_separated_by_whole_lines_only(text: str, documents: list[str]) -> None:
    assert split_documents(text) == documents


def test_articles_begin_at_level_one_titles_only() -> None:
    first = " \n = First = \n \n Text . \n \n = = Section = = \n \n More . \n"
    second = " \n = Filter ( k = 2 ) = \n \n A formula : \n = 1 / s = \n follows . \n"
    assert split_articles(first + second) == [first, second]
    assert split_articles(first.removeprefix(" \n")) == [first.removeprefix(" \n")]
    assert split_articles("no title\n") == ["no title\n"]


def _damaged_xz() -> bytes:
    return lzma.compress(TEXT.encode() * 100)[:-30]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n<|endoftext|>\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8"),
        ("short.txt.xz", _damaged_xz(), "damaged .xz file"),
        ("plain.txt.gz", b"not gzip", "damaged .gz file"),
    ],
)
def test_an_unusable_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(path)
    message = str(caught.value)
    assert said in message
    assert name in message
    assert "\n" not in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
