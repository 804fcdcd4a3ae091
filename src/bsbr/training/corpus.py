"""From text files to token streams on the training device."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bsbr.data.collections import read_collection
from bsbr.data.text import split_documents, text_digest
from bsbr.data.tokenizer import encode_documents, load_tokenizer, token_byte_lengths, train_tokenizer
from bsbr.errors import UserError
from bsbr.files import write_atomic
from bsbr.training.progress import TrainingProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text of one run as tokens."""

    tokenizer: "PreTrainedTokenizerFast"
    """Its vocabulary is the model's."""
    train: torch.Tensor
    """Training stream on the device, [tokens], int32."""
    held_out: torch.Tensor
    """Held-out stream on the device, [tokens], int32."""
    byte_lengths: torch.Tensor
    """Bytes of text per token id on the device, [vocabulary], int64."""
    record: dict[str, Any]
    """What the texts and the tokenizer were: names, digests and counts."""


def prepare_corpus(
    *,
    text: str | Path,
    val: str | Path,
    tokenizer: Path | None,
    vocab: int,
    context: int,
    device: torch.device,
    progress: TrainingProgress,
) -> Corpus:
    """Read both texts, train or load the tokenizer, and put the encoded streams on the device.

    Args:
        text, val: training and held-out text, as `bsbr.data.collections.read_collection` takes them.
        tokenizer: folder of a tokenizer to use; None trains one of `vocab` tokens on the training text.
        vocab, context: sizes for a new tokenizer; every stream must hold one window of `context` tokens.
        device: where the streams go.
        progress: is told of each stage.
    Returns:
        The corpus.
    Raises:
        UserError: a text or the tokenizer is unusable, or a text is shorter than one window.
    """
    names = {"train": (text, Path(text).name), "held_out": (val, Path(val).name)}
    contents = {role: read_collection(source) for role, (source, _) in names.items()}
    progress.say(f"read {names['train'][1]} and {names['held_out'][1]}")
    documents = {role: split_documents(content) for role, content in contents.items()}
    if tokenizer is None:
        progress.say(f"training a tokenizer of {vocab} tokens")
        encoder = train_tokenizer(documents["train"], vocab, max_length=context)
    else:
        encoder = load_tokenizer(tokenizer)
    record: dict[str, Any] = {"tokenizer_sha256": _tokenizer_digest(encoder)}
    streams = {}
    for role, content in contents.items():
        source, name = names[role]
        progress.say(f"encoding {name}")
        ids = encode_documents(encoder, documents[role])
        if len(ids) < context + 1:
            raise UserError(f'text "{source}": {len(ids)} tokens, one window needs {context + 1}. Give more text')
        streams[role] = torch.from_numpy(ids.astype("int32")).to(device)
        record[role] = {
            "name": name,
            "sha256": text_digest(content),
            "bytes": len(content.encode()),
            "documents": len(documents[role]),
            "tokens": len(ids),
        }
    return Corpus(
        tokenizer=encoder,
        train=streams["train"],
        held_out=streams["held_out"],
        byte_lengths=torch.from_numpy(token_byte_lengths(encoder)).to(device),
        record=record,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", target: Path) -> None:
    """Write a tokenizer's files, each whole or not at all.

    Args:
        tokenizer: what to write.
        target: the folder; made if missing.
    Raises:
        UserError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="bsbr-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            write_atomic(target / path.name, path.read_bytes())


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
