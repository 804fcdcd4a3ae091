"""The recipe of `bsbr pretrain`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The recipe of one run; with the text it determines the model, up to the device's rounding."""

    layers: int = 7
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block; divides `hidden`."""
    hidden: int = 256
    """Width of the model."""
    context: int = 2048
    """Positions the model learns, and tokens per training window."""
    vocab: int = 4096
    """Tokens of the tokenizer that is trained when none is given."""
    batch_tokens: int = 131_072
    """Tokens per optimizer step: a multiple of `context`."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps. Give this or `minutes`; only this is reproducible."""
    minutes: float | None = None
    """Minutes to train, after the text is prepared; the decay follows the clock. Give this or `tokens`."""
    lr: float = 5e-3
    """Peak learning rate of AdamW (embeddings, norms, biases)."""
    muon_lr: float = 1e-2
    """Peak learning rate of Muon (matrices of the blocks), on AdamW's scale."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    warmup_steps: int = 200
    """Steps of linear warm-up; after them the rates decay linearly to zero."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    seed: int = 0
    """Chooses initial weights and the order of the windows."""
    precision: str = "auto"
    """`bfloat16` (autocast, float32 weights), `float32`, or `auto`: bfloat16 on CUDA, float32 elsewhere."""
    compile: bool | None = None
    """Whether to use torch.compile; None means on CUDA only."""
    val_interval: int = 1000
    """Steps between held-out losses on the way; the last one reads the whole held-out text."""
    val_windows: int = 128
    """Windows of the held-out text read on the way."""
    checkpoint_interval: int = 2000
    """Steps between checkpoints; Ctrl-C writes one too."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "hidden", "context", "batch_tokens", "val_interval", "val_windows"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("checkpoint_interval", self.checkpoint_interval, self.checkpoint_interval >= 1, "at least 1")
        _require("vocab", self.vocab, self.vocab >= 257, "at least 257 (the bytes and <|endoftext|>)")
        _require("heads", self.heads, self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}")
        aligned = self.batch_tokens % self.context == 0
        _require("batch_tokens", self.batch_tokens, aligned, f"a multiple of context = {self.context}")
        if (self.tokens is None) == (self.minutes is None):
            raise ValueError("length of training: give either tokens or minutes, for instance tokens = 1_000_000_000")
        for name in ("tokens", "minutes", "lr", "muon_lr", "clip"):
            value = getattr(self, name)
            _require(name, value, value is None or (math.isfinite(value) and value > 0), "finite and above 0")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "finite and at least 0")
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        _require("seed", self.seed, self.seed >= 0, "at least 0")
        known = ("auto", "bfloat16", "float32")
        _require("precision", self.precision, self.precision in known, f"one of {', '.join(known)}")

    def least_bytes(self) -> int:
        """Memory that training takes at the least: weights, gradients and one moment of each, in float32.

        The vocabulary is left out, since a small text yields a smaller one than asked for.

        Returns:
            Bytes.

        Example:
            >>> PretrainConfig(layers=1, heads=1, hidden=1, context=1, batch_tokens=1, tokens=1).least_bytes()
            336
        """
        block = 12 * self.hidden**2 + 13 * self.hidden
        return 3 * 4 * (self.layers * block + (self.context + 2) * self.hidden)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return dataclasses.asdict(self)


def _require(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
