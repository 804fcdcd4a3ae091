"""The tokenizer loses nothing, is reproducible, and its stream can be taken apart again."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bsbr.data.tokenizer import encode_documents, load_tokenizer, token_byte_lengths, train_tokenizer
from bsbr.errors import UserError

DOCUMENTS = [
    "The cat sat on the mat; the cat sat.\n" * 5,
    "Größe, naïve, \U0001f600 and a tab\t.\r\n",
    " leading space, trailing space ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300, max_length=64)


def test_decoding_the_stream_gives_every_document_back(tokenizer) -> None:
    stream = encode_documents(tokenizer, DOCUMENTS)
    starts = np.flatnonzero(stream == 0)
    assert len(starts) == len(DOCUMENTS)
    assert [tokenizer.decode(part[1:]) for part in np.split(stream, starts[1:])] == DOCUMENTS


def test_text_never_seen_in_training_is_lossless_too(tokenizer) -> None:
    text = "Ünseen \u4e2d\u6587 \x00 text"
    assert tokenizer.decode(encode_documents(tokenizer, [text])[1:]) == text


def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer) -> None:
    stream = encode_documents(tokenizer, DOCUMENTS)
    assert token_byte_lengths(tokenizer)[stream].sum() == sum(len(d.encode()) for d in DOCUMENTS)


def test_endoftext_has_id_zero_and_the_sizes_are_as_asked(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert len(tokenizer) == 300
    assert tokenizer.model_max_length == 64


def test_the_same_text_trains_the_same_tokenizer(tokenizer) -> None:
    again = train_tokenizer(DOCUMENTS, 300, max_length=64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_encodes_alike_and_opens_as_any_other(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    expected = encode_documents(tokenizer, DOCUMENTS)
    np.testing.assert_array_equal(encode_documents(load_tokenizer(tmp_path), DOCUMENTS), expected)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(DOCUMENTS[0])["input_ids"] == expected[1 : 1 + len(auto(DOCUMENTS[0])["input_ids"])].tolist()


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(DOCUMENTS, 256)
    with pytest.raises(ValueError, match="documents is empty"):
        train_tokenizer([], 300)
    with pytest.raises(UserError, match=r"tokenizer\.json missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


LEAK = """
import ctypes, sys
from bsbr.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
text = " ".join(f"word{i} and{i}" for i in range(300))
train_tokenizer([text], 300).save_pretrained(sys.argv[1])
used = []
for load in range(60):
    encode_documents(load_tokenizer(sys.argv[1]), [text])
    used.append(mallinfo().used)
print((used[-1] - used[19]) // 40)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc for what is in use")
def test_a_tokenizer_that_is_gone_leaves_no_words_in_memory(tmp_path) -> None:
    command = [sys.executable, "-c", LEAK, str(tmp_path)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(said) < 10_000  # bytes each; 90 kB with the library's table
