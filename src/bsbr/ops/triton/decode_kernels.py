"""The kernels of `bsbr.ops.triton.decode`; the first axis of a grid counts rows and key heads."""

import triton
import triton.language as tl

from bsbr.ops.triton.decode_search import bits_of, ordered, score_of, select


@triton.jit
def _whose(z, heads, rows, EVERY: tl.constexpr):
    """Row of the cache, and row and key head as one number."""
    row = z // heads if EVERY else tl.load(rows + z // heads)
    row = row.to(tl.int64)
    return row, row * heads + z % heads


@triton.jit(do_not_specialize=["heads", "room", "mass_lines"])
def _choose(
    q, k, v, own_k, own_v, meta, states, calibration, rows, lengths, counters, mass, peaks, chosen, bounds, read,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, room, mass_lines, mean_scale, var_scale, scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BN: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, TP: tl.constexpr, SPAN: tl.constexpr,
    MOMENTS: tl.constexpr, STATE: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    row, at = _whose(z, heads, rows, EVERY)
    i, head = (z // heads).to(tl.int64), z % heads
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    num, inside = block * (B // UNIT), d < D
    C: tl.constexpr = S * G
    WIDE: tl.constexpr = 2 * D if MOMENTS else D
    head_q = q + i * qb + head * G * qh
    mass_room = mass_lines * 32
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
                part_q = tl.load(head_q + task // G * qt + task % G * qh + e, mask=e < D, other=0.0).to(tl.float32)
                state = tl.load(
                    states + (at * 2 + block % 2) * D * D + e[:, None] * D + d[None, :],
                    mask=(e < D)[:, None] & inside[None, :], other=0.0,
                )  # fmt: skip
                acc += tl.sum(part_q[:, None] * state, 0)
            acc *= scale * tl.load(calibration + (head * G + task % G) * 5 + 4) / num
            tl.store(read + (z.to(tl.int64) * C + task) * D + d, acc, mask=inside)
    elif (task - C) * (SPAN * BN) < num:
        # all queries before the first store, which no load could pass
        by_mean, by_var, shift = (), (), ()
        for c in tl.static_range(C):
            scalars = calibration + (head * G + c % G) * 5
            query = tl.load(head_q + c // G * qt + c % G * qh + d, mask=inside, other=0.0).to(tl.float32)
            by_mean += (query * (mean_scale * tl.load(scalars + 1)),)
            by_var += (query * query * (var_scale * tl.load(scalars + 2)),)
            shift += (tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0),)
        first = (task - C) * SPAN
        for tile in tl.range(first, tl.minimum(first + SPAN, tl.cdiv(num, BN)), num_stages=2 if SPAN > 1 else 1):
            n = tile * BN + tl.arange(0, BN)
            held = (n < num)[:, None] & inside[None, :]
            from_meta = meta + (at * room + n)[:, None] * WIDE + d[None, :]
            mean = tl.load(from_meta, mask=held, other=0.0)
            if MOMENTS:
                var = tl.load(from_meta + D, mask=held, other=0.0)
            for c in tl.static_range(C):
                terms = mean * by_mean[c][None, :]
                if MOMENTS:
                    terms += var * by_var[c][None, :]
                score = tl.sum(terms, 1) + shift[c]
                tl.store(mass + (z.to(tl.int64) * C + c) * mass_room + n, score, mask=n < num)
                peak = tl.max(tl.where(n < num, score, float("-inf")), 0)
                tl.store(peaks + (z.to(tl.int64) * C + c) * TP + tile, peak)
        # the program that is last of its key head has all masses before it: nobody else has read these lines
        tl.debug_barrier()
        if tl.atomic_add(counters + z, 1) == tl.cdiv(num, SPAN * BN) - 1:
            tl.store(counters + z, 0)
            select(mass, peaks, chosen, bounds, z, num, mass_room, TOP_K, KP, C, CP, BN, TP)


@triton.jit
def _read_exactly(k, v, query, count, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Attention of one query to the first `count` of KEYS keys."""
    n, d = tl.arange(0, KEYS), tl.arange(0, DP)
    held = (n < count)[:, None] & (d < D)[None, :]
    keys = tl.load(k + n[:, None] * D + d[None, :], mask=held, other=0.0)
    values = tl.load(v + n[:, None] * D + d[None, :], mask=held, other=0.0)
    scores = tl.where(n < count, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
    top = tl.maximum(tl.max(scores, 0), -1e38)
    weights = tl.exp2(scores - top)
    total = tl.sum(weights, 0)
    o = tl.sum(weights[:, None] * values.to(tl.float32), 0) / tl.maximum(total, 1e-30)
    return o, top + tl.log2(total)


@triton.jit
def _read_chosen(
    k, v, chosen, query, begin, end, score_scale, UNIT: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention of one query to pieces of its chosen blocks. Tensor cores want 16 queries, so it is there 16 times; the
    products are what makes the compiler load pieces ahead of their use."""
    n, d = tl.arange(0, KEYS), tl.arange(0, DP)
    tile_q = tl.zeros([16, DP], query.dtype) + query[None, :]
    top = tl.full([16], -1e38, tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, DP], tl.float32)
    for piece in tl.range(begin, end, num_stages=STAGES):
        first = tl.load(chosen + piece // (UNIT // KEYS)) * UNIT + piece % (UNIT // KEYS) * KEYS
        offset = (first + n).to(tl.int64)[:, None] * D + d[None, :]
        keys = tl.load(k + offset, mask=(d < D)[None, :], other=0.0)
        values = tl.load(v + offset, mask=(d < D)[None, :], other=0.0)
        scores = tl.dot(tile_q, tl.trans(keys), input_precision="ieee") * score_scale
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return tl.max(acc / total[:, None], 0), tl.max(top + tl.log2(total), 0)


@triton.jit(do_not_specialize=["heads", "past_room", "room", "mass_lines"])
def _attend(
    q, own_k, own_v, past_k, past_v, mean_v, mass, chosen, bounds, rows, lengths, part_o, part_lse,
    qb, qt, qh, heads, past_room, room, mass_lines, score_scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FAR: tl.constexpr, BN: tl.constexpr,
    WARPS: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    z, task = tl.program_id(0), tl.program_id(1)
    LAST: tl.constexpr = TOP_K * (UNIT // KEYS)
    READ: tl.constexpr = (LAST + PIECES - 1) // PIECES
    EXACT: tl.constexpr = READ + B // KEYS
    C: tl.constexpr = S * G
    row, at = _whose(z, heads, rows, EVERY)
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    inside = d < D
    first_column = z.to(tl.int64) * C
    mass_room = mass_lines * 32
    if task < C * EXACT:
        c, j = task // EXACT, task % EXACT
        own_q = q + (z // heads).to(tl.int64) * qb + c // G * qt + (z % heads * G + c % G) * qh
        query = tl.load(own_q + d, mask=inside, other=0.0)
        to = (first_column + c) * (EXACT + FAR) + j
        if j < READ:
            where = at * past_room * D
            o, lse = _read_chosen(
                past_k + where, past_v + where, chosen + (first_column + c) * TOP_K, query, j * PIECES,
                min(j * PIECES + PIECES, LAST), score_scale, UNIT, KEYS, STAGES, D, DP,
            )  # fmt: skip
            tl.store(part_o + to * D + d, o, mask=inside)
            tl.store(part_lse + to, lse)
        else:
            first = (j - READ) * KEYS
            where = (at * (2 * B) + block % 2 * B + first) * D
            seen = place % B + c // G + 1 - first
            o, lse = _read_exactly(own_k + where, own_v + where, query.to(tl.float32) * score_scale, seen, KEYS, D, DP)
            tl.store(part_o + to * D + d, o, mask=inside)
            tl.store(part_lse + to, lse)
    elif FAR > 0:
        num = block * (B // UNIT)
        share = tl.cdiv(tl.cdiv(num, BN), FAR) * BN
        begin = (task - C * EXACT) * share
        stop = tl.minimum(begin + share, num)
        below, top, total, acc = (), (), (), ()
        for c in tl.static_range(C):
            below += (tl.load(bounds + (first_column + c) * 2),)
            # the largest mass that is left is known, so weights need no other scale
            top += (score_of(tl.load(bounds + (first_column + c) * 2 + 1)),)
            total += (tl.zeros([BN], tl.float32),)
            acc += (tl.zeros([WARPS, DP], tl.float32),)
        for start in range(begin, stop, BN):
            n = start + tl.arange(0, BN)
            from_mean = mean_v + (at * room + n)[:, None] * D + d[None, :]
            values = tl.load(from_mean, mask=(n < stop)[:, None] & inside[None, :], other=0.0)
            scores = ()
            for c in tl.static_range(C):
                scores += (tl.load(mass + (first_column + c) * mass_room + n, mask=n < stop, other=0.0),)
            new_total, new_acc = (), ()
            for c in tl.static_range(C):
                left = (n < stop) & (ordered(bits_of(scores[c]), n) < below[c])
                weights = tl.where(left, tl.exp2(scores[c] - top[c]), 0.0)
                new_total += (total[c] + weights,)
                # each warp has every WARPS-th row of a tile: it adds up its own, and waits for no other until the end
                parts = tl.reshape(weights[:, None] * values, [BN // WARPS, WARPS, DP])
                new_acc += (acc[c] + tl.sum(parts, 0),)
            total, acc = new_total, new_acc
        for c in tl.static_range(C):
            to = (first_column + c) * (EXACT + FAR) + EXACT + task - C * EXACT
            whole = tl.sum(total[c], 0)
            tl.store(part_lse + to, tl.where(whole > 0, top[c] + tl.log2(whole), float("-inf")))
            tl.store(part_o + to * D + d, tl.sum(acc[c], 0) / tl.maximum(whole, 1e-30), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _merge(
    part_o, part_lse, read, calibration, rows, lengths, o, heads, EXACT: tl.constexpr, FAR: tl.constexpr,
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
        result += far_share * tl.load(read + column.to(tl.int64) * D + d, mask=inside, other=0.0)
    to = ((z // heads * S + c // G) * (heads * G) + head).to(tl.int64) * D + d
    tl.store(o + to, result.to(o.dtype.element_ty), mask=inside)
    if (z % heads == 0) & (c == 0):  # nobody else reads lengths in this launch
        tl.store(lengths + row, tl.load(lengths + row) + S)
