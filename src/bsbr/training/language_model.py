"""The loss of a causal language model at every token, its loss on held-out text, and how it is saved."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bsbr.data.tokenizer import ENDOFTEXT_ID
from bsbr.hf.attention import bsbr_attention_forward
from bsbr.hf.families import NAME, PREFIX
from bsbr.hf.modeling import layer_type
from bsbr.hf.saving import save_whole

_UNMASKED = {NAME: f"{NAME}_unmasked", "sdpa": "sdpa_unmasked"}
"""Our attention and PyTorch's, and their names without a mask function. Asking for a mask makes transformers look at
the positions of every batch, which waits for the device, and makes one that costs the fast kernels when compiled."""

_PARTS = 8
"""Parts of a window whose losses are kept apart."""


def token_nll(model: PreTrainedModel, windows: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of each token of a batch of windows given those before it, in nats.

    The blocks of a GPT-2 are called directly, so that the whole of it can be one compiled graph. A test holds the
    two equal.

    Args:
        model: a causal language model, converted or not.
        windows: token ids, [B, T + 1], int64.
        positions: position of each token in its document, [B, T], where windows hold several; None means one each.
    Returns:
        [B, T], float32: entry t is the loss of token t + 1.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if positions is None and model.config.model_type.removeprefix(PREFIX) == "gpt2":
        logits = _gpt2_logits(model, inputs)
    else:
        own = model.config._attn_implementation
        if positions is None and own in _UNMASKED and _reads_everything(model):
            model.config._attn_implementation = _UNMASKED[own]
        try:
            logits = model(inputs, position_ids=positions, use_cache=False).logits
        finally:
            model.config._attn_implementation = own
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(targets.shape)


def _gpt2_logits(model: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    body: Any = model.transformer
    states = body.wte(inputs) + body.wpe(torch.arange(inputs.shape[1], device=inputs.device))
    for block in body.h:
        states = block(states)
    return model.lm_head(body.ln_f(states))


def _reads_everything(model: PreTrainedModel) -> bool:
    """No layer has a sliding window, which only a mask can give."""
    config = model.config.get_text_config(decoder=True)
    return all(layer_type(config, layer) == "full_attention" for layer in range(config.num_hidden_layers))


AttentionInterface.register(_UNMASKED[NAME], bsbr_attention_forward)
AttentionInterface.register(_UNMASKED["sdpa"], sdpa_attention_forward)


def document_positions(inputs: torch.Tensor) -> torch.Tensor:
    """Count the tokens of each document of a packed window from its separator on.

    Args:
        inputs: token ids, [B, T]; `<|endoftext|>` stands before each document.
    Returns:
        Positions, [B, T], int64; a window that begins inside a document counts from its own first token.

    Example:
        >>> document_positions(torch.tensor([[7, 8, 0, 5, 6]])).tolist()
        [[0, 1, 0, 1, 2]]
    """
    place = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    start = torch.where(inputs == ENDOFTEXT_ID, place, 0).cummax(1).values
    return place - start


def save_model(model: PreTrainedModel, target: Path) -> None:
    """Write a model as a standard Hugging Face folder, its configuration last.

    Args:
        model: in the dtype to be stored.
        target: the folder; made if missing.
    Raises:
        UserError: the folder cannot be written.
    """
    save_whole(target, model.save_pretrained)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Loss on text that was not trained on, in windows that do not overlap."""

    nll: float
    """Nats per scored token; tokens that stand for no bytes (`<|endoftext|>`) are read but not scored."""
    bits_per_byte: float
    """Nats of the scored tokens, in bits, per UTF-8 byte of exactly those tokens."""
    num_tokens: int
    """Scored tokens."""
    num_bytes: int
    """Bytes of the scored tokens."""
    windows: int
    """Windows read, each `context` tokens long and without context from the one before."""
    context: int
    """Tokens a window scores; the first of each has one token before it, the last `context`."""
    nll_by_part: tuple[float, ...]
    """Nats per scored token in each eighth of the windows, first to last; fewer parts for shorter windows."""

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    stream: torch.Tensor,
    byte_lengths: torch.Tensor,
    *,
    context: int,
    max_windows: int | None = None,
    batch_windows: int = 16,
    separate: bool = False,
) -> HeldOut:
    """Mean loss and bits per byte of a model over the windows of a held-out stream.

    Args:
        model: its training mode makes no difference, as it has no dropout.
        stream: token ids on the model's device, [tokens], any integer type; at least `context + 1`.
        byte_lengths: bytes per token id on the same device, [vocabulary], int64; 0 leaves a token unscored.
        context: tokens per window.
        max_windows: windows to read, spread evenly over the stream; all of them when None.
        batch_windows: windows per forward pass.
        separate: keep attention and positions inside each document.
    Returns:
        The loss with the counts it rests on.
    Raises:
        ValueError: the stream is shorter than one window, or no token in it can be scored.
    """
    available = (len(stream) - 1) // context
    if available < 1:
        raise ValueError(f"{len(stream)} held-out tokens: one window needs {context + 1}. Give more text")
    count = available if max_windows is None else min(available, max_windows)
    chosen = np.linspace(0, available - 1, count).round().astype(np.int64) * context
    reach = torch.arange(context + 1, device=stream.device)
    nats = torch.zeros(context, dtype=torch.float64, device=stream.device)
    scored, num_bytes = (torch.zeros(context, dtype=torch.int64, device=stream.device) for _ in range(2))
    for first in range(0, count, batch_windows):
        starts = torch.from_numpy(chosen[first : first + batch_windows]).to(stream.device)
        windows = stream[starts[:, None] + reach].long()  # [B, context + 1]
        lengths = byte_lengths[windows[:, 1:]]
        packed = separate and bool((windows[:, 1:-1] == ENDOFTEXT_ID).any())
        nll = token_nll(model, windows, document_positions(windows[:, :-1]) if packed else None)
        nats += torch.where(lengths > 0, nll, 0.0).double().sum(0)
        scored += (lengths > 0).sum(0)
        num_bytes += lengths.sum(0)
    num_tokens = int(scored.sum())
    if num_tokens == 0:
        raise ValueError("the held-out windows hold no token that stands for text. Give more text")
    parts = [(x.sum().item(), int(n.sum())) for x, n in zip(nats.chunk(_PARTS), scored.chunk(_PARTS), strict=True)]
    total = nats.sum().item()
    return HeldOut(
        nll=total / num_tokens,
        bits_per_byte=total / (math.log(2) * int(num_bytes.sum())),
        num_tokens=num_tokens,
        num_bytes=int(num_bytes.sum()),
        windows=count,
        context=context,
        nll_by_part=tuple(x / n for x, n in parts if n),
    )
