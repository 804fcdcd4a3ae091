"""Scores of past blocks in 16 bits, as they are kept for 16-bit input.

A score is rounded to steps of 2**-11 (of powers of two), and what is kept is how many steps it is below the best of its
tile of blocks: exactly up to 2**15 steps, from there to 16 steps, and 557,040 steps (272 powers of two) at most.
Rounding comes first, so blocks of equal scores stay equal whatever tiles they are in. The range is wide, since a block
that outweighs its neighbours by far may be read exactly, and these then count among the others. A block that is left
and more than 272 powers of two below the best of its tile counts as 272 below: too much, where the best one's mass was
overestimated by about as much (logits of a block tens of nats apart, uncalibrated).
"""

import triton
import triton.language as tl

STEPS = tl.constexpr(2048.0)
"""Steps of a score for each power of two."""

LOWEST = tl.constexpr(557040.0)
"""Steps below the best of its tile that a block is at most; and those struck out."""

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: what this is added to is rounded to whole numbers."""

_WHOLE = tl.constexpr(8388608.0)
"""2**23: the last 16 bits of this plus a whole number below 65,536 are that number."""


@triton.jit
def encode(below):
    """Steps below the best of a tile as 16 bits; what is no number as LOWEST."""
    # as bits: there is an instruction for the least of three integers
    fine = (below + _WHOLE).to(tl.int32, bitcast=True)
    coarse = (below * (1 / 16) + (30720 + _WHOLE)).to(tl.int32, bitcast=True)
    return tl.minimum(tl.minimum(fine, coarse), 0x4B00FFFF).to(tl.int16)


@triton.jit
def _number(code):
    """_WHOLE plus the number that is written: n stands for n steps up to 2**15, for 16 n - 491,520 beyond."""
    return ((code.to(tl.int32) & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def steps_below(code):
    """Steps below the best of a tile."""
    number = _number(code) - _WHOLE
    return tl.maximum(number, 16 * number - 491520)


@triton.jit
def above(code, best):
    """Scores [M, N] where the tile's best is `best` [M], a whole number of steps; powers of two, no longer steps."""
    # 4096 is _WHOLE: it is taken off together with the best, both are whole steps, and no digit is lost
    fine = _number(code) * (-1 / STEPS) + (best + 4096.0)[:, None]
    return tl.minimum(fine, fine * 16 + (best * -15 + 240.0)[:, None])


@triton.jit
def most_of_eight(x):
    """The largest of every 8 in a row, [M, 8 N] -> [M, N], and no number if one of them is none."""
    for _ in tl.static_range(3):
        left, right = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    return x
