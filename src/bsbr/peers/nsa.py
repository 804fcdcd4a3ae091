"""Attention in the manner of NSA: compressed blocks, selected blocks and a window, mixed by learned gates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from bsbr.ops.routing import select_blocks
from bsbr.peers.settings import PeerConfig, Shape
from bsbr.peers.window import window_attention

_ELEMENTS = 1 << 26
"""Scores held at once while blocks are selected."""


@dataclass(frozen=True, kw_only=True)
class NSAConfig(PeerConfig):
    """Compressed, selected and window attention with learned gates.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> NSAConfig(block_size=32, top_k=8).window
        512
    """

    mixer: ClassVar[str] = "nsa"

    block_size: int = 64
    """Tokens of a block, which is compressed as a whole and selected as a whole."""

    top_k: int = 16
    """Past blocks that the heads of a key head select together; the own block is read besides."""

    window: int = 512
    """Keys that the window reads, the query's own included."""

    seed: int = 0
    """Chooses the random gates that no pretrained model has."""

    def __post_init__(self) -> None:
        self._require(block_size=1, top_k=1, window=1, seed=0)


def nsa_weights(settings: NSAConfig, shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the first values of what a layer learns beside its q, k, v and output projections.

    Args:
        settings: the config.
        shape: the sizes of the attention.
        generator: of random numbers, on the CPU.
    Returns:
        "gate", a projection to three gates a head; "pool_k" and "pool_v", weights of a block's tokens for each channel
        of its compressed key and value, [H, block_size, D], at first their mean.

    Example:
        >>> weights = nsa_weights(NSAConfig(block_size=4), Shape(16, 4, 2, 8), torch.Generator().manual_seed(0))
        >>> {name: tuple(x.shape) for name, x in weights.items()}
        {'gate': (12, 16), 'pool_k': (2, 4, 8), 'pool_v': (2, 4, 8)}
    """
    gate = (torch.rand(3 * shape.heads, shape.hidden_size, generator=generator) * 2 - 1) * shape.hidden_size**-0.5
    mean = torch.full((shape.key_heads, settings.block_size, shape.width), 1 / settings.block_size)
    return {"gate": gate, "pool_k": mean, "pool_v": mean.clone()}


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    weights: Mapping[str, Tensor],
    settings: NSAConfig,
    *,
    scale: float | None = None,
    q_start: int = 0,
    lengths: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Add three attentions, each times its gate sigmoid(W x), x the hidden state.

    Source: Yuan et al., "Native Sparse Attention" (arXiv 2502.11089), simplified as told below.

    1. Compressed: softmax attention over one key and value for each past block, weighted sums of its tokens with
       learned weights for each channel.
    2. Selected: the own block and the `top_k` past blocks of largest compressed attention, summed over the query heads
       that share a key head, are read exactly. The choice has no gradient.
    3. Window: the latest keys.

    A block is past when it ends before the query's own block. Other than in the paper, blocks are compressed without
    overlap and are the unit of selection too; keys and values are compressed by a linear map, not by an MLP; the three
    branches share keys and values; the first block and the two latest are not selected in any case.

    Args:
        q: queries, [B, Tq, HQ, D]; query i stands at position q_start + i.
        k: keys, [B, T, H, D]; v: values, [B, T, H, D].
        hidden: hidden states of the queries, [B, Tq, hidden].
        weights: as from `nsa_weights`.
        settings: the config.
        scale, q_start, lengths, dropout_p: as for `bsbr.ops.bsbr_attention`.
    Returns:
        o, [B, Tq, HQ, D].

    Example:
        >>> settings, shape = NSAConfig(block_size=4, top_k=1, window=3), Shape(16, 4, 2, 8)
        >>> weights = nsa_weights(settings, shape, torch.Generator().manual_seed(0))
        >>> q, kv = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8)
        >>> nsa_attention(q, kv, kv, torch.randn(1, 9, 16), weights, settings).shape
        torch.Size([1, 9, 4, 8])
    """
    size, scale = settings.block_size, q.shape[-1] ** -0.5 if scale is None else scale
    gates = F.linear(hidden, weights["gate"].to(hidden.dtype)).sigmoid().unflatten(-1, (-1, 3)).to(q.dtype)
    short_k, short_v = (compress(x, weights[f"pool_{name}"]) for name, x in (("k", k), ("v", v)))
    branches = [
        _attend_compressed(q, short_k, short_v, size, scale, q_start, dropout_p),
        bsbr_attention(
            q, k, v, BSBRConfig(block_size=size, top_k=settings.top_k, far="drop", dense_below=0), scale=scale,
            q_start=q_start, lengths=lengths, dropout_p=dropout_p,
            block_indices=_selected(q, short_k, settings, scale, q_start),
        ),
        window_attention(q, k, v, window=settings.window, scale=scale, q_start=q_start, dropout_p=dropout_p),
    ]  # fmt: skip
    return torch.einsum("bthdn,bthn->bthd", torch.stack(branches, -1), gates)  # type: ignore[arg-type]


def compress(x: Tensor, weights: Tensor) -> Tensor:
    """Make one key or value of each whole block.

    Args:
        x: [B, T, H, D].
        weights: [H, block_size, D].
    Returns:
        [B, T // block_size, H, D]; tokens after the last whole block are left out.

    Example:
        >>> compress(torch.ones(1, 9, 2, 3), torch.full((2, 4, 3), 0.25)).shape
        torch.Size([1, 2, 2, 3])
    """
    size = weights.shape[1]
    blocks = x[:, : x.shape[1] // size * size].unflatten(1, (x.shape[1] // size, size))
    return torch.einsum("bnshd,hsd->bnhd", blocks, weights.to(x.dtype))


def _attend_compressed(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, q_start: int, dropout_p: float
) -> Tensor:
    """Attend to the compressed past blocks; 0 in the first block, which has none."""
    nothing = min(max(block_size - q_start, 0), q.shape[1])
    early, late = q[:, :nothing], q[:, nothing:]
    if not late.shape[1]:
        return torch.zeros_like(q)
    position = torch.arange(q_start + nothing, q_start + q.shape[1], device=q.device)
    mask = torch.arange(k.shape[1], device=q.device) < position[:, None] // block_size
    late = late.transpose(1, 2)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    o = F.scaled_dot_product_attention(late, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return torch.cat([torch.zeros_like(early), o.transpose(1, 2)], 1)


@torch.no_grad()
def _selected(q: Tensor, k: Tensor, settings: NSAConfig, scale: float, q_start: int) -> Tensor:
    """The past blocks of largest compressed attention, [B, Tq, HQ, top_k], ascending, -1 where fewer are past."""
    rows, queries, heads, _ = q.shape
    top_k, past = settings.top_k, torch.arange(q_start, q_start + queries, device=q.device) // settings.block_size
    chosen = torch.arange(top_k, device=q.device).expand(queries, -1)
    chosen = chosen.masked_fill(chosen >= past[:, None], -1)[None, :, None].repeat(rows, 1, heads, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).transpose(1, 2).flatten(0, 1)[:, None] * scale  # [B * H, 1, N, D]
    for start, stop in _pieces((top_k + 1) * settings.block_size - q_start, queries, rows * heads * k.shape[1]):
        part = q[:, start:stop].to(wide).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
        hidden = torch.arange(k.shape[1], device=q.device)[:, None] >= past[start:stop]  # [N, S]
        scores = (keys @ part.mT).masked_fill(hidden, -torch.inf)  # [B * H, G, N, S]
        shared = scores.softmax(2).sum(1, keepdim=True).masked_fill(hidden, -torch.inf)
        index = select_blocks(shared, top_k, "head").sort(2).values  # [B * H, 1, top_k, S]
        index = index.unflatten(0, (rows, -1)).permute(0, 4, 1, 2, 3).repeat_interleave(heads // k.shape[2], 3)
        chosen[:, start:stop] = index.flatten(2, 3)
    return chosen


def _pieces(first: int, queries: int, scores: int) -> Iterator[tuple[int, int]]:
    """Runs of the queries from number `first` on, of so many scores each that memory is bounded."""
    step = max(1, _ELEMENTS // max(1, scores))
    for start in range(max(0, first), queries, step):
        yield start, min(start + step, queries)
