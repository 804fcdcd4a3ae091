"""Floating-point operations of training, and what share of the device's peak they are."""

from typing import Any

import torch
from transformers import PreTrainedModel

_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16 matrix products per second by part of the device's name, from the vendor's data sheets."""


def training_flops_per_token(model: PreTrainedModel, length: int, *, full_attention: bool) -> float:
    """Count the operations of a forward and a backward pass for one token.

    Source: Chowdhery et al., "PaLM" (arXiv 2204.02311), appendix B: 6 for every weight that is multiplied with, and
    for full attention 12 x layers x heads x width x length. The tied or own output matrix counts, embeddings that
    are looked up do not; causal attention is counted as if it read the whole window, as is the custom.

    Args:
        model: the model.
        length: tokens of a window.
        full_attention: count attention too; a sparse attention's is left out, so that its share of the peak is a
            lower bound.
    Returns:
        Operations per token.
    """
    config: Any = model.config.get_text_config(decoder=True)
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in looked_up)
    head = model.get_output_embeddings().weight
    if id(head) in looked_up:
        weights += head.numel()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 12 * config.num_hidden_layers * heads * width * length if full_attention else 0
    return float(6 * weights + attention)


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a device, operations per second.

    Args:
        device: any.
    Returns:
        The number, or None where it is not known, as for a CPU.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
