"""Documents cut into windows such that every token is scored once, and the bytes of exactly those tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bsbr.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text as tokens, with the bytes that belong to each."""

    tokens: tuple[int, ...]
    """Token ids."""

    token_bytes: tuple[int, ...] | None
    """UTF-8 bytes of the source text that each token ends; None where the tokenizer gives no offsets."""

    index: int
    """Place of the text in the list it came from."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens `start` to `stop` go through the model; the tokens from `first_scored` to `stop` are scored."""

    start: int
    """First token of the window."""

    stop: int
    """One past its last token."""

    first_scored: int
    """First token whose probability counts here; no earlier window scored it."""

    @property
    def scored(self) -> int:
        """How many tokens this window scores."""
        return self.stop - self.first_scored


def encode_document(tokenizer: Any, text: str, *, index: int = 0, bos: bool = False) -> Document:
    """Tokenise one text and count the source bytes of each token.

    A token takes the bytes from the end of the token before it to its own end, so the tokens tile the text
    even where the tokenizer drops spaces or splits a character. A BOS token has 0 bytes.

    Args:
        tokenizer: a Hugging Face tokenizer; no special tokens are added by it.
        text: the source text.
        index: kept in the document.
        bos: put the tokenizer's BOS token first, so that the first token of the text is scored too.
    Returns:
        The document.
    Raises:
        UserError: `bos` is asked for and the tokenizer has none.
    """
    if bos and tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no BOS token: expected one for bos=True. Leave BOS off")
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: a text longer than the model's positions is cut into windows here, so no warning is due.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    tokens, sizes = list(encoded["input_ids"]), None
    if fast:
        ends, last = [], 0
        for _, end in encoded["offset_mapping"]:
            last = max(last, end)
            ends.append(last)
        sizes = [len(text[a:b].encode()) for a, b in pairwise([0, *ends])]
    if bos:
        tokens, sizes = [tokenizer.bos_token_id, *tokens], None if sizes is None else [0, *sizes]
    return Document(tokens=tuple(tokens), token_bytes=None if sizes is None else tuple(sizes), index=index)


def choose_documents(
    tokenizer: Any, texts: Sequence[str], *, documents: int, tokens: int, bos: bool = False
) -> list[Document]:
    """Tokenise texts and take those to evaluate on, each cut to its first `tokens` tokens.

    Rule: texts in their order that reach `tokens` tokens; if these are too few, the longest of the others.
    The chosen stay in their order.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: source texts; those of fewer than 2 tokens cannot be scored and are left out.
        documents: how many to take.
        tokens: tokens kept of each.
        bos: see `encode_document`.
    Returns:
        At most `documents` documents.
    Raises:
        UserError: no text has 2 tokens.
    """
    encoded: list[Document] = []
    full = 0
    for index, text in enumerate(texts):
        # Encoding a whole long book for its first window would be waste: no token is longer than 64
        # characters on average, so this prefix is enough, and a text cut here has far more tokens than are
        # kept.
        document = encode_document(tokenizer, text[: tokens * 64], index=index, bos=bos)
        if len(document.tokens) >= 2:
            encoded.append(document)
            full += len(document.tokens) >= tokens
        if full == documents:
            break
    if not encoded:
        longest = max((len(text) for text in texts), default=0)
        raise UserError(
            f"text is too short: {len(texts)} text(s), the longest of {longest} characters, and at least "
            "2 tokens are needed to score one. Give more text"
        )
    ranked = sorted(encoded, key=lambda document: (-min(len(document.tokens), tokens), document.index))
    return [
        Document(
            tokens=document.tokens[:tokens],
            token_bytes=None if document.token_bytes is None else document.token_bytes[:tokens],
            index=document.index,
        )
        for document in sorted(ranked[:documents], key=lambda document: document.index)
    ]


def cut_windows(length: int, window: int, stride: int) -> list[Window]:
    """Cut a document so that each token but the first is scored once, with as much context as the stride
    leaves.

    Every window but the first starts `stride` tokens after the one before and scores what that one had not,
    so a scored token has at least window - stride tokens of context, except at the document's start.

    Args:
        length: tokens of the document.
        window: tokens that go through the model at once, at least 2.
        stride: tokens between window starts, from 1 to window - 1 (equal to window would leave a window's
            first token without context).
    Returns:
        The windows; their scored tokens are exactly 1 ... length - 1. Empty for fewer than 2 tokens.
    Raises:
        ValueError: window or stride out of range.

    Example:
        >>> [(w.start, w.first_scored, w.stop) for w in cut_windows(10, 6, 3)]
        [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"window must be >= 2 and stride from 1 to window - 1, got window={window}, stride={stride}")
    windows: list[Window] = []
    scored_to, start = 1, 0
    while scored_to < length:
        stop = min(start + window, length)
        windows.append(Window(start=start, stop=stop, first_scored=scored_to))
        scored_to, start = stop, start + stride
    return windows
