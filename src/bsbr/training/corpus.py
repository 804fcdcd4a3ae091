"""From text files to token streams on the training device."""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bsbr.data.text import read_text, split_documents, text_digest
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
    text: Path,
    val: Path,
    tokenizer: Path | None,
    vocab: int,
    context: int,
    device: torch.device,
    progress: TrainingProgress,
) -> Corpus:
    """Read both texts, train or load the tokenizer, and put the encoded streams on the device.

    Args:
        text, val: training and held-out text, as `bsbr.data.text.read_text` takes them.
        tokenizer: folder of a tokenizer to use; None trains one of `vocab` tokens on the training text.
        vocab, context: sizes for a new tokenizer; every stream must hold one window of `context` tokens.
        device: where the streams go.
        progress: is told of each stage.
    Returns:
        The corpus.
    Raises:
        UserError: a text or the tokenizer is unusable, or a text is shorter than one window.
    """
    contents = {"train": (text, read_text(text)), "held_out": (val, read_text(val))}
    progress.say(f"read {text.name} and {val.name}")
    documents = {role: split_documents(content) for role, (_, content) in contents.items()}
    if tokenizer is None:
        progress.say(f"training a tokenizer of {vocab} tokens")
        encoder = train_tokenizer(documents["train"], vocab, max_length=context)
    else:
        encoder = load_tokenizer(tokenizer)
    record: dict[str, Any] = {"tokenizer_sha256": _tokenizer_digest(encoder)}
    streams = {}
    for role, (path, content) in contents.items():
        progress.say(f"encoding {path.name}")
        ids = encode_documents(encoder, documents[role])
        if len(ids) < context + 1:
            raise UserError(f'text "{path}": {len(ids)} tokens, one window needs {context + 1}. Give more text')
        streams[role] = torch.from_numpy(ids.astype("int32")).to(device)
        record[role] = {
            "name": path.name,
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
