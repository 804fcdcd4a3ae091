"""The recipe of `bsbr finetune`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scope = Literal["calibration", "lora", "attention", "all"]
Stage = Literal["transfer", "distill", "language"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The recipe of one run: which weights move, and how many tokens each stage reads."""

    scope: Scope = "attention"
    """What is trained: the scalars of the far field, LoRA on the attention projections (with the scalars), all weights
    of the attention modules, or all weights of the model."""
    transfer_tokens: int = 0
    """Tokens of stage 1: each attention layer learns the original layer's output from the original layer's input."""
    distill_tokens: int = 1_000_000
    """Tokens of stage 2: the model learns the original's next-token distribution (KL)."""
    language_tokens: int = 0
    """Tokens of stage 3: the model learns the text itself (cross-entropy)."""
    length: int = 2048
    """Tokens of a window."""
    batch_windows: int = 1
    """Windows of a forward pass, on each process."""
    accumulation: int = 8
    """Forward passes of an optimizer step."""
    lr: float = 1e-4
    """Peak learning rate of AdamW; linear warm-up, then cosine decay to zero in each stage. AdamW's first steps are of
    this size in every weight, however small the gradient: a model near its original already first loses at 1e-4."""
    scalar_lr: float = 1e-2
    """The same for the scalars of the far field, which are few and of size one."""
    warmup_share: float = 0.05
    """Share of a stage's steps that warm up."""
    weight_decay: float = 0.0
    """Decoupled weight decay; the scalars have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    lora_rank: int = 16
    """Rank of the updates with scope "lora"."""
    precision: str = "auto"
    """`bfloat16` (autocast, float32 weights), `float16` (the same with 10 bits in place of 7 and a scaled loss, on a
    GPU), `tf32` (float32 but for the products of an NVIDIA GPU, which round to 10 bits; without the sparse
    kernels, which are for 16 bits), `float32`, or `auto`: bfloat16 on CUDA, float32 elsewhere. A model that is near its
    original already needs more than bfloat16's bits: the rounding of the student weighs more than the difference."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; stage 1 has few and never does."""
    eval_interval: int = 50
    """Steps between looks at the held-out text."""
    eval_windows: int = 8
    """Held-out windows read on the way; before and after, four times as many."""
    save_interval: int = 100
    """Steps between checkpoints; Ctrl-C writes one too."""
    seed: int = 0
    """Chooses the order of the windows and the initial LoRA weights."""

    def __post_init__(self) -> None:
        _require("scope", self.scope, self.scope in get_args(Scope), f"one of {', '.join(get_args(Scope))}")
        counts = ("length", "batch_windows", "accumulation", "lora_rank", "eval_interval", "eval_windows")
        for name in (*counts, "save_interval"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("length", self.length, self.length >= 2, "at least 2")
        for name in ("transfer_tokens", "distill_tokens", "language_tokens", "seed"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        if not any(self.tokens.values()):
            raise ValueError("nothing to train: give transfer_tokens, distill_tokens or language_tokens above 0")
        for name in ("lr", "scalar_lr", "clip"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value > 0, "finite and above 0")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "finite and at least 0")
        _require("warmup_share", self.warmup_share, 0 <= self.warmup_share < 1, "at least 0 and below 1")
        known = ("auto", "bfloat16", "float16", "tf32", "float32")
        _require("precision", self.precision, self.precision in known, f"one of {', '.join(known)}")

    @property
    def tokens(self) -> dict[Stage, int]:
        """Tokens of each stage, in their order."""
        return {"transfer": self.transfer_tokens, "distill": self.distill_tokens, "language": self.language_tokens}

    def steps(self, stage: Stage, processes: int = 1) -> int:
        """Optimizer steps of a stage: its tokens, rounded up to whole steps.

        Args:
            stage: which one.
            processes: how many share the work.
        Returns:
            The number of steps.

        Example:
            >>> FinetuneConfig(distill_tokens=20_000, length=1024, batch_windows=2, accumulation=4).steps("distill")
            3
        """
        return -(-self.tokens[stage] // (self.length * self.batch_windows * self.accumulation * processes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return dataclasses.asdict(self)


def _require(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} = {value!r}: must be {wanted}")
