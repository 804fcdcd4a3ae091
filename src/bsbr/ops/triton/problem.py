"""Sizes of one call, and whether the kernels can do it."""

import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.schedule import dense_until

_WORKSPACE = 1 << 31
"""Bytes of partial outputs held at once."""

_BLOCK_BYTES = 1 << 16
"""Largest block of keys: it has to fit into shared memory beside its values and a tile of queries."""

_MOST_COLUMNS = 32
"""New tokens of the query heads of a key head that one program of a decoding step holds."""

_MOST_BLOCKS, _MOST_DECODED = 128, 32
"""Most blocks that a query reads: the backward pass, and a decoding step, are written out for each."""

_MOST_PART_BYTES = 1 << 33
"""Partial outputs of a key head, held at once, if it reads more than 32 blocks; if fewer it is always taken."""

_INSTALLED = importlib.util.find_spec("triton") is not None
"""Looked up once: `torch.compile` traces calls, and cannot trace this one."""


class Problem(NamedTuple):
    """What one call computes, apart from tensors; `sparse` queries are those not read densely."""

    config: BSBRConfig
    scale: float
    q_start: int
    num_queries: int
    group: int
    """Query heads of a key head."""
    most_rows: int
    """Largest tile of queries: products in float32 and wide heads leave room for fewer."""
    short_scores: bool
    """Scores of past blocks are kept in 16 bits (`bsbr.ops.triton.short_scores`), as for 16-bit input."""

    @property
    def stop(self) -> int:
        """Position after the last query."""
        return self.q_start + self.num_queries

    @property
    def sparse_start(self) -> int:
        """Position of the first sparse query."""
        return min(self.stop, max(self.q_start, dense_until(self.config)))

    @property
    def num_sparse(self) -> int:
        """Sparse queries."""
        return self.stop - self.sparse_start

    @property
    def gaps(self) -> bool:
        """Key heads read different numbers of blocks, `config.top_k` at most: a chosen block of -1 is none."""
        return self.config.top_k_per_head is not None

    @property
    def num_dense(self) -> int:
        """Queries that read their whole past."""
        return self.sparse_start - self.q_start

    @property
    def per_block(self) -> int:
        """Retrieval blocks in a local block."""
        return self.config.block_size // self.config.unit

    @property
    def num_blocks(self) -> int:
        """Retrieval blocks that are past for the last query."""
        return (self.stop - 1) // self.config.block_size * self.per_block

    @property
    def gradient_rows(self) -> int:
        """Largest tile of queries in the backward pass, which holds more of everything."""
        return min(self.most_rows, 64)

    @property
    def tile_rows(self) -> int:
        """Queries of a tile: a power of two that divides the local block, so that a tile has one past."""
        return min(self.most_rows, self.config.block_size & -self.config.block_size)

    @property
    def score_scales(self) -> tuple[float, float]:
        """Factors that turn q.k and (q*q).var / 2 into powers of two."""
        return self.scale * math.log2(math.e), self.scale**2 / 2 * math.log2(math.e)

    def heads_at_once(self, num_heads: int, part_bytes: int) -> int:
        """Key heads of all rows that are worked on together, so that partial results stay within the workspace."""
        parts = self.num_sparse * self.group * self.parts
        most = max(1, min(num_heads, _WORKSPACE // (parts * part_bytes)))
        return -(-num_heads // -(-num_heads // most))  # as even as the number of rounds allows

    @property
    def parts(self) -> int:
        """Partial results of a query: each retrieved block, and local and far field together."""
        return self.config.top_k + 1


def make_problem(q: Tensor, k: Tensor, config: BSBRConfig, scale: float, q_start: int) -> Problem:
    """Gather the sizes of a call of `bsbr_attention`."""
    most_rows = 32 if q.element_size() > 2 else 64
    return Problem(config, scale, q_start, q.shape[1], q.shape[2] // k.shape[2], most_rows, q.element_size() == 2)


def why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, config: BSBRConfig, q_start: int = 0, dropout_p: float = 0.0
) -> str | None:
    """Say what keeps the kernels from computing a call.

    Args:
        q, k, v: as given to `bsbr_attention`.
        config: the settings.
        q_start: position of the first query.
        dropout_p: dropout of the weights.
    Returns:
        The obstacle in a few words, or None.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 9, 2, 64)
        >>> why_not_triton(x, x, x, BSBRConfig())
        'tensors on cpu'
    """
    most = config.top_k if config.top_k_per_head is None else config.max_top_k
    block_bytes = config.unit * (1 << (q.shape[3] - 1).bit_length()) * q.element_size()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # triton's own switch for debugging without a GPU
    obstacles = {
        f"tensors on {q.device.type}": not (q.is_cuda or interpreted),
        "triton is not installed": not _INSTALLED,
        "no queries": q.numel() == 0,
        f"{q.dtype} input": q.dtype not in (torch.float32, torch.bfloat16, torch.float16),
        f"head width {q.shape[3]}": q.shape[3] % 8 != 0 or not 16 <= q.shape[3] <= 256,
        f"values of width {v.shape[3]} beside keys of {k.shape[3]}": v.shape[3] != k.shape[3],
        f'state="{config.state}"': config.state not in ("global", "none"),
        'selection="group"': config.selection == "group" and q.shape[2] != k.shape[2],
        f"block_size {config.block_size}": config.block_size % 16 != 0,
        f"retrieval_block_size {config.unit}": config.unit not in (16, 32, 64, 128, 256),
        f"blocks of {config.unit} keys of width {q.shape[3]} in {q.dtype}": block_bytes > _BLOCK_BYTES,
        f"top_k {most}": most > _MOST_BLOCKS,
        f"so many queries that read {most} blocks each": most > 32 and _part_bytes(q, k, most) > _MOST_PART_BYTES,
        "dropout": dropout_p > 0,
        "late queries that read their whole past": 0 < q_start < dense_until(config),
    }
    return next((obstacle for obstacle, applies in obstacles.items() if applies), None)


def _part_bytes(q: Tensor, k: Tensor, most: int) -> int:
    """Bytes of the partial outputs of one key head, of a call whose heads read up to `most` blocks."""
    parts = 1 + (1 << (most - 1).bit_length())
    return q.shape[1] * (q.shape[2] // k.shape[2]) * parts * q.shape[3] * q.element_size()


def most_decoded(q: Tensor, k: Tensor) -> int:
    """Return how many new tokens of a row one step of decoding kernels takes.

    Args:
        q: [R, S, HQ, D]; k: [R, S, H, D].
    Returns:
        The number; 0 where one token has more query heads a key head than a program holds.

    Example:
        >>> most_decoded(torch.zeros(1, 1, 8, 64), torch.zeros(1, 1, 2, 64))
        8
    """
    return _MOST_COLUMNS // (q.shape[2] // k.shape[2])


def why_not_decode(q: Tensor, k: Tensor, v: Tensor, config: BSBRConfig) -> str | None:
    """Say what keeps the kernels from decoding new tokens.

    Args:
        q: [R, S, HQ, D]; k, v: [R, S, H, D], all within one local block of each row.
        config: the settings.
    Returns:
        The obstacle in a few words, or None.

    Example:
        >>> x = torch.zeros(1, 40, 2, 64)
        >>> why_not_decode(x, x, x, BSBRConfig())
        '40 columns'
    """
    columns = q.shape[1] * (q.shape[2] // k.shape[2])
    if q.shape[1] > most_decoded(q, k):
        return f"{columns} columns"
    if config.far == "drop" and not config.top_k:
        return "nothing but the own block"
    if config.selection == "recent":
        return 'selection="recent"'
    if config.max_top_k > _MOST_DECODED:
        return f"top_k {config.max_top_k}"
    return why_not_triton(q, k, v, config)
