"""One step of decoding against a cache with ready summaries, in launches whose shapes do not depend on the text.

How long each row is, is read on the device, so a CUDA graph of a step can be replayed. A column is one new token of
one query head; C columns share a key head. Sums are float32, and so are products but those with keys and values of 16
bits, for which weights are cut into two halves of 16 bits; scores and log-sum-exp are powers of two.

1. `_score` appends the new keys and values and estimates the mass of each past block.
2. `_attend` reads the `top_k` best blocks of each column and the own block exactly, the others by their mean values,
   several programs each, of which each makes one part. They find the best blocks for themselves; where many columns
   keep the GPU busy, `_select` has found them before.
3. `_merge` joins the parts, adds the state, and moves each row on.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.triton.decode_kernels import _attend, _merge, _score, _select
from bsbr.ops.triton.early_launch import starts_early
from bsbr.ops.triton.summaries import padded

_PIECE_BYTES, _MOST_KEYS = 1 << 14, 64
"""Largest piece of keys of one load; all pieces of a program are on their way together."""

_PIECES, _TILE, _FAR_PARTS = 2, 32, 16
"""Pieces of keys that one program reads, summaries and mean values read at once, and the most parts the far field is
cut into: the same for every number of rows, so that a row's bits do not depend on its neighbours."""

_SPAN, _MANY_COLUMNS = 2, 128
"""Tiles of summaries that one program scores where this many columns keep the GPU busy; otherwise one."""


class Held(NamedTuple):
    """The tensors of a layer's cache; rows, key heads and what is said."""

    own_k: Tensor
    """Keys of the last two local blocks, block n in half n % 2, [B, H, 2 * block_size, D]."""
    own_v: Tensor
    """Their values."""
    past_k: Tensor | None
    """Keys of past blocks, [B, H, room, D]; None where nothing is retrieved."""
    past_v: Tensor | None
    """Their values."""
    meta: Tensor
    """Mean keys, for far="moments" with the variances after them, [B, H, room, D or 2 D] float32."""
    mean_v: Tensor | None
    """Mean values, [B, H, room, D] float32; None without a far field."""
    states: Tensor | None
    """Sums of the states before block n in half n % 2, [B, H, 2, D, D] float32; None without states."""


def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, held: Held, rows: Tensor, lengths: Tensor, config: BSBRConfig,
    calibration: Tensor, scale: float, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add new tokens to a cache and attend from them; their row is then that much longer.

    Source: docs/method.md; this is `reference_attention` at positions from `dense_until` on.

    Args:
        q: [R, S, HQ, D]; k, v: [R, S, H, D]; the S tokens of a row are in one of its local blocks.
        held: the cache, which is written to.
        rows: which of its rows these are, [R] int64.
        lengths: tokens of each of its rows, [B] int32, moved on by S for the rows here.
        config: the settings.
        calibration: [HQ, 5] float32.
        scale: factor on q.k.
        counts: blocks that queries of each key head read, at most `top_k`, [H] int64; None means `top_k` of them.
    Returns:
        o, [R, S, HQ, D] in the dtype of q.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    calibration = calibration.contiguous()
    (num_rows, steps, num_heads, width), heads = q.shape, k.shape[2]
    early = starts_early(q.device)
    zs, columns, room = num_rows * heads, steps * (num_heads // heads), held.meta.shape[2]
    past_k, past_v = (held.own_k, held.own_v) if held.past_k is None else (held.past_k, held.past_v)
    mean_v, states = (held.meta if x is None else x for x in (held.mean_v, held.states))
    keys = min(_MOST_KEYS, _PIECE_BYTES // (padded(width) * q.element_size()))
    many = zs * columns >= _MANY_COLUMNS
    span = _SPAN if many else 1
    read = triton.cdiv(config.top_k * config.unit, keys * _PIECES)
    own = triton.cdiv(config.block_size, keys * _PIECES)
    exact = read + own
    far_parts = 0
    if config.far != "drop":
        far_parts = min(_FAR_PARTS, triton.cdiv(room, _TILE))
    column_tile = triton.next_power_of_2(columns)
    mass_lines = triton.cdiv(room, 32)  # whole cache lines for a column
    tiles = max(_TILE, triton.next_power_of_2(triton.cdiv(room, _TILE)))
    peaks = rows.new_empty(zs, columns, tiles, dtype=torch.int32)
    mass = held.meta.new_empty(zs, columns, mass_lines * 32)
    chosen = rows.new_empty(zs, columns, max(1, config.top_k), dtype=torch.int32)
    bounds = rows.new_empty(zs, columns, 2, dtype=torch.int64)
    by_state = held.meta.new_empty(zs, columns, width)
    part_o = held.meta.new_empty(zs, columns, exact + far_parts, width)
    part_lse = held.meta.new_empty(part_o.shape[:3])
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    shared = {
        "S": steps, "G": num_heads // heads, "D": width, "DP": padded(width), "EVERY": num_rows == len(lengths),
        "EARLY": early,
    }  # fmt: skip
    launch = {"num_warps": 4} | ({"launch_pdl": True} if early else {})
    blocks = {"B": config.block_size, "UNIT": config.unit}
    search = {"TOP_K": config.top_k, "CP": column_tile, "BN": _TILE, "TP": tiles}
    base = math.log2(math.e)
    _score[(zs, columns + triton.cdiv(room, _TILE * span))](
        q, k, v, held.own_k, held.own_v, held.meta, states, calibration, rows, lengths, mass, peaks, by_state,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, room, mass_lines, scale * base,
        scale * scale / 2 * base, scale, BN=_TILE, TP=tiles, SPAN=span, MOMENTS=config.far == "moments",
        STATE=config.state != "none", **blocks, **shared, **launch,
    )  # fmt: skip
    if many:
        _select[(zs,)](
            mass, peaks, chosen, bounds, rows, lengths, counts, heads, mass_lines, C=columns, EVERY=shared["EVERY"],
            EARLY=early, **blocks, **search, **launch,
        )  # fmt: skip
    _attend[(zs, far_parts + own * triton.cdiv(columns, 16) + columns * read)](
        q, held.own_k, held.own_v, past_k, past_v, mean_v, mass, peaks, chosen, bounds, rows, lengths, counts, part_o,
        part_lse, *q.stride()[:3], heads, past_k.shape[2], room, mass_lines, scale * base, KEYS=keys, PIECES=_PIECES,
        READ=read, OWN=own, FAR=far_parts, HERE=not many, **blocks, **search, **shared, **launch,
        maxnreg=168 if width <= 128 else None,  # for 16 bits shared memory has room for three programs anyway
    )  # fmt: skip
    _merge[(zs * columns,)](
        part_o, part_lse, by_state, calibration, rows, lengths, o, heads, EXACT=exact, FAR=far_parts,
        PARTS=triton.next_power_of_2(exact + far_parts), STATE=config.state != "none", **shared, **launch,
    )  # fmt: skip
    return o
