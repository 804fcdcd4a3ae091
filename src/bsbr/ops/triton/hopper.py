"""Which calls can use what Hopper GPUs alone have: copies of tiles by descriptors (TMA), and products in Gluon."""

import functools

import torch
import triton
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import SHARE

_GLUON = ("3.6", "3.7")
"""Versions of Triton whose Gluon, which is experimental, the kernels were compiled with."""

_LEAST_BLOCKS = 256
"""With fewer past blocks there is little to gain (255 are scored in 0.3 of 4.1 ms), and each launch makes its
descriptors anew."""


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether tensors there are on a GPU of compute capability 9."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def copies_tiles(problem: Problem, q: Tensor) -> bool:
    """Whether descriptors bring tiles of summaries: of 16 bits, in the widths that were run, for a long past."""
    fits = q.element_size() == 2 and q.shape[3] in (64, 128) and problem.tile_rows == 64
    return fits and problem.num_blocks >= _LEAST_BLOCKS and is_hopper(q.device)


def scores_in_gluon(problem: Problem, q: Tensor) -> bool:
    """Whether `bsbr.ops.triton.scores_hopper` scores the queries [B, Tq, HQ, D]."""
    fits = q.dtype == torch.bfloat16 and q.shape[3] == 128 and problem.group % SHARE == 0
    return fits and copies_tiles(problem, q) and triton.__version__.startswith(_GLUON)
