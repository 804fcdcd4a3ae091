"""The GPT-2-architecture model that `bsbr pretrain` trains, its loss, and its loss on held-out text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from bsbr.files import write_atomic

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def build_gpt2(*, layers: int, heads: int, hidden: int, context: int, vocab: int, seed: int) -> "GPT2LMHeadModel":
    """A GPT-2 model with random weights, tied embeddings and no dropout.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2); initialisation as
    transformers does it, from `seed` alone, without touching the global random state.

    Args:
        layers, heads, hidden, context, vocab: the sizes.
        seed: chooses the weights.
    Returns:
        The model, float32, on the CPU, in training mode.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=hidden,
        n_positions=context,
        vocab_size=vocab,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).train()


def token_nll(model: "GPT2LMHeadModel", windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token of a batch of windows given those before it, in nats.

    The blocks are called directly: the model's own `forward` builds a mask when it is compiled, which costs
    SDPA its fast causal kernel. A test holds the two equal.

    Args:
        model: GPT-2 with SDPA attention.
        windows: token ids, [B, T + 1], int64.
    Returns:
        [B, T], float32: entry t is the loss of token t + 1.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    body = model.transformer
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    states = body.wte(inputs) + body.wpe(positions)
    for block in body.h:
        states = block(states)
    logits = model.lm_head(body.ln_f(states)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def save_model(model: "GPT2LMHeadModel", target: Path) -> None:
    """Write weights and configuration as a standard Hugging Face folder, each file whole or not at all.

    Args:
        model: in the dtype to be stored; tied weights are stored once.
        target: the folder; made if missing.
    Raises:
        UserError: the folder cannot be written.
    """
    from safetensors.torch import save

    weights = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in model.named_parameters()}
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    write_atomic(target / "config.json", model.config.to_json_string(use_diff=True))
    write_atomic(target / "generation_config.json", model.generation_config.to_json_string(use_diff=True))
    write_atomic(target / "model.safetensors", save(weights, metadata={"format": "pt"}))


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

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


@torch.no_grad()
def held_out_loss(
    model: "GPT2LMHeadModel",
    stream: torch.Tensor,
    byte_lengths: torch.Tensor,
    *,
    context: int,
    max_windows: int | None = None,
    batch_windows: int = 16,
) -> HeldOut:
    """Mean loss and bits per byte of a model over the windows of a held-out stream.

    Args:
        model: GPT-2; its training mode makes no difference, as it has no dropout.
        stream: token ids on the model's device, [tokens], any integer type; at least `context + 1`.
        byte_lengths: bytes per token id on the same device, [vocabulary], int64; 0 leaves a token unscored.
        context: tokens per window.
        max_windows: windows to read, spread evenly over the stream; all of them when None.
        batch_windows: windows per forward pass.
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
    nats = torch.zeros((), dtype=torch.float64, device=stream.device)
    scored = torch.zeros((), dtype=torch.int64, device=stream.device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=stream.device)
    for first in range(0, count, batch_windows):
        starts = torch.from_numpy(chosen[first : first + batch_windows]).to(stream.device)
        windows = stream[starts[:, None] + reach].long()  # [B, context + 1]
        lengths = byte_lengths[windows[:, 1:]]
        nll = token_nll(model, windows)
        nats += torch.where(lengths > 0, nll, 0.0).double().sum()
        scored += (lengths > 0).sum()
        num_bytes += lengths.sum()
    num_tokens = int(scored)
    if num_tokens == 0:
        raise ValueError("the held-out windows hold no token that stands for text. Give more text")
    return HeldOut(
        nll=nats.item() / num_tokens,
        bits_per_byte=nats.item() / (math.log(2) * int(num_bytes)),
        num_tokens=num_tokens,
        num_bytes=int(num_bytes),
        windows=count,
        context=context,
    )
