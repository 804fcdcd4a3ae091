"""Long texts, checked row by row: the reference of one query costs what its past is long, not the square of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import reference_attention
from tests.ops.cases import Case, error_bound


class Text(NamedTuple):
    """A long text of one row, and the blocks that its queries shall read."""

    q: Tensor
    k: Tensor
    v: Tensor
    chosen: Tensor
    """[1, T, HQ, top_k], ascending, -1 where fewer are past."""
    rows: list[int]
    """Positions that are checked; each has a needle in a block it reads."""


def rows_to_check(tokens: int, block_size: int, overflows: Sequence[int], count: int, seed: int) -> list[int]:
    """First and last positions, those around where an index of that many elements a row overflows, and random ones."""
    generator = torch.Generator().manual_seed(seed)
    near = [tokens // 2, block_size, block_size - 1]
    for elements in overflows:
        near += [bound // elements + step for bound in (2**31, 2**32) for step in (-1, 0, 1)]
    drawn = torch.randint(0, tokens, (count,), generator=generator).tolist()
    return sorted({row for row in [0, 1, tokens - 2, tokens - 1, *near, *drawn] if 0 <= row < tokens})


def draw_text(
    tokens: int, heads: int, key_heads: int, width: int, config: BSBRConfig, rows: Sequence[int], dtype: torch.dtype,
    device: str = "cpu", seed: int = 0,
) -> Text:  # fmt: skip
    """Draw a text whose queries read given blocks, with needles: keys along a query, with values of 30.

    Without a needle one dropped key among a hundred thousand would hide within rounding.
    """
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(1, tokens, count, width, generator=generator, device=device, dtype=dtype)
        for count in (heads, key_heads, key_heads)
    )
    per_block, top_k = config.block_size // config.unit, config.top_k
    position = torch.arange(tokens, device=device)
    past = position // config.block_size * per_block
    # spread evenly over the past, by another offset for each position: distinct, and known without a matrix T x N
    offset = position % 7 % (past // max(1, top_k)).clamp(min=1)
    chosen = past[:, None] * torch.arange(top_k, device=device) // max(1, top_k) + offset[:, None]
    few = past[:, None] <= top_k
    chosen = torch.where(few, torch.arange(top_k, device=device).expand_as(chosen), chosen)
    chosen = torch.where(chosen < past[:, None], chosen, -1)
    for row in rows:
        blocks = chosen[row][chosen[row] >= 0].tolist()
        slot = blocks[row % len(blocks)] * config.unit + row % config.unit if blocks else max(0, row - 1)
        for head in range(key_heads):
            own = q[0, row, head * (heads // key_heads)].double()
            k[0, slot, head] = (own * 6 / own.norm()).to(dtype)
            v[0, slot, head] = 30
    return Text(q, k, v, chosen[None, :, None].expand(1, tokens, heads, top_k), list(rows))


def row_ratio(text: Text, row: int, head: int, config: BSBRConfig, o: Tensor) -> float:
    """Error of one output [1, T, HQ, D] as a multiple of the forward-error bound."""
    heads, key_heads = text.q.shape[2], text.k.shape[2]
    key_head = head // (heads // key_heads)
    q = text.q[:, row : row + 1, head : head + 1]
    k, v = (x[:, : row + 1, key_head : key_head + 1] for x in (text.k, text.v))
    chosen = text.chosen[:, row : row + 1, head : head + 1]
    plain = torch.tensor([[0.0, 1, 1, 1, 1]], dtype=torch.float64, device=q.device)
    case = Case(0, config, q.double(), k.double(), v.double(), plain, row, None)
    expected = reference_attention(q, k, v, config, q_start=row, block_indices=chosen, calibration=plain)[0]
    found = o[:, row : row + 1, head : head + 1].double()
    ratio = ((found - expected).abs() / error_bound(case, q, k, v, chosen)).nan_to_num(nan=math.inf)
    return float(ratio.max())
