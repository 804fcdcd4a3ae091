"""Tiny runs of `run_pretrain` on a processor."""

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from bsbr.training.pretrain import PretrainConfig, run_pretrain

TEXT = "".join(f"{i} bottles on the wall, {i} bottles; take one down, {i - 1} left.\n" for i in range(99, 0, -1))
TINY: dict[str, Any] = {
    "layers": 1, "heads": 2, "hidden": 16, "context": 16, "vocab": 270, "batch_tokens": 64, "tokens": 64 * 24,
    "warmup_steps": 4, "val_interval": 8, "val_windows": 4, "checkpoint_interval": 5,
}  # fmt: skip


def run(texts: dict[str, Path], output: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train with the changes to `TINY`, and return the record."""
    config = PretrainConfig(**{**TINY, **changes})
    quiet = Console(file=io.StringIO())
    return run_pretrain(config, **texts, output=output, resume=resume, device="cpu", console=quiet)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a finished run."""
    return load_file(folder / "model.safetensors")
