"""The kernels of `bsbr.ops.triton.decode`; the first axis of a grid counts rows and key heads."""

import triton
import triton.language as tl

from bsbr.ops.triton.decode_search import LEAST, ordered, score_of, select
from bsbr.ops.triton.scores import bits_of


@triton.jit
def _whose(z, heads, rows, EVERY: tl.constexpr):
    """Row of the cache, and row and key head as one number."""
    row = z // heads if EVERY else tl.load(rows + z // heads)
    row = row.to(tl.int64)
    return row, row * heads + z % heads


@triton.jit(do_not_specialize=["heads", "room", "mass_lines"])
def _score(
    q, k, v, own_k, own_v, meta, states, calibration, rows, lengths, mass, peaks, by_state,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, room, mass_lines, mean_scale, var_scale, scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, TP: tl.constexpr, SPAN: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    row, at = _whose(z, heads, rows, EVERY)
    i, head = (z // heads).to(tl.int64), (z % heads).to(tl.int64)
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    num, inside = block * (B // UNIT), d < D
    C: tl.constexpr = S * G
    WIDE: tl.constexpr = 2 * D if MOMENTS else D
    row_q = q + i * qb
    if task < C:
        if task == 0:
            for s in tl.static_range(S):
                to = (at * (2 * B) + block % 2 * B + place % B + s) * D + d
                new_k = tl.load(k + i * kb + s * kt + head * kh + d, mask=inside)
                new_v = tl.load(v + i * vb + s * vt + head * vh + d, mask=inside)
                tl.store(own_k + to, new_k, mask=inside)
                tl.store(own_v + to, new_v, mask=inside)
        if STATE:
            acc = tl.zeros([DP], tl.float32)
            CHUNK: tl.constexpr = DP if DP < 64 else 64
            for chunk in tl.static_range(0, DP, CHUNK):
                e = chunk + tl.arange(0, CHUNK)
                from_q = row_q + task // G * qt + (head * G + task % G) * qh
                part_q = tl.load(from_q + e, mask=e < D, other=0.0).to(tl.float32)
                state = tl.load(
                    states + (at * 2 + block % 2) * D * D + e[:, None] * D + d[None, :],
                    mask=(e < D)[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                acc += tl.sum(part_q[:, None] * state, 0)
            acc *= scale * tl.load(calibration + (head * G + task % G) * 5 + 4) / num
            tl.store(by_state + (z.to(tl.int64) * C + task) * D + d, acc, mask=inside)
    else:
        # all queries before the first store, which no load could pass
        by_mean, by_var, shift = (), (), ()
        for c in tl.static_range(C):
            scalars = calibration + (head * G + c % G) * 5
            from_q = row_q + c // G * qt + (head * G + c % G) * qh
            query = tl.load(from_q + d, mask=inside, other=0.0).to(tl.float32)
            by_mean += (query * (mean_scale * tl.load(scalars + 1)),)
            by_var += (query * query * (var_scale * tl.load(scalars + 2)),)
            shift += (tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0),)
        first = (task - C) * SPAN
        # with few columns no tile waits for the length: there is room for what may not be needed
        stop = tl.cdiv(num if SPAN > 1 else room, BN)
        for tile in tl.range(first, tl.minimum(first + SPAN, stop), num_stages=2 if SPAN > 1 else 1):
            n = tile * BN + tl.arange(0, BN)
            held = (n < room)[:, None] & inside[None, :]
            from_meta = meta + (at * room + n)[:, None] * WIDE + d[None, :]
            mean = tl.load(from_meta, mask=held, other=0.0)
            if MOMENTS:
                var = tl.load(from_meta + D, mask=held, other=0.0)
            for c in tl.static_range(C):
                terms = mean * by_mean[c][None, :]
                if MOMENTS:
                    terms += var * by_var[c][None, :]
                score = tl.sum(terms, 1) + shift[c]
                tl.store(mass + (z.to(tl.int64) * C + c) * (mass_lines * 32) + n, score, mask=n < num)
                peak = tl.max(tl.where(n < num, bits_of(score), LEAST), 0)
                tl.store(peaks + (z.to(tl.int64) * C + c) * TP + tile, peak)


@triton.jit(do_not_specialize=["heads", "mass_lines"])
def _select(
    mass, peaks, chosen, bounds, rows, lengths, heads, mass_lines, B: tl.constexpr, UNIT: tl.constexpr,
    TOP_K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(0)
    row, _ = _whose(z, heads, rows, EVERY)
    num = tl.load(lengths + row) // B * (B // UNIT)
    c, rank = tl.arange(0, CP)[:, None], tl.arange(0, BN)[None, :]
    column, real = z.to(tl.int64) * C + tl.minimum(c, C - 1), c < C
    picked, last, rest = select(mass, peaks, column, num, mass_lines * 32, TOP_K, CP, BN, TP)
    tl.store(chosen + column * TOP_K + rank, picked, mask=real & (rank < TOP_K))
    tl.store(bounds + column * 2, last, mask=real)
    tl.store(bounds + column * 2 + 1, rest, mask=real)


@triton.jit
def _read_rows(k, v, offset, held, query, top, total, acc, D: tl.constexpr, DP: tl.constexpr):
    """Take some keys and values, where they are `held`, into the softmax of one query."""
    d = tl.arange(0, DP)
    inside = held[:, None] & (d < D)[None, :]
    keys = tl.load(k + offset[:, None] + d[None, :], mask=inside, other=0.0)
    values = tl.load(v + offset[:, None] + d[None, :], mask=inside, other=0.0)
    scores = tl.where(held, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 0))
    weights = tl.exp2(scores - new_top)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 0)
    acc = acc * shrink + tl.sum(weights[:, None] * values.to(tl.float32), 0)
    return new_top, total, acc


@triton.jit(do_not_specialize=["heads", "past_room", "room", "mass_lines"])
def _attend(
    q, own_k, own_v, past_k, past_v, mean_v, mass, peaks, chosen, bounds, rows, lengths, part_o, part_lse,
    qb, qt, qh, heads, past_room, room, mass_lines, score_scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr,
    TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, READ: tl.constexpr, EXACT: tl.constexpr,
    FAR: tl.constexpr, BN: tl.constexpr, CP: tl.constexpr, TP: tl.constexpr, HERE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = S * G
    row, at = _whose(z, heads, rows, EVERY)
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    num, inside = block * (B // UNIT), d < D
    first_column = z.to(tl.int64) * C
    mass_room = mass_lines * 32
    if task < C * EXACT:
        c, j, own_head = task // EXACT, task % EXACT, (z % heads).to(tl.int64)
        own_q = q + (z // heads).to(tl.int64) * qb + c // G * qt + (own_head * G + c % G) * qh
        query = tl.load(own_q + d, mask=inside, other=0.0).to(tl.float32) * score_scale
        n = tl.arange(0, KEYS)
        top, total, acc = -1e38, 0.0, tl.zeros([DP], tl.float32)
        if j < READ:
            column, rank = tl.full([1, 1], 0, tl.int64) + (first_column + c), tl.arange(0, BN)[None, :]
            if HERE:
                picked, _, _ = select(mass, peaks, column, num, mass_room, TOP_K, 1, BN, TP)
            else:
                picked = tl.load(chosen + column * TOP_K + rank, mask=rank < TOP_K, other=0)
            for piece in range(j * PIECES, tl.minimum(j * PIECES + PIECES, (TOP_K * UNIT + KEYS - 1) // KEYS)):
                if UNIT >= KEYS:
                    read = tl.sum(tl.where(rank == piece * KEYS // UNIT, picked, 0))
                else:
                    which = (piece * KEYS + n)[:, None] // UNIT == rank
                    read = tl.sum(tl.where(which, picked, 0), 1)
                there = piece * KEYS + n
                offset = (at * past_room + read * UNIT + there % UNIT) * D
                top, total, acc = _read_rows(
                    past_k, past_v, offset, there < TOP_K * UNIT, query, top, total, acc, D, DP
                )
        else:
            begin = (j - READ) * PIECES * KEYS
            seen = place % B + c // G + 1
            for first in range(begin, tl.minimum(begin + PIECES * KEYS, seen), KEYS):
                offset = (at * (2 * B) + block % 2 * B + first + n) * D
                top, total, acc = _read_rows(own_k, own_v, offset, first + n < seen, query, top, total, acc, D, DP)
        to = (first_column + c) * (EXACT + FAR) + j
        tl.store(part_o + to * D + d, acc / tl.maximum(total, 1e-30), mask=inside)
        tl.store(part_lse + to, tl.where(total > 0, top + tl.log2(total), float("-inf")))
    elif FAR > 0:
        share = tl.cdiv(tl.cdiv(num, BN), FAR) * BN
        first_n = (task - C * EXACT) * share
        stop = tl.minimum(first_n + share, num)
        columns, lane = tl.arange(0, CP)[:, None], tl.arange(0, BN)
        own_column = first_column + tl.minimum(columns, C - 1)
        if HERE:
            _, below, rest = select(mass, peaks, own_column, num, mass_room, TOP_K, CP, BN, TP)
        else:
            below, rest = tl.load(bounds + own_column * 2), tl.load(bounds + own_column * 2 + 1)
        most = score_of(rest)  # the largest mass that is left is known, so weights need no other scale
        M: tl.constexpr = CP if CP > 16 else 16  # tensor cores want 16 columns, so each is there several times
        weight = tl.zeros([CP, BN], tl.float32)
        sums = tl.zeros([M, DP], tl.float32)
        for start in range(first_n, stop, BN):
            at_n = start + lane
            from_mean = mean_v + (at * room + at_n)[:, None] * D + d[None, :]
            means = tl.load(from_mean, mask=(at_n < stop)[:, None] & inside[None, :], other=0.0)
            score = tl.load(mass + own_column * mass_room + at_n[None, :], mask=(at_n < stop)[None, :], other=0.0)
            left = (at_n < stop)[None, :] & (ordered(bits_of(score), at_n[None, :]) < below)
            own = tl.where(left, tl.exp2(score - most), 0.0)
            weight += own
            tile = tl.reshape(tl.broadcast_to(own[:, None, :], [CP, M // CP, BN]), [M, BN])
            sums = tl.dot(tile, means, sums, input_precision="tf32x3")
        whole = tl.sum(weight, 1, keep_dims=True)
        part = EXACT + task - C * EXACT
        far_lse = tl.where(whole > 0, most + tl.log2(whole), float("-inf"))
        tl.store(part_lse + own_column * (EXACT + FAR) + part, far_lse, mask=columns < C)
        whole = tl.reshape(tl.broadcast_to(whole[:, None, :], [CP, M // CP, 1]), [M, 1])
        m = tl.arange(0, M)[:, None]
        kept = (m % (M // CP) == 0) & (m // (M // CP) < C) & inside[None, :]
        to_part = (first_column + m // (M // CP)) * (EXACT + FAR) + part
        tl.store(part_o + to_part * D + d[None, :], sums / tl.maximum(whole, 1e-30), mask=kept)


@triton.jit(do_not_specialize=["heads"])
def _merge(
    part_o, part_lse, by_state, calibration, rows, lengths, o, heads, EXACT: tl.constexpr, FAR: tl.constexpr,
    PARTS: tl.constexpr, STATE: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0)
    z, c = column // (S * G), column % (S * G)
    row, _ = _whose(z, heads, rows, EVERY)
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
        result += far_share * tl.load(by_state + column.to(tl.int64) * D + d, mask=inside, other=0.0)
    to = ((z // heads * S + c // G) * (heads * G) + head).to(tl.int64) * D + d
    tl.store(o + to, result.to(o.dtype.element_ty), mask=inside)
    if (z % heads == 0) & (c == 0):  # nobody else reads lengths in this launch
        tl.store(lengths + row, tl.load(lengths + row) + S)
