"""The search for the best blocks of a decoded token, and masses as integers in their order."""

import triton
import triton.language as tl

from bsbr.ops.triton.scores import bits_of

_ALWAYS = tl.constexpr(2**63 - 1)
"""Above every `ordered` number."""

LEAST = tl.constexpr(-(2**31))
"""Below the bits of every score."""

_NOWHERE = tl.constexpr(1 << 24)
"""After all tiles and blocks: none."""


@triton.jit
def ordered(bits, n):
    """One number for both: higher scores first, of equal ones the lower block, so no two of a column are equal."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64)


@triton.jit
def score_of(key):
    """The score in an `ordered` number."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(bits, places, rounds, count, CP: tl.constexpr, WIDE: tl.constexpr):
    """Where the largest of some numbers, rows of [CP, WIDE], are, best first, of equal ones the lower first.

    One is found in a round, `count` at most. Returns places [CP, WIDE]; and the last of `count` and the next best as
    `ordered` numbers, [CP, 1], which takes count + 1 rounds.
    """
    rank = tl.arange(0, WIDE)[None, :]
    picked = tl.full([CP, WIDE], _NOWHERE, tl.int32)
    last = tl.full([CP, 1], _ALWAYS, tl.int64)
    rest = last
    for j in range(rounds):  # not written out: a GPU that has not run it lately has to load it first
        best = bits[0]
        for r in tl.static_range(1, len(bits)):
            best = tl.maximum(best, bits[r])
        best = tl.max(best, 1, keep_dims=True)
        place = tl.where(bits[0] == best, places[0], 0x7FFFFFFF)
        for r in tl.static_range(1, len(bits)):
            place = tl.minimum(place, tl.where(bits[r] == best, places[r], 0x7FFFFFFF))
        place = tl.min(place, 1, keep_dims=True)
        left = ()
        for r in tl.static_range(len(bits)):
            left += (tl.where(places[r] == place, LEAST, bits[r]),)
        bits = left
        # not by way of the other: the compiler takes what begins as the same value for what a loop leaves as it is
        rest = ordered(best, place)
        last = tl.where(j < count, rest, last)
        picked = tl.where((rank == j) & (j < count) & (best != LEAST), place, picked)
    return picked, last, rest


@triton.jit
def select(
    mass, peaks, column, num, tiles, room, rounds, count, TOP_K: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr,
    TP: tl.constexpr,
):  # fmt: skip
    """The best blocks of some columns [CP, 1], and the bounds of what is left to the far field.

    The best blocks, however many, lie in as many tiles of BN blocks, here 32, whose largest mass is largest. So for the
    best few as many rounds are enough, and for the bounds count + 1; TOP_K is the most that `count` is.

    Of the `tiles` whose peaks are read here, those after the past have LEAST.

    Returns their numbers, best first, [CP, BN], and the last of them and the next best as `ordered` numbers, which mean
    nothing after fewer rounds.
    """
    # numbers of a column come in rows of 32, as many as a warp has threads: it finds their best without other warps,
    # and for 32-bit integers by one instruction
    lane, bits, places = tl.arange(0, BN)[None, :], (), ()
    for r in tl.static_range(TP // BN):
        tile = r * BN + lane
        bits += (tl.load(peaks + column * TP + tile, mask=tile < tiles, other=LEAST),)
        places += (tl.zeros([CP, BN], tl.int32) + tile,)
    picked, last, rest = _best(bits, places, rounds, count, CP, BN)
    if TOP_K > 0:
        bits, places = (), ()
        for r in tl.static_range(TOP_K):
            n = tl.sum(tl.where(lane == r, picked, 0), 1, keep_dims=True) * BN + lane
            own = bits_of(tl.load(mass + column * room + n, mask=n < num, other=0.0))
            bits += (tl.where(n < num, own, LEAST),)
            places += (n,)
        picked, last, others = _best(bits, places, rounds, count, CP, BN)
        rest = tl.maximum(rest, others)
    return picked, last, rest
