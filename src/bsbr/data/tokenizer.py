"""Byte-level BPE: train a tokenizer on documents, and turn documents into one stream of token ids."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bsbr.data.text import SEPARATOR, split_documents
from bsbr.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Tokenizer = TypeVar("Tokenizer", bound="PreTrainedTokenizerBase")

ENDOFTEXT_ID = 0
_BYTE_TOKENS = 256
# Characters per parallel batch: enough to keep every core busy, few enough to bound the encodings' memory.
_BATCH_CHARACTERS = 32_000_000


def train_tokenizer(
    documents: Sequence[str], vocab_size: int = 4096, *, max_length: int = 2048
) -> "PreTrainedTokenizerFast":
    """Train a lossless byte-level BPE tokenizer whose id 0 is `<|endoftext|>`.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2.

    The same documents give the same tokenizer. Nothing is normalised, so decoding gives the text back byte
    for byte; a small text may yield fewer tokens than asked for.

    Args:
        documents: the training text.
        vocab_size: tokens including `<|endoftext|>` and the 256 bytes.
        max_length: the model's context, written into the tokenizer as `model_max_length`.
    Returns:
        A transformers tokenizer; `save_pretrained` writes it as a standard folder.
    Raises:
        ValueError: no documents, or a vocabulary without room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= _BYTE_TOKENS:
        raise ValueError(f"vocab_size = {vocab_size}: must be at least {_BYTE_TOKENS + 1}. Try 4096")
    if not documents:
        raise ValueError("documents is empty: a tokenizer needs text to be trained on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer, length=len(documents))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        unk_token=SEPARATOR,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    return remember_no_words(made)


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """Load a tokenizer that `train_tokenizer` made and `save_pretrained` wrote.

    Args:
        folder: holds `tokenizer.json` and `tokenizer_config.json`.
    Returns:
        The tokenizer.
    Raises:
        UserError: the folder has no readable tokenizer, or its id 0 is not `<|endoftext|>`.
    """
    from transformers import PreTrainedTokenizerFast

    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f'tokenizer "{folder}": tokenizer.json missing. Give a folder that save_pretrained wrote')
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(f'tokenizer "{folder}": cannot be read ({error}). Copy the folder again') from error
    if tokenizer.convert_tokens_to_ids(SEPARATOR) != ENDOFTEXT_ID:
        raise UserError(f'tokenizer "{folder}": id 0 is not {SEPARATOR}. Give one that bsbr pretrain made')
    return remember_no_words(tokenizer)


def remember_no_words(tokenizer: Tokenizer) -> Tokenizer:
    """Keep a BPE tokenizer from storing the words it has split, which a process would not get back.

    Source: models/bpe/model.rs of the tokenizers library, 0.23. There each thread has a table of the words of every
    BPE model ever used in it, and nothing removes a model that is gone. Without it encoding takes a fifth longer
    (docs/log.md).

    Args:
        tokenizer: any of transformers; it is changed where it has such a table.
    Returns:
        The same tokenizer.

    Example:
        >>> tokenizer = remember_no_words(train_tokenizer(["to be or not to be"], 257))
        >>> tokenizer.decode(tokenizer("not to be")["input_ids"])
        'not to be'
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)
    return tokenizer


def encode_documents(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[str]) -> np.ndarray:
    """Encode documents, in parallel, into one stream with `<|endoftext|>` before each document.

    Args:
        tokenizer: from `train_tokenizer` or `load_tokenizer`.
        documents: the text; each document is encoded on its own.
    Returns:
        Token ids, [tokens], uint16 (int32 for a vocabulary beyond 65,536).
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    separator = np.array([ENDOFTEXT_ID], dtype=dtype)
    backend = tokenizer.backend_tokenizer
    parts: list[np.ndarray] = []
    for batch in _batches(documents):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            parts += [separator, np.array(encoding.ids, dtype=dtype)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def pack_documents(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Encode the documents of a text with any tokenizer into one stream, its end-of-text token between them.

    Args:
        text: documents separated by lines `<|endoftext|>`.
        tokenizer: any of transformers.
    Returns:
        Token ids.
    """
    ids: list[int] = []
    for batch in _batches(split_documents(text)):  # several at once: a tokenizer written in Rust uses all cores
        for own in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            if ids and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            ids += own
    return ids


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """How many bytes of text each token of a byte-level tokenizer stands for; special tokens stand for none.

    Args:
        tokenizer: byte-level BPE, whose vocabulary writes each byte as one character.
    Returns:
        Bytes per token id, [vocabulary], int64.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if i in special else len(token) for i, token in enumerate(tokens)], dtype=np.int64)


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
