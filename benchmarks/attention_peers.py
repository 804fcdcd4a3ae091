"""Other attentions of the same shapes to time beside: flash-linear-attention's kernels, and the original additive BSBR.

They read other things than softmax attention does, so their times say what else could be had, not who is faster at one
thing. flash-linear-attention is looked for only if it is asked for (`pip install flash-linear-attention`).
"""

from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.peers.additive import additive_attention

ADDITIVE, LINEAR, DELTA, NSA = "additive BSBR", "linear, fla", "Gated DeltaNet, fla", "NSA, fla"
OTHERS = (ADDITIVE, LINEAR, DELTA, NSA)


def other_call(name: str, tensors: list[Tensor], config: BSBRConfig) -> Callable[[], object]:
    """Make a forward call of an attention; whatever it needs beside q, k and v is there before the clock starts.

    Args:
        name: of `OTHERS`.
        tensors: q [1, T, HQ, D]; k, v [1, T, H, D].
        config: settings of BSBR: the blocks of the additive form, and the blocks that NSA, without its window, reads.
    Returns:
        The call.
    Raises:
        ValueError: NSA of fewer than 16 query heads a key head.
        ImportError: flash-linear-attention is not installed.
    """
    q, k, v = tensors[:3]
    group = q.shape[2] // k.shape[2]
    if name == ADDITIVE:
        past = (q.shape[1] - 1) // config.block_size
        metas = torch.randn(2, 1, past, q.shape[2], q.shape[3], dtype=q.dtype, device=q.device)
        return lambda: additive_attention(q, k, v, *metas, block_size=config.block_size)
    if name == NSA:
        if group < 16:
            raise ValueError(f"{name} takes 16 query heads a key head and more, here are {group}")
        from fla.ops.nsa import parallel_nsa

        gate = q.new_ones(q.shape[:3])
        counts, unit = config.top_k, config.unit
        return lambda: parallel_nsa(q, k, v, g_cmp=gate, g_slc=gate, block_counts=counts, block_size=unit)
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))  # these kernels have as many key heads as query heads
    if name == LINEAR:
        from fla.ops.linear_attn import chunk_linear_attn

        positive = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
        return lambda: chunk_linear_attn(*positive, v)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    decay, strength = (q.new_full(q.shape[:3], x) for x in (-0.1, 0.5))
    return lambda: chunk_gated_delta_rule(q, k, v, decay.float(), strength, use_qk_l2norm_in_kernel=True)


def versions(names: list[str]) -> dict[str, str]:
    """The version of flash-linear-attention, if one of these attentions is its own."""
    asked = any("fla" in name for name in names)
    return {"flash-linear-attention": metadata.version("flash-linear-attention")} if asked else {}
