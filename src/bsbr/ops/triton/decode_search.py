"""The search for the best blocks of a decoded token, and masses as integers in their order."""

import triton
import triton.language as tl

_ALWAYS = tl.constexpr(2**63 - 1)
"""Above every `ordered` number."""

_LEAST = tl.constexpr(-(2**31))
"""Below the bits of every score."""

_NOWHERE = tl.constexpr(1 << 24)
"""A tile after all tiles."""


@triton.jit
def bits_of(score):
    """Integers in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
def _best(bits, places, COUNT: tl.constexpr, CP: tl.constexpr, WIDE: tl.constexpr):
    """Where the COUNT largest of some numbers [CP, WIDE] are, best first, of equal ones the lower place first.

    Returns places [CP, WIDE], and the last of them and the next best as `ordered` numbers, [CP, 1].
    """
    lane = tl.arange(0, WIDE)[None, :]
    picked = tl.zeros([CP, WIDE], tl.int32)
    last = tl.full([CP, 1], _ALWAYS, tl.int64)
    rest = last
    for j in tl.static_range(COUNT + 1):
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
            left += (tl.where(places[r] == place, _LEAST, bits[r]),)
        bits = left
        last, rest = rest, ordered(best, place)
        if j < COUNT:
            picked = tl.where(lane == j, tl.where(best == _LEAST, _NOWHERE, place), picked)
    return picked, last, rest


@triton.jit
def select(
    mass, peaks, chosen, bounds, z, num, room, TOP_K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    BN: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """The best blocks of the columns of a key head, and the bounds of what is left to the far field.

    The best TOP_K blocks lie in the TOP_K tiles of BN blocks whose largest mass is largest.
    """
    # numbers of a column come in a few rows, as many as a warp has threads: it finds their best without other warps,
    # and for 32-bit integers by one instruction
    c = tl.arange(0, CP)[:, None]
    column, real = z.to(tl.int64) * C + tl.minimum(c, C - 1), c < C
    WIDE: tl.constexpr = max(32, KP)
    lane, bits, places = tl.arange(0, WIDE)[None, :], (), ()
    for r in tl.static_range(TP // WIDE):
        t = r * WIDE + lane
        own = bits_of(tl.load(peaks + column * TP + t, mask=t < tl.cdiv(num, BN), other=0.0))
        bits += (tl.where(t < tl.cdiv(num, BN), own, _LEAST),)
        places += (t,)
    picked, last, rest = _best(bits, places, TOP_K, CP, WIDE)
    if TOP_K > 0:
        tl.store(chosen + column * TOP_K + lane, picked, mask=real & (lane < TOP_K))
        tl.debug_barrier()
        ROW: tl.constexpr = 32 if KP <= 8 else KP * BN  # many rows take the compiler minutes
        lane, bits, places = tl.arange(0, ROW)[None, :], (), ()
        for r in tl.static_range((TOP_K * BN + ROW - 1) // ROW):
            i = r * ROW + lane
            tile = tl.load(chosen + column * TOP_K + i // BN, mask=i < TOP_K * BN, other=_NOWHERE)
            n = tile * BN + i % BN
            own = bits_of(tl.load(mass + column * room + n, mask=n < num, other=0.0))
            bits += (tl.where(n < num, own, _LEAST),)
            places += (n,)
        tl.debug_barrier()
        picked, last, others = _best(bits, places, TOP_K, CP, ROW)
        tl.store(chosen + column * TOP_K + lane, picked, mask=real & (lane < TOP_K))
        rest = tl.maximum(rest, others)
    tl.store(bounds + column * 2, last, mask=real)
    tl.store(bounds + column * 2 + 1, rest, mask=real)
