"""Calling the C code: what it can compute, and one call for each query head."""

import ctypes

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.native.build import load_library
from bsbr.ops.schedule import Plan

_MANY = 64
"""Queries from which transposing keys pays."""

_POINTERS = ("q", "k", "v", "calibration", "o", "lse", "chosen", "scratch")
_INTEGERS = (
    "q_row", "k_row", "v_row", "o_row", "lse_row", "q_start", "stop", "sparse_start", "width", "value_width",
    "block_size", "unit", "top_k", "given", "moments", "far", "state",
)  # fmt: skip


class _Head(ctypes.Structure):
    """One query head as attention.c declares it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
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


class Scratch:
    """Memory that calls one after the other use again, since new memory is slow to touch; safe between threads."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """Return at least `size` bytes; give them back when done."""
        kept = self._free.pop() if self._free else None
        return kept if kept is not None and len(kept) >= size else torch.empty(size, dtype=torch.uint8)

    def give_back(self, memory: Tensor) -> None:
        """Let another call have it."""
        self._free.append(memory)


def native_forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    given: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scratch: Scratch,
) -> Tensor:
    """Compute the attention of a group of heads; queries of the dense prefix too.

    Args:
        plan: what to compute.
        q: queries, [R, H, G, Tq, D] float32, R rows.
        k: keys, [R, H, T, D]; v: values, [R, H, T, Dv].
        calibration: [H, G, 5].
        given: blocks to read by sparse queries, [R * H, G, top_k, S], or None to choose them.
        o: written, [R, H, G, Tq, Dv]; lse: written, [R, H, G, Tq].
        scratch: working memory.
    Returns:
        The blocks that sparse queries read, [R * H, G, top_k, S] int64.
    Raises:
        RuntimeError: there is no native code here.
    """
    library = load_library()
    if isinstance(library, str):
        raise RuntimeError(f"no native code: {library}")
    config, (rows, heads, group) = plan.config, q.shape[:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    calibration = calibration.contiguous()
    shape = (rows * heads, group, config.top_k, plan.stop - plan.sparse_start)
    chosen = torch.empty(shape, dtype=torch.int64) if given is None else given.contiguous()
    head = _Head(
        q_row=q.stride(3), k_row=k.stride(2), v_row=v.stride(2), o_row=o.stride(3), lse_row=lse.stride(3),
        q_start=plan.q_start, stop=plan.stop, sparse_start=plan.sparse_start, width=q.shape[-1],
        value_width=v.shape[-1], block_size=config.block_size, unit=config.unit, top_k=config.top_k,
        given=given is not None, moments=config.far == "moments", far=config.far != "drop",
        state=config.state == "global", scale=plan.scale,
    )  # fmt: skip
    library.bsbr_scratch.restype = ctypes.c_int64
    memory = scratch.take(library.bsbr_scratch(ctypes.byref(head)))
    head.scratch = memory.data_ptr()
    for row in range(rows):
        for key_head in range(heads):
            head.k, head.v = k[row, key_head].data_ptr(), v[row, key_head].data_ptr()
            for i in range(group):
                at = row, key_head, i
                head.q, head.o, head.lse = q[at].data_ptr(), o[at].data_ptr(), lse[at].data_ptr()
                head.calibration = calibration[key_head, i].data_ptr()
                head.chosen = chosen[row * heads + key_head, i].data_ptr()
                library.bsbr_forward(ctypes.byref(head))  # other threads run meanwhile
    scratch.give_back(memory)
    return chosen
