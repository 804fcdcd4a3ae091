"""The kernels of `bsbr.ops.triton.decode`; the first axis of a grid counts rows and key heads."""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-(2**63) + 1)
_ALWAYS = tl.constexpr(2**63 - 1)


@triton.jit
def _whose(z, heads, rows):
    """Row of the cache, and row and key head as one number."""
    row = tl.load(rows + z // heads).to(tl.int64)
    return row, row * heads + z % heads


@triton.jit
def _ordered(score, n):
    """Integers in the order of the scores, of equal ones the lower block first: no two of a column are equal."""
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - n).to(tl.int64)


@triton.jit
def _score_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["heads", "room"])
def _score(
    q, k, v, own_k, own_v, meta, states, calibration, rows, lengths, mass, read,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, room, mean_scale, var_scale, scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    row, at = _whose(z, heads, rows)
    i, head = (z // heads).to(tl.int64), z % heads
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    num, inside = block * (B // UNIT), d < D
    WIDE: tl.constexpr = 2 * D if MOMENTS else D
    if task < S * G:
        if task == 0:
            for s in tl.static_range(S):
                to = (at * (2 * B) + block % 2 * B + place % B + s) * D + d
                new_k = tl.load(k + i * kb + s * kt + head * kh + d, mask=inside)
                new_v = tl.load(v + i * vb + s * vt + head * vh + d, mask=inside)
                tl.store(own_k + to, new_k, mask=inside)
                tl.store(own_v + to, new_v, mask=inside)
        if STATE:
            own_q = q + i * qb + task // G * qt + (head * G + task % G) * qh
            acc = tl.zeros([DP], tl.float32)
            CHUNK: tl.constexpr = DP if DP < 64 else 64
            for start in tl.static_range(0, DP, CHUNK):
                e = start + tl.arange(0, CHUNK)
                query = tl.load(own_q + e, mask=e < D, other=0.0).to(tl.float32)
                state = tl.load(
                    states + (at * 2 + block % 2) * D * D + e[:, None] * D + d[None, :],
                    mask=(e < D)[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                acc += tl.sum(query[:, None] * state, 0)
            acc *= scale * tl.load(calibration + (head * G + task % G) * 5 + 4) / num
            tl.store(read + (z.to(tl.int64) * (S * G) + task) * D + d, acc, mask=inside)
    else:
        n = (task - S * G) * BN + tl.arange(0, BN)
        if (task - S * G) * BN < num:
            held = (n < num)[:, None] & inside[None, :]
            from_meta = meta + (at * room + n)[:, None] * WIDE + d[None, :]
            mean = tl.load(from_meta, mask=held, other=0.0)
            if MOMENTS:
                var = tl.load(from_meta + D, mask=held, other=0.0)
            for c in tl.static_range(S * G):
                scalars = calibration + (head * G + c % G) * 5
                own_q = q + i * qb + c // G * qt + (head * G + c % G) * qh
                query = tl.load(own_q + d, mask=inside, other=0.0).to(tl.float32)
                terms = mean * (query * (mean_scale * tl.load(scalars + 1)))[None, :]
                if MOMENTS:
                    terms += var * (query * query * (var_scale * tl.load(scalars + 2)))[None, :]
                score = tl.sum(terms, 1) + (tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0))
                tl.store(mass + (z.to(tl.int64) * (S * G) + c) * room + n, score, mask=n < num)


@triton.jit(do_not_specialize=["heads", "room"])
def _select(
    mass, chosen, bounds, rows, lengths, heads, room, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64)
    row, _ = _whose(tl.program_id(0) // C, heads, rows)
    num = tl.load(lengths + row) // B * (B // UNIT)
    bound = tl.full([], _ALWAYS, tl.int64)
    tl.store(bounds + column * 2, bound)
    for j in tl.static_range(TOP_K + 1):  # each time the best after the one before
        best = tl.full([], _NEVER, tl.int64)
        for start in range(0, num, BN):
            n = start + tl.arange(0, BN)
            key = _ordered(tl.load(mass + column * room + n, mask=n < num, other=0.0), n)
            best = tl.maximum(best, tl.max(tl.where((n < num) & (key < bound), key, _NEVER), 0))
        bound = best
        if j < TOP_K:
            tl.store(chosen + column * TOP_K + j, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32))
        if j == TOP_K - 1:
            tl.store(bounds + column * 2, bound)
    tl.store(bounds + column * 2 + 1, bound)


@triton.jit
def _read_exactly(k, v, query, count, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Attention of one query to the first `count` of UNIT keys."""
    n, d = tl.arange(0, UNIT), tl.arange(0, DP)
    held = (n < count)[:, None] & (d < D)[None, :]
    keys = tl.load(k + n[:, None] * D + d[None, :], mask=held, other=0.0)
    values = tl.load(v + n[:, None] * D + d[None, :], mask=held, other=0.0)
    scores = tl.where(n < count, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
    top = tl.maximum(tl.max(scores, 0), -1e38)
    weights = tl.exp2(scores - top)
    total = tl.sum(weights, 0)
    o = tl.sum(weights[:, None] * values.to(tl.float32), 0) / tl.maximum(total, 1e-38)
    return o, top + tl.log2(total)


@triton.jit(do_not_specialize=["heads", "past_room", "room"])
def _attend(
    q, own_k, own_v, past_k, past_v, mean_v, mass, chosen, bounds, rows, lengths, part_o, part_lse,
    qb, qt, qh, heads, past_room, room, score_scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, FAR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    EXACT: tl.constexpr = TOP_K + B // UNIT
    C: tl.constexpr = S * G
    row, at = _whose(z, heads, rows)
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    inside = d < D
    first_column = z.to(tl.int64) * C
    if task < C * EXACT:
        c, j = task // EXACT, task % EXACT
        own_q = q + (z // heads).to(tl.int64) * qb + c // G * qt + (z % heads * G + c % G) * qh
        query = tl.load(own_q + d, mask=inside, other=0.0).to(tl.float32) * score_scale
        to = (first_column + c) * (EXACT + FAR) + j
        if j < TOP_K:
            start = (at * past_room + tl.load(chosen + (first_column + c) * TOP_K + j) * UNIT) * D
            o, lse = _read_exactly(past_k + start, past_v + start, query, UNIT, UNIT, D, DP)
            tl.store(part_o + to * D + d, o, mask=inside)
            tl.store(part_lse + to, lse)
        else:
            first = (j - TOP_K) * UNIT
            start = (at * (2 * B) + block % 2 * B + first) * D
            seen = place % B + c // G + 1 - first
            o, lse = _read_exactly(own_k + start, own_v + start, query, seen, UNIT, D, DP)
            tl.store(part_o + to * D + d, o, mask=inside)
            tl.store(part_lse + to, lse)
    elif FAR > 0:
        num = block * (B // UNIT)
        share = tl.cdiv(tl.cdiv(num, BN), FAR) * BN
        begin = (task - C * EXACT) * share
        stop = tl.minimum(begin + share, num)
        total, acc = (), ()
        for _ in tl.static_range(C):
            total += (0.0 * begin,)
            acc += (tl.zeros([DP], tl.float32),)
        for start in range(begin, stop, BN):
            n = start + tl.arange(0, BN)
            from_mean = mean_v + (at * room + n)[:, None] * D + d[None, :]
            values = tl.load(from_mean, mask=(n < stop)[:, None] & inside[None, :], other=0.0)
            new_total, new_acc = (), ()
            for c in tl.static_range(C):
                score = tl.load(mass + (first_column + c) * room + n, mask=n < stop, other=0.0)
                left = (n < stop) & (_ordered(score, n) < tl.load(bounds + (first_column + c) * 2))
                # the largest mass that is left is known, so weights need no other scale
                top = _score_of(tl.load(bounds + (first_column + c) * 2 + 1))
                weights = tl.where(left, tl.exp2(score - top), 0.0)
                new_total += (total[c] + tl.sum(weights, 0),)
                new_acc += (acc[c] + tl.sum(weights[:, None] * values, 0),)
            total, acc = new_total, new_acc
        for c in tl.static_range(C):
            to = (first_column + c) * (EXACT + FAR) + EXACT + task - C * EXACT
            top = _score_of(tl.load(bounds + (first_column + c) * 2 + 1))
            lse = tl.where(total[c] > 0, top + tl.log2(total[c]), float("-inf"))
            tl.store(part_lse + to, lse)
            tl.store(part_o + to * D + d, acc[c] / tl.maximum(total[c], 1e-38), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _merge(
    part_o, part_lse, read, calibration, rows, lengths, o, heads, EXACT: tl.constexpr, FAR: tl.constexpr,
    PARTS: tl.constexpr, STATE: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0)
    z, c = column // (S * G), column % (S * G)
    row, _ = _whose(z, heads, rows)
    p, d = tl.arange(0, PARTS), tl.arange(0, DP)
    inside = d < D
    head = z % heads * G + c % G
    lse = tl.load(part_lse + column * (EXACT + FAR) + p, mask=p < EXACT + FAR, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    weights /= tl.sum(weights, 0)
    scaled = weights
    if FAR > 0:
        scaled = tl.where(p < EXACT, weights, weights * tl.load(calibration + head * 5 + 3))
    from_part = part_o + (column.to(tl.int64) * (EXACT + FAR) + p)[:, None] * D + d[None, :]
    parts = tl.load(from_part, mask=(p < EXACT + FAR)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(scaled[:, None] * parts, 0)
    if STATE:
        far_share = tl.sum(tl.where(p < EXACT, 0.0, weights), 0)
        result += far_share * tl.load(read + column.to(tl.int64) * D + d, mask=inside, other=0.0)
    to = ((z // heads * S + c // G) * (heads * G) + head).to(tl.int64) * D + d
    tl.store(o + to, result.to(o.dtype.element_ty), mask=inside)
    if (z % heads == 0) & (c == 0):  # nobody else reads lengths in this launch
        tl.store(lengths + row, tl.load(lengths + row) + S)
