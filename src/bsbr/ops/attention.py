"""The attention as one function of tensors: checks, padding and the choice of backend."""

from typing import Literal, get_args

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.chunked import chunked_attention
from bsbr.ops.native.forward import why_not_native
from bsbr.ops.reference import reference_attention
from bsbr.ops.routing import recent_blocks
from bsbr.ops.schedule import dense_until
from bsbr.ops.shares import Share, join_shares, shares_of, shares_of_kernels, take_share
from bsbr.ops.sinks import add_sinks
from bsbr.ops.summaries import uncalibrated
from bsbr.ops.tiles import Dropout
from bsbr.ops.triton.problem import why_not_triton

Backend = Literal["auto", "reference", "chunked", "native", "triton"]


def resolve_backend(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    *,
    q_start: int = 0,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[str, str]:
    """Say which backend computes a call, and why.

    Args:
        backend: a backend's name, or "auto".
        q, k, v, config, q_start, dropout_p, sinks: as given to `bsbr_attention`.
    Returns:
        The name of the backend, and the reason in a few words.
    Raises:
        ValueError: no such backend, or one asked for by name that cannot compute the call.

    Example:
        >>> x = torch.zeros(1, 9, 2, 8, dtype=torch.float64)
        >>> resolve_backend("auto", x, x, x, BSBRConfig())
        ('chunked', 'native code computes float32 on a CPU')
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend in ("reference", "chunked"):
        return backend, "asked for by name"
    on_gpu = q.is_cuda if backend == "auto" else backend == "triton"  # interpreted kernels are for those who ask
    name, best = ("triton", "the fastest on a GPU") if on_gpu else ("native", "the fastest on a CPU")
    of_call = (q, k, v, config, q_start, dropout_p)
    obstacle: str | None
    if on_gpu and torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        obstacle = "the kernels add gradients in no fixed order"
    elif on_gpu and backend == "auto" and q.dtype == torch.float32:
        obstacle = "in float32 the kernels are for checks"
    elif on_gpu:
        obstacle = "the kernels have no sinks" if sinks is not None else why_not_triton(*of_call)
    else:
        obstacle = why_not_native(q, config, dropout_p)
    if backend == "auto":
        return ("chunked", obstacle) if obstacle else (name, best)
    if obstacle:
        raise ValueError(f'backend="{name}" cannot compute this, {obstacle}: use "auto" or "chunked"')
    return name, "asked for by name"


def bsbr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    *,
    scale: float | None = None,
    q_start: int = 0,
    lengths: Tensor | None = None,
    calibration: Tensor | None = None,
    block_indices: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Block sparse attention with block retrieval: local, retrieved and far fields under one softmax.

    Source: docs/method.md; `bsbr.ops.reference` is the definition.

    1. The own block of `block_size` tokens is read exactly and causally.
    2. The `top_k` past blocks of largest estimated mass are read exactly, chosen by each query for itself; with
       `top_k_per_head`, as many as its key head reads; with selection="recent", the latest ones.
    3. Every other past block is one entry made of its mean key, key variance, mean value and first-order state.

    A block is summarised and retrieved only when it is complete and lies before the own block. Where `top_k` covers
    every past block the result is exact attention. Gradients flow to q, k, v and the calibration, through the
    summaries too; the choice of blocks is piecewise constant and has none, and neither has lse.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D]; H divides HQ, heads are not repeated.
        v: values, [B, T, H, Dv].
        config: the settings.
        scale: factor on q.k; None means D ** -0.5.
        q_start: position of the first query; q_start + Tq equals T.
        lengths: real keys of each row, [B] integers; what comes later is padding. None means T.
        calibration: five scalars a head in the order of `CALIBRATION`, [HQ, 5]; None means uncalibrated.
        block_indices: blocks to read instead of those of largest mass, [B, Tq, HQ, max_top_k], ascending;
            padded with -1 where fewer are past or the head reads fewer.
        sinks: a logit for each query head that takes weight and gives nothing, [HQ], as gpt-oss learns them; None
            means none.
        dropout_p: probability of dropping an attention weight, as in training; not for "reference".
        backend: "auto", "triton" (kernels for NVIDIA GPUs), "native" (compiled C: CPU, float32), "chunked" (linear
            memory, any device) or "reference" (float64, quadratic).
        return_lse: return the log-sum-exp too, sinks included.
    Returns:
        o [B, Tq, HQ, Dv] in the dtype of q, 0 for padded queries; and, if asked for, lse [B, Tq, HQ], natural log,
        in float32 (float64 for float64 input), -inf for padded queries.
    Raises:
        ValueError: shapes, dtypes or options that do not fit together.

    Example:
        >>> q, kv = torch.randn(1, 300, 4, 16), torch.randn(1, 300, 2, 16)
        >>> bsbr_attention(q, kv, kv, BSBRConfig(block_size=32, top_k=2, dense_below=0)).shape
        torch.Size([1, 300, 4, 16])
    """
    _check(q, k, v, config, q_start, lengths, calibration, block_indices, sinks)
    name, _ = resolve_backend(backend, q, k, v, config, q_start=q_start, dropout_p=dropout_p, sinks=sinks)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, calibration, sinks))
    # native code counts head by head where nothing has to be kept, so that its threads can share all heads
    counts = name == "native" and block_indices is None and not learns and config.selection != "recent"
    # kernels take heads of several numbers together
    together = name == "triton" and block_indices is None and config.selection != "recent"
    differ = config.top_k_per_head is not None and name != "reference" and not counts
    shares: list[Share] = []
    if differ:
        # late queries are one call: heads that read more would have some of theirs read all of their past
        shares = shares_of_kernels(config, 0 if q_start else q.shape[1]) if together else shares_of(config)
    if shares and not (together and shares[0].config == config):  # those taken together are this call
        parts = [
            bsbr_attention(
                take_share(q, share.heads, k.shape[2]), take_share(k, share.heads, k.shape[2]),
                take_share(v, share.heads, k.shape[2]), share.config, scale=scale, q_start=q_start, lengths=lengths,
                calibration=None if calibration is None else take_share(calibration, share.heads, k.shape[2], 0),
                block_indices=_of_share(block_indices, share, k.shape[2]), dropout_p=dropout_p, backend=backend,
                sinks=None if sinks is None else take_share(sinks, share.heads, k.shape[2], 0), return_lse=True,
            )
            for share in shares
        ]  # fmt: skip
        heads = [share.heads for share in shares]
        o, lse = (join_shares(each, heads) for each in zip(*parts, strict=True))
        return (o, lse) if return_lse else o
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "reference":
        if dropout_p:
            raise ValueError(f'backend="reference" has no dropout, got dropout_p {dropout_p}: use "chunked"')
        o, lse, _ = reference_attention(
            q, k, v, config, scale=scale, q_start=q_start, lengths=lengths, calibration=calibration,
            block_indices=block_indices,
        )  # fmt: skip
        if sinks is not None:
            o, lse = add_sinks(o, lse, sinks)
        return (o.to(q.dtype), lse.to(wide)) if return_lse else o.to(q.dtype)
    if lengths is not None:
        padded = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
        k, v = (x.masked_fill(padded[:, :, None, None], 0) for x in (k, v))
        q = q.masked_fill(padded[:, q_start:, None, None], 0)
    if name == "triton":
        from bsbr.ops.triton.operator import dense_attention, triton_attention  # imported only where it is used

        whole = q_start == 0 and q.shape[1] <= dense_until(config) and (calibration is None or not learns)
        plain = dense_attention(q, k, v, scale) if whole and lengths is None and not return_lse else None
        if plain is not None:
            return plain
    calibration = uncalibrated(q.shape[2], wide, q.device) if calibration is None else calibration.to(wide)
    if config.selection == "recent" and block_indices is None and config.top_k:
        block_indices = recent_blocks(q, config, q_start)  # compiled code chooses by mass alone
    if name == "triton":
        o, lse, _ = triton_attention(
            q, k, v, config, scale=scale, q_start=q_start, calibration=calibration, block_indices=block_indices
        )
    else:
        seed = int(torch.randint(1 << 31, ())) if dropout_p else 0
        o, lse = chunked_attention(
            q, k, v, config, scale=scale, q_start=q_start, calibration=calibration, block_indices=block_indices,
            dropout=Dropout(dropout_p, seed), native=name == "native", sinks=sinks,
        )  # fmt: skip
    if lengths is not None:
        outside = padded[:, q_start:, None]
        o, lse = o.masked_fill(outside[..., None], 0), lse.masked_fill(outside, -torch.inf)
    return (o, lse) if return_lse else o


def _of_share(block_indices: Tensor | None, share: Share, key_heads: int) -> Tensor | None:
    if block_indices is None:
        return None
    return take_share(block_indices, share.heads, key_heads)[..., : share.config.top_k]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: BSBRConfig,
    q_start: int,
    lengths: Tensor | None,
    calibration: Tensor | None,
    block_indices: Tensor | None,
    sinks: Tensor | None,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [B, T, H, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} must agree in rows and head width, "
            "k and v in tokens and heads"
        )
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q_start < 0 or q_start + q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q_start + queries must equal the number of keys, got {q_start} + {q.shape[1]} and {k.shape[1]}"
        )
    if config.state == "block" and q_start:
        raise ValueError('state="block" needs every query from position 0, got q_start > 0: use state="global"')
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths must be [{q.shape[0]}], got {list(lengths.shape)}")
    if calibration is not None and calibration.shape != (q.shape[2], 5):
        raise ValueError(f"calibration must be [{q.shape[2]}, 5], got {list(calibration.shape)}")
    if config.top_k_per_head is not None and len(config.top_k_per_head) != k.shape[2]:
        raise ValueError(f"top_k_per_head must have {k.shape[2]} numbers, got {len(config.top_k_per_head)}")
    expected = (*q.shape[:3], config.max_top_k)
    if block_indices is not None and block_indices.shape != expected:
        raise ValueError(f"block_indices must be {list(expected)}, got {list(block_indices.shape)}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must be [{q.shape[2]}], got {list(sinks.shape)}")
