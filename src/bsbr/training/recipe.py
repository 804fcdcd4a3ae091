"""The recipe of `bsbr pretrain`."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The recipe of one run; with the text it determines the model, up to the device's rounding."""

    architecture: str = "gpt2"
    """A model type of transformers (`gpt2`, `llama`, `qwen3` ...), which takes its sizes from here, or the path of a
    configuration in JSON, or of a folder with one, which has its own."""
    attention: dict[str, Any] | None = None
    """Settings of the attention, as `bsbr.hf.mixers.write_settings` gives them; None means full attention."""
    match_parameters: bool = False
    """Narrow the MLPs by what the attention has more parameters than full attention, so that models compare."""
    task: dict[str, Any] | None = None
    """A synthetic task to train on instead of a text, as `bsbr.data.tasks.TaskConfig.to_dict` gives it."""
    layers: int = 7
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block; divides `hidden`."""
    kv_heads: int | None = None
    """Key heads, where the architecture has them apart; None means as many as `heads`."""
    hidden: int = 256
    """Width of the model."""
    context: int = 2048
    """Positions the model learns, and tokens per training window."""
    vocab: int = 4096
    """Tokens of the tokenizer that is trained when none is given."""
    documents: str = "separate"
    """What windows that hold several documents do: `separate` keeps attention and positions inside each, `joined`
    lets them read on."""
    curriculum: tuple[tuple[int, float], ...] = ()
    """Shorter windows first: (length, share of the tokens), ascending; the rest is at `context`."""
    batch_tokens: int = 131_072
    """Tokens per optimizer step: a multiple of `context` and of the curriculum's lengths."""
    accumulation: int = 1
    """Forward passes a step is cut into, on each process; the gradients are the same."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps. Give this or `minutes`; only this is reproducible."""
    minutes: float | None = None
    """Minutes to train, after the text is prepared; the decay follows the clock. Give this or `tokens`."""
    optimizer: str = "muon"
    """`muon`: Muon for the matrices of the blocks and AdamW for the rest; `adamw`: AdamW for all."""
    lr: float = 5e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 1e-2
    """Peak learning rate of Muon, on AdamW's scale."""
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
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            _require(name, value, value in known, f"one of {', '.join(known)}")
        if self.kv_heads is not None:
            good = self.kv_heads >= 1 and self.heads % self.kv_heads == 0
            _require("kv_heads", self.kv_heads, good, f"a divisor of heads = {self.heads}")
        self._check_curriculum()
        self._check_accumulation()

    def _check_curriculum(self) -> None:
        stages = tuple((int(length), float(share)) for length, share in self.curriculum)
        object.__setattr__(self, "curriculum", stages)
        if not stages:
            return
        _require("curriculum", stages, self.tokens is not None, "given with tokens, not with minutes")
        lengths = [length for length, _ in stages]
        rises = lengths == sorted(set(lengths)) and lengths[0] >= 1 and lengths[-1] < self.context
        _require("curriculum", stages, rises, f"lengths that rise and stay below context = {self.context}")
        shares = [share for _, share in stages]
        _require("curriculum", stages, min(shares) > 0 and sum(shares) < 1, "shares above 0 that leave some to context")
        fits = all(self.batch_tokens % length == 0 for length in lengths)
        _require("curriculum", stages, fits, f"lengths that divide batch_tokens = {self.batch_tokens}")

    def _check_accumulation(self) -> None:
        windows = self.batch_tokens // self.context
        good = self.accumulation >= 1 and windows % self.accumulation == 0
        _require("accumulation", self.accumulation, good, f"a divisor of the {windows} windows of a step")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, lists for tuples."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values


_CHOICES = {
    "precision": ("auto", "bfloat16", "float32"),
    "documents": ("separate", "joined"),
    "optimizer": ("muon", "adamw"),
}


def _require(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
