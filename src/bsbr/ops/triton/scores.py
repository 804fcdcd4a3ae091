"""Estimated masses of a tile of queries and a tile of blocks, as every kernel of the past computes them.

Scores leave out what all blocks of a query share (log n, the bias, and the product with the mean key of block 0), which
no choice depends on. So a large common part of all keys costs the 16-bit products no digits.
"""

import triton
import triton.language as tl


@triton.jit
def load_blocks(x, from_block, stop, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """A tile of summaries, [DP, BN]."""
    n, d = from_block + tl.arange(0, BN), tl.arange(0, DP)
    return tl.load(x + n[None, :] * D + d[:, None], mask=(d < D)[:, None] & (n < stop)[None, :], other=0.0)


@triton.jit
def score_factors(calibration, head, mean_scale, var_scale):
    """Factor of all scores of a head, and of the squared queries in front of it, so that both products share a sum."""
    mean_factor = mean_scale * tl.load(calibration + head * 5 + 1)
    mean_factor = tl.where(tl.abs(mean_factor) < 1e-20, 1e-20, mean_factor)
    return mean_factor, var_scale * tl.load(calibration + head * 5 + 2) / mean_factor


@triton.jit
def tile_scores(q, square, centred_k, var_k, mean_factor, MOMENTS: tl.constexpr):
    """Scores of a tile of queries for a tile of summaries; `square` holds the factor of the variance."""
    scores = tl.dot(q, centred_k, input_precision="ieee")
    if MOMENTS:
        scores = tl.dot(square, var_k, scores, input_precision="ieee")
    return scores * mean_factor


@triton.jit
def load_chosen(chosen, valid, TOP_K: tl.constexpr):
    """The chosen blocks of a tile of queries, as a tuple."""
    blocks = ()
    for j in tl.static_range(TOP_K):
        blocks += (tl.load(chosen + j, mask=valid, other=-1),)
    return blocks


@triton.jit
def strike(scores, from_block, stop, blocks, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Scores with -inf from `stop` on and where a query reads the block exactly; one bit a block, BN is 32 or 64."""
    column = tl.arange(0, BN)
    left = stop - from_block
    if TOP_K == 0:
        scores = tl.where((column < left)[None, :], scores, float("-inf"))
    else:
        low = tl.zeros_like(blocks[0]) + tl.where(left < 32, -1 << (tl.maximum(left, 0) & 31), 0)
        high = tl.zeros_like(low) + tl.where(left < 64, -1 << (tl.maximum(left - 32, 0) & 31), 0)
        for j in tl.static_range(TOP_K):
            offset = blocks[j] - from_block
            bit = 1 << (offset & 31)
            low |= tl.where(offset >> 5 == 0, bit, 0)
            if BN > 32:
                high |= tl.where(offset >> 5 == 1, bit, 0)
        read = low[:, None]
        if BN > 32:
            read = tl.where((column < 32)[None, :], read, high[:, None])
        scores = tl.where((read & (1 << (column & 31))[None, :]) == 0, scores, float("-inf"))
    return scores
