"""Calling the C code: what it can compute, and how tensors are handed over."""

import ctypes
import functools
import os

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.native.build import load_library
from bsbr.ops.schedule import Plan

_POINTERS = ("q", "k", "v", "calibration", "o", "lse", "chosen", "top_ks", "scratch")
_STRIDES = tuple(f"{name}_{axis}" for axis in ("row", "head", "batch") for name in ("q", "k", "v", "o", "lse"))
_INTEGERS = (
    "batch", "heads", "key_heads", "q_start", "stop", "sparse_start", "width", "value_width", "block_size", "unit",
    "top_k", "given", "moments", "far", "state",
)  # fmt: skip


class _Call(ctypes.Structure):
    """A call as attention.c declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES + _INTEGERS),
        ("scale", ctypes.c_float),
    )


def why_not_native(q: Tensor, config: BSBRConfig, dropout_p: float = 0.0) -> str:
    """Say why the native code cannot compute a call, or is not worth it.

    Args:
        q: queries, [B, Tq, HQ, D].
        config: the settings.
        dropout_p: probability of dropping a weight.
    Returns:
        The reason in a few words, or "" if it can.

    Example:
        >>> why_not_native(torch.zeros(1, 9, 1, 8, dtype=torch.float64), BSBRConfig())
        'native code computes float32 on a CPU'
    """
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return "native code computes float32 on a CPU"
    if dropout_p:
        return "native code has no dropout"
    if config.state in ("block", "token"):
        return f'native code has no state="{config.state}"'
    if config.selection == "group":
        return 'native code has no selection="group"'
    library = load_library()
    return f"no native code: {library}" if isinstance(library, str) else ""


def native_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor, block_indices: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of all heads, the dense prefix too.

    Args:
        plan: what to compute.
        q: queries, [B, Tq, HQ, D] float32.
        k: keys, [B, T, H, D]; v: values, [B, T, H, Dv].
        calibration: [HQ, 5] float32.
        block_indices: blocks to read, [B, Tq, HQ, top_k], or None to choose them; None with `top_k_per_head`.
    Returns:
        o [B, Tq, HQ, Dv], lse [B, Tq, HQ], both float32, and the blocks that sparse queries read,
        [B, HQ, top_k, S] int64; with `top_k_per_head` nothing can be read off these.
    Raises:
        RuntimeError: there is no native code here.
        ValueError: a block given does not exist.
    """
    library = load_library()
    if isinstance(library, str):
        raise RuntimeError(f"no native code: {library}")
    config, (batch, _, heads, width) = plan.config, q.shape
    if block_indices is None:
        chosen = torch.empty(batch, heads, config.max_top_k, plan.stop - plan.sparse_start, dtype=torch.int64)
    else:
        chosen = block_indices[:, plan.num_dense :].permute(0, 2, 3, 1).to(torch.int64).contiguous()
        past = plan.num_past // config.unit
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < past:  # C would read anywhere
            raise ValueError(f"block_indices of sparse queries must be from 0 to {past - 1}, the past blocks")
    calibration = calibration.contiguous()
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    o, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    call = _Call(
        batch=batch, heads=heads, key_heads=k.shape[2], q_start=plan.q_start, stop=plan.stop,
        sparse_start=plan.sparse_start, width=width, value_width=v.shape[3], block_size=config.block_size,
        unit=config.unit, top_k=config.max_top_k, given=block_indices is not None, moments=config.far == "moments",
        far=config.far != "drop", state=config.state == "global", scale=plan.scale,
    )  # fmt: skip
    for name, x in zip(("q", "k", "v", "o", "lse"), (q, k, v, o, lse), strict=True):
        for axis, stride in zip(("batch", "row", "head"), x.stride(), strict=False):
            setattr(call, f"{name}_{axis}", stride)
    threads = min(torch.get_num_threads(), batch * heads)
    scratch = torch.empty(threads * library.bsbr_scratch(ctypes.byref(call)), dtype=torch.uint8)
    top_ks = None if config.top_k_per_head is None else torch.tensor(config.top_k_per_head, dtype=torch.int64)
    handed = (q, k, v, calibration, o, lse, chosen, top_ks, scratch)
    for name, tensor in zip(_POINTERS, handed, strict=True):
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    library.bsbr_forward(ctypes.byref(call), ctypes.c_int64(threads), _torch_threads())  # without Python's lock
    return o, lse, chosen


@functools.cache
def _torch_threads() -> ctypes.c_void_p | None:
    """The function that starts PyTorch's own threads, where they are GNU OpenMP's."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    return ctypes.cast(function, ctypes.c_void_p) if function else None
