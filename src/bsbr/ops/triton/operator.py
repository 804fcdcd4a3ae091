"""The kernels as two PyTorch operators, so that autograd, torch.compile and CUDA graphs see through them."""

from typing import cast

import torch
from torch import Tensor

from bsbr.config import BSBRConfig, Far, Selection, State
from bsbr.ops.shares import on_device
from bsbr.ops.triton.backward import backward
from bsbr.ops.triton.dense import attend_all, has_flash
from bsbr.ops.triton.forward import forward
from bsbr.ops.triton.problem import Problem, make_problem


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    *,
    scale: float,
    q_start: int,
    calibration: Tensor,
    block_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention of `reference_attention` on a GPU, in memory linear in the number of tokens.

    Source: docs/method.md; the kernels are in the files beside this one, in the order of `forward`.

    Args:
        q: [B, Tq, HQ, D]; k, v: [B, T, H, D], T = q_start + Tq; a call that `unsupported` has nothing against.
        config: the settings.
        scale: factor on q.k.
        q_start: position of the first query.
        calibration: [HQ, 5] float32.
        block_indices: selection to use, [B, Tq, HQ, top_k], or None to choose here.
    Returns:
        o [B, Tq, HQ, D] in the dtype of q; lse [B, Tq, HQ] float32, without gradient; the blocks of the S queries that
        do not read their whole past, [B, S, HQ, top_k] int32, those given or those chosen, -1 where one reads fewer.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    numbers = config.top_k_per_head
    counts = None if numbers is None else on_device(numbers, q.device)
    given = calibration.contiguous(), block_indices, counts, encode(config), scale, q_start
    o, lse, chosen = _attention(q, k, v, *given)
    return o, lse.detach(), chosen


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Compute the attention of a text whose every query reads its whole past, by one call of PyTorch's.

    Args:
        q: [B, T, HQ, D]; k, v: [B, T, H, D].
        scale: factor on q.k.
    Returns:
        o [B, T, HQ, D] in the dtype of q; None where PyTorch has no fused kernel for such tensors, and while
        torch.compile traces, which cannot see what device it is for.
    """
    return attend_all(q, k, v, scale) if has_flash(q) and not torch.compiler.is_compiling() else None


def encode(config: BSBRConfig) -> str:
    """Write settings as the operators take them; torch.compile traces through this, as it does not through JSON."""
    sizes = f"{config.block_size} {config.unit} {config.top_k} {config.dense_below}"
    counts = ",".join(f"{count}" for count in config.top_k_per_head or ())
    return f"{sizes} {config.far} {config.state} {config.selection} {counts or 'all'}"


def _problem(q: Tensor, k: Tensor, settings: str, scale: float, q_start: int) -> Problem:
    block_size, unit, top_k, dense_below, far, state, selection, counts = settings.split()
    config = BSBRConfig(
        block_size=int(block_size),
        retrieval_block_size=int(unit),
        top_k=int(top_k),
        top_k_per_head=None if counts == "all" else tuple(map(int, counts.split(","))),
        dense_below=int(dense_below),
        far=cast(Far, far),
        state=cast(State, state),
        selection=cast(Selection, selection),
    )
    return make_problem(q, k, config, scale, q_start)


@torch.library.custom_op("bsbr::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    block_indices: Tensor | None,
    counts: Tensor | None,
    settings: str,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(_problem(q, k, settings, scale, q_start), q, k, v, calibration, block_indices, counts)


@_attention.register_fake
def _(q, k, v, calibration, block_indices, counts, settings, scale, q_start):  # type: ignore[no-untyped-def]
    problem = _problem(q, k, settings, scale, q_start)
    chosen = q.new_empty(
        q.shape[0], problem.num_sparse, q.shape[2], problem.config.top_k if problem.num_sparse else 0,
        dtype=torch.int32,
    )  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32), chosen


@torch.library.custom_op("bsbr::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    calibration: Tensor,
    o: Tensor,
    lse: Tensor,
    chosen: Tensor,
    settings: str,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(_problem(q, k, settings, scale, q_start), do, q, k, v, calibration, o, lse, chosen)


@_attention_backward.register_fake
def _(do, q, k, v, calibration, o, lse, chosen, settings, scale, q_start):  # type: ignore[no-untyped-def]
    return (*(x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(calibration))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, calibration, _, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, calibration, *output)


def _differentiate(ctx, do, *_):  # type: ignore[no-untyped-def]
    q, k, v, calibration, o, lse, chosen = ctx.saved_tensors
    gradients = _attention_backward(do, q, k, v, calibration, o, lse, chosen, *ctx.options)
    return *gradients, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
