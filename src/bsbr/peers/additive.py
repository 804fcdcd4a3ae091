"""The original, additive form of BSBR with learned retrieval, its causality repaired.

It is what the published evaluation measured; it is here to be compared with, not to be used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bsbr.peers.local import local_attention
from bsbr.peers.settings import PeerConfig


@dataclass(frozen=True, kw_only=True)
class AdditiveConfig(PeerConfig):
    """The original additive BSBR: local softmax attention plus q times a retrieved state, not normalised together.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> AdditiveConfig(block_size=64).compression is None
        True
    """

    mixer: ClassVar[str] = "additive"

    block_size: int = 128
    """Tokens of a block."""

    compression: int | None = None
    """States are kept in hidden_size // compression numbers by a learned projection; None keeps them whole."""

    seed: int = 0
    """Chooses the random projections that no pretrained model has."""

    def __post_init__(self) -> None:
        self._require(block_size=1, seed=0)
        if self.compression is not None:
            self._require(compression=1)


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_meta: Tensor,
    k_meta: Tensor,
    *,
    block_size: int = 128,
    scale: float | None = None,
    compress: tuple[Tensor, Tensor] | None = None,
    decompress: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Add to local softmax attention what the query reads of a retrieved state.

    softmax(Q K^T M_in) V + Q softmax(R H^T M_out) F, M_in the own block and M_out the blocks before it.

    Source: the first public implementation of BSBR (github.com/JacobFV/bsbr, `BSBRAttention`), with its masks
    turned round so that no token sees a later one.

    1. Local: softmax attention inside the own block, causal.
    2. F of a block is its plain sum K^T V, optionally flattened and compressed.
    3. Block c retrieves softmax over b < c of R_c.H_b / sqrt(D) of the states F_b. R_c is made of the last token of
       block c - 1, known when block c starts; the original took block c's own last token, which leaks.
    4. The retrieved state is multiplied by the unscaled query and added. Block 0 retrieves nothing.

    Args:
        q: queries, [B, T, HQ, D].
        k: keys, [B, T, H, D]; H divides HQ.
        v: values, [B, T, H, Dv].
        q_meta: R, one retriever for each block but the first, [B, N - 1, HQ, D], N = ceil(T / block_size).
        k_meta: H, one hash for each block but the last, [B, N - 1, HQ, D].
        block_size: tokens of a block.
        scale: factor on q.k in the local softmax; None means D ** -0.5.
        compress: weight [C, D * Dv] and bias [C] applied to a flattened state; needs `decompress`.
        decompress: weight [D * Dv, C] and bias [D * Dv] applied to what was retrieved.
        dropout_p: probability of dropping an attention weight, local or retrieval.
    Returns:
        o, [B, T, HQ, Dv].
    Raises:
        ValueError: the number of retrievers or hashes is not N - 1.

    Example:
        >>> x, meta = torch.randn(1, 9, 2, 4), torch.randn(1, 2, 2, 4)
        >>> additive_attention(x, x, x, meta, meta, block_size=4).shape
        torch.Size([1, 9, 2, 4])
    """
    o = local_attention(q, k, v, block_size=block_size, scale=scale, dropout_p=dropout_p)
    past = max(0, k.shape[1] - 1) // block_size  # blocks that a later block may read
    if q_meta.shape[1] != past or k_meta.shape[1] != past:
        raise ValueError(
            f"{k.shape[1]} tokens in blocks of {block_size} need {past} retrievers and hashes, "
            f"got {q_meta.shape[1]} and {k_meta.shape[1]}"
        )
    if not past:
        return o
    complete = slice(0, past * block_size)
    blocked_k, blocked_v = (x[:, complete].unflatten(1, (past, block_size)) for x in (k, v))
    states = torch.einsum("bnshd,bnshe->bnhde", blocked_k, blocked_v)  # [B, N - 1, H, D, Dv]
    widths = states.shape[3:]
    states = states.flatten(3)
    if compress is not None:
        states = F.linear(states, *compress)
    states = states.repeat_interleave(q.shape[2] // k.shape[2], 2)  # [B, N - 1, HQ, D * Dv]
    scores = torch.einsum("bchd,bnhd->bhcn", q_meta, k_meta) * q.shape[3] ** -0.5
    later = torch.ones(past, past, dtype=torch.bool, device=q.device).triu_(1)  # retriever 0 belongs to block 1
    weights = F.dropout(scores.masked_fill(later, -torch.inf).softmax(-1), dropout_p)
    retrieved = torch.einsum("bhcn,bnhf->bchf", weights, states)
    if decompress is not None:
        retrieved = F.linear(retrieved, *decompress)
    retrieved = retrieved.unflatten(3, widths)  # [B, N - 1, HQ, D, Dv]
    rest = q[:, block_size:]
    rest = F.pad(rest, (0, 0, 0, 0, 0, past * block_size - rest.shape[1])).unflatten(1, (past, block_size))
    far = torch.einsum("bcshd,bchde->bcshe", rest, retrieved).flatten(1, 2)
    return torch.cat([o[:, :block_size], o[:, block_size:] + far[:, : o.shape[1] - block_size]], 1)
