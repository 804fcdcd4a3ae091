"""The kernels of `bsbr.ops.triton.decode`; the first axis of a grid counts rows and key heads.

With EARLY a launch is on its way before the one in front of it has ended, and waits for that first of all.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from bsbr.ops.triton.decode_search import LEAST, ordered, score_of, select
from bsbr.ops.triton.scores import bits_of


@triton.jit
def _whose(z, heads, rows, EVERY: tl.constexpr):
    """Row of the cache, and row and key head as one number."""
    row = z // heads if EVERY else tl.load(rows + z // heads)
    row = row.to(tl.int64)
    return row, row * heads + z % heads


@triton.jit
def _count_of(counts, z, heads, num, TOP_K: tl.constexpr):
    """Blocks that queries of a key head read: TOP_K, or the head's number in `counts`, of which fewer may be past."""
    return TOP_K if counts is None else tl.minimum(tl.load(counts + z % heads).to(tl.int32), num)


@triton.jit(do_not_specialize=["heads", "room", "mass_lines"])
def _score(
    q, k, v, own_k, own_v, meta, states, calibration, rows, lengths, mass, peaks, by_state,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, heads, room, mass_lines, mean_scale, var_scale, scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BN: tl.constexpr, TP: tl.constexpr, SPAN: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
    EVERY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
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
        # all loads before the first barrier and the first store, which no load could pass, the longest first
        first = (task - C) * SPAN
        lane = tl.arange(0, BN)
        held = (first * BN + lane < room)[:, None] & inside[None, :]
        from_meta = meta + (at * room + first * BN + lane)[:, None] * WIDE + d[None, :]
        next_mean = tl.load(from_meta, mask=held, other=0.0)
        next_var = tl.load(from_meta + D, mask=held, other=0.0) if MOMENTS else next_mean
        queries, biases, mean_factors, var_factors = (), (), (), ()
        for c in tl.static_range(C):
            scalars = calibration + (head * G + c % G) * 5
            queries += (tl.load(row_q + c // G * qt + (head * G + c % G) * qh + d, mask=inside, other=0.0),)
            biases += (tl.load(scalars),)
            mean_factors += (tl.load(scalars + 1),)
            var_factors += (tl.load(scalars + 2),)
        by_mean, by_var, shift = (), (), ()
        for c in tl.static_range(C):
            by_mean += (queries[c].to(tl.float32) * (mean_scale * mean_factors[c]),)
            by_var += (queries[c].to(tl.float32) * queries[c].to(tl.float32) * (var_scale * var_factors[c]),)
            shift += (biases[c] * 1.4426950408889634 + tl.log2(UNIT * 1.0),)
        # with few columns no tile waits for the length: there is room for what may not be needed
        stop = tl.cdiv(num if SPAN > 1 else room, BN)
        for tile in tl.range(first, tl.minimum(first + SPAN, stop), num_stages=1):
            n, mean, var = tile * BN + lane, next_mean, next_var
            if SPAN > 1:
                from_meta += BN * WIDE
                held = (n + BN < room)[:, None] & inside[None, :] & (tile + 1 < first + SPAN)
                next_mean = tl.load(from_meta, mask=held, other=0.0)
                next_var = tl.load(from_meta + D, mask=held, other=0.0) if MOMENTS else next_mean
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
    mass, peaks, chosen, bounds, rows, lengths, counts, heads, mass_lines, B: tl.constexpr, UNIT: tl.constexpr,
    TOP_K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
    EVERY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    z = tl.program_id(0)
    row, _ = _whose(z, heads, rows, EVERY)
    num = tl.load(lengths + row) // B * (B // UNIT)
    c, rank = tl.arange(0, CP)[:, None], tl.arange(0, BN)[None, :]
    column, real = z.to(tl.int64) * C + tl.minimum(c, C - 1), c < C
    count = _count_of(counts, z, heads, num, TOP_K)
    room, tiles = mass_lines * 32, tl.cdiv(num, BN)
    picked, last, rest = select(mass, peaks, column, num, tiles, room, count + 1, count, TOP_K, CP, BN, TP)
    tl.store(chosen + column * TOP_K + rank, picked, mask=real & (rank < TOP_K))
    tl.store(bounds + column * 2, last, mask=real)
    tl.store(bounds + column * 2 + 1, rest, mask=real)


@triton.jit
def _read_rows(k, v, offset, held, seen, query, scale, top, total, acc, D: tl.constexpr, DP: tl.constexpr):
    """Take some keys and values that are `held` into the softmax of 16 queries, each by those that it has `seen`.

    A value that is no number shows in all of them, as one later in the same step does in the tokens before it.
    """
    d = tl.arange(0, DP)
    inside = held[:, None] & (d < D)[None, :]
    keys = tl.load(k + offset[:, None] + d[None, :], mask=inside, other=0.0)
    values = tl.load(v + offset[:, None] + d[None, :], mask=inside, other=0.0)
    if keys.dtype != query.dtype:  # a cache that was filled under autocast, say
        query, keys = query.to(tl.float32), keys.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="tf32x3") * scale
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    short = weights.to(values.dtype)
    acc = tl.dot(short, values, acc * shrink[:, None], input_precision="tf32x3")
    if values.dtype != tl.float32:  # the digits that the first product left out
        acc = tl.dot((weights - short.to(tl.float32)).to(values.dtype), values, acc)
    return new_top, total, acc


@triton.jit
def _means_and_masses(from_mean, from_mass, n, stop, inside):
    """Mean values of some blocks n below `stop`, and their masses for some columns."""
    means = tl.load(from_mean, mask=(n < stop)[:, None] & inside, other=0.0)
    return means, tl.load(from_mass, mask=(n < stop)[None, :], other=0.0)


@triton.jit(do_not_specialize=["heads", "past_room", "room", "mass_lines"])
def _attend(
    q, own_k, own_v, past_k, past_v, mean_v, mass, peaks, chosen, bounds, rows, lengths, counts, part_o, part_lse,
    qb, qt, qh, heads, past_room, room, mass_lines, score_scale,
    S: tl.constexpr, G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr,
    TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, READ: tl.constexpr, OWN: tl.constexpr,
    FAR: tl.constexpr, BN: tl.constexpr, CP: tl.constexpr, TP: tl.constexpr, HERE: tl.constexpr, EVERY: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    # FAR programs of a key head read mean values, then come those of the own block, then READ for each column
    z, task = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = S * G
    PARTS: tl.constexpr = READ + OWN + FAR
    OWN_TASKS: tl.constexpr = OWN * ((C + 15) // 16)
    EACH: tl.constexpr = READ if READ > 0 else 1
    row, at = _whose(z, heads, rows, EVERY)
    place = tl.load(lengths + row)
    block, d = place // B, tl.arange(0, DP)
    num, inside = block * (B // UNIT), (d < D)[None, :]
    count, first_column = _count_of(counts, z, heads, num, TOP_K), z.to(tl.int64) * C
    mass_room, tiles = mass_lines * 32, tl.cdiv(room, BN)  # without `_select` all tiles have a peak
    if task >= FAR:
        m = tl.arange(0, 16)[:, None]  # tensor cores want 16 rows: columns, or one column 16 times
        task -= FAR
        own = task < OWN_TASKS
        past_task = task - OWN_TASKS
        j = tl.where(own, task % OWN, past_task % EACH)
        of_past = past_task // EACH
        c = tl.where(own, task // OWN * 16 + m, of_past)
        real = tl.where(own, c < C, m == 0)
        c = tl.minimum(c, C - 1)
        own_head = (z % heads).to(tl.int64) * G + c % G
        own_q = q + (z // heads).to(tl.int64) * qb + c // G * qt + own_head * qh
        query = tl.load(own_q + d[None, :], mask=inside, other=0.0)
        n, rank = tl.arange(0, KEYS), tl.arange(0, BN)[None, :]
        begin = j * (PIECES * KEYS)
        stop = tl.where(own, place % B + c // G + 1, count * UNIT)
        last = tl.where(own, place % B + S, count * UNIT)
        if own:
            picked = tl.zeros([1, BN], tl.int32)
            from_k, from_v = own_k + (at * 2 + block % 2) * B * D, own_v + (at * 2 + block % 2) * B * D
        else:
            column = tl.full([1, 1], 0, tl.int64) + (first_column + of_past)
            if HERE:
                needed = tl.minimum((begin + PIECES * KEYS + UNIT - 1) // UNIT, count)
                picked, _, _ = select(mass, peaks, column, num, tiles, mass_room, needed, count, TOP_K, 1, BN, TP)
            else:
                picked = tl.load(chosen + column * TOP_K + rank, mask=rank < TOP_K, other=0)
            from_k, from_v = past_k + at * past_room * D, past_v + at * past_room * D
        top = tl.full([16], -1e38, tl.float32)
        total, acc = tl.zeros([16], tl.float32), tl.zeros([16, DP], tl.float32)
        # all pieces are on their way at once, through shared memory
        for start in tl.range(begin, tl.minimum(begin + PIECES * KEYS, last), KEYS, num_stages=PIECES + 1):
            key = start + n
            if UNIT >= KEYS:
                read = tl.sum(tl.where(rank == start // UNIT, picked, 0))
            else:
                read = tl.sum(tl.where(key[:, None] // UNIT == rank, picked, 0), 1)
            offset = tl.where(own, key, read * UNIT + key % UNIT).to(tl.int64) * D
            top, total, acc = _read_rows(
                from_k, from_v, offset, key < last, key[None, :] < stop, query, score_scale, top, total, acc, D, DP
            )
        part = (first_column + c) * PARTS + tl.where(own, READ + j, j)
        tl.store(part_o + part * D + d[None, :], acc / tl.maximum(total, 1e-30)[:, None], mask=real & inside)
        lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        tl.store(part_lse + part, lse[:, None], mask=real)
    elif FAR > 0:
        share = tl.cdiv(tl.cdiv(num, BN), FAR) * BN
        first_n = task * share
        stop_n = tl.minimum(first_n + share, num)
        columns, at_n = tl.arange(0, CP)[:, None], first_n + tl.arange(0, BN)
        own_column = first_column + tl.minimum(columns, C - 1)
        from_mean = mean_v + (at * room + at_n)[:, None] * D + d[None, :]
        from_mass = mass + own_column * mass_room + at_n[None, :]
        means, masses = _means_and_masses(from_mean, from_mass, at_n, stop_n, inside)
        next_means, next_masses = _means_and_masses(from_mean + BN * D, from_mass + BN, at_n + BN, stop_n, inside)
        tl.debug_barrier()  # or the compiler loads them once the choice is made, behind what all others then read
        if HERE:
            _, below, rest = select(mass, peaks, own_column, num, tiles, mass_room, count + 1, count, TOP_K, CP, BN, TP)
        else:
            below, rest = tl.load(bounds + own_column * 2), tl.load(bounds + own_column * 2 + 1)
        most = score_of(rest)  # the largest mass that is left is known, so weights need no other scale
        M: tl.constexpr = CP if CP > 16 else 16  # tensor cores want 16 columns, so each is there several times
        weight = tl.zeros([CP, BN], tl.float32)
        sums = tl.zeros([M, DP], tl.float32)
        for _ in tl.range(first_n, stop_n, BN, num_stages=1):
            left = (at_n < stop_n)[None, :] & (ordered(bits_of(masses), at_n[None, :]) < below)
            kept = tl.where(left, tl.exp2(masses - most), 0.0)
            weight += kept
            tile = tl.reshape(tl.broadcast_to(kept[:, None, :], [CP, M // CP, BN]), [M, BN])
            sums = tl.dot(tile, means, sums, input_precision="tf32x3")
            at_n += BN
            from_mean += BN * D
            from_mass += BN
            means, masses = next_means, next_masses
            next_means, next_masses = _means_and_masses(from_mean + BN * D, from_mass + BN, at_n + BN, stop_n, inside)
        whole = tl.sum(weight, 1, keep_dims=True)
        far_part = READ + OWN + task
        far_lse = tl.where(whole > 0, most + tl.log2(whole), float("-inf"))
        tl.store(part_lse + own_column * PARTS + far_part, far_lse, mask=columns < C)
        whole = tl.reshape(tl.broadcast_to(whole[:, None, :], [CP, M // CP, 1]), [M, 1])
        line = tl.arange(0, M)[:, None]
        kept_rows = (line % (M // CP) == 0) & (line // (M // CP) < C) & inside
        to_part = (first_column + line // (M // CP)) * PARTS + far_part
        tl.store(part_o + to_part * D + d[None, :], sums / tl.maximum(whole, 1e-30), mask=kept_rows)


@triton.jit(do_not_specialize=["heads"])
def _merge(
    part_o, part_lse, by_state, calibration, rows, lengths, o, heads, EXACT: tl.constexpr, FAR: tl.constexpr,
    PARTS: tl.constexpr, STATE: tl.constexpr, S: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    EVERY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    column = tl.program_id(0)
    z, c = column // (S * G), column % (S * G)
    row, _ = _whose(z, heads, rows, EVERY)
    p, d = tl.arange(0, PARTS), tl.arange(0, DP)
    inside = d < D
    head = z % heads * G + c % G
    # all loads before the first barrier
    from_part = part_o + (column.to(tl.int64) * (EXACT + FAR) + p)[:, None] * D + d[None, :]
    parts = tl.load(from_part, mask=(p < EXACT + FAR)[:, None] & inside[None, :], other=0.0)
    lse = tl.load(part_lse + column * (EXACT + FAR) + p, mask=p < EXACT + FAR, other=float("-inf"))
    far_factor = tl.load(calibration + head * 5 + 3)
    if STATE:
        from_state = tl.load(by_state + column.to(tl.int64) * D + d, mask=inside, other=0.0)
    weights = tl.exp2(lse - tl.max(lse, 0))
    weights /= tl.sum(weights, 0)
    scaled = tl.where(p < EXACT, weights, weights * far_factor)
    result = tl.sum(scaled[:, None] * parts, 0)
    if STATE:
        result += tl.sum(tl.where(p < EXACT, 0.0, weights), 0) * from_state
    to = ((z // heads * S + c // G) * (heads * G) + head).to(tl.int64) * D + d
    tl.store(o + to, result.to(o.dtype.element_ty), mask=inside)
    if (z % heads == 0) & (c == 0):  # nobody else reads lengths in this launch
        tl.store(lengths + row, tl.load(lengths + row) + S)
