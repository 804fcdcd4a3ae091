"""Local and far field of each query, and before it the scores and the choice of its past blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bsbr.ops.triton import hopper
from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import VARYING, Scores, Tiles, score_at, score_factors, tile_of, write_scores
from bsbr.ops.triton.search import MOST_WRITTEN_OUT, choose_blocks, reads_peaks, strike_out
from bsbr.ops.triton.search_many import choose_many_blocks
from bsbr.ops.triton.short_scores import STEPS, above
from bsbr.ops.triton.summaries import FarField, padded

_SCORE_BYTES = 1 << 30
"""Scores of past blocks that are held at once, or as much as the queries take if that is more."""


def attend_past(
    problem: Problem,
    heads_here: range,
    tensors: tuple[Tensor, Tensor, Tensor],
    field: FarField,
    calibration: Tensor,
    chosen: Tensor,
    given: bool,
    counts: Tensor | None,
    part_o: Tensor,
    part_lse: Tensor,
) -> None:
    """Choose the `top_k` past blocks of largest estimated mass, and attend to the other past blocks and the own block.

    Source: `bsbr.ops.routing.select_blocks` and `bsbr.ops.far`; equal scores go to the lower block index.

    As many tiles of queries at a time as there is room for their scores:

    1. the scores of all their past blocks (`write_scores`);
    2. the choice, which strikes what it chooses out of the scores (`choose_blocks`, `choose_many_blocks`);
    3. the softmax over the scores that are left, one product that reads the states, and the keys of the own block.

    Args:
        problem: sizes.
        heads_here: key heads, counted over rows and key heads.
        tensors: q [B, Tq, HQ, D]; k and v [B, T, H, D].
        field: summaries.
        calibration: [HQ, 5] float32.
        chosen: block indices of the sparse queries, [B, S, HQ, top_k] int32; written for the heads here.
        given: they are there already.
        counts: blocks that a query of each key head reads, [H] int64, where these differ.
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts].
            This is part `top_k` of each query.
    """
    config, width, rows = problem.config, tensors[0].shape[3], problem.tile_rows
    far, choose = config.far != "drop", config.top_k > 0 and not given
    tiles = -(-problem.stop // rows) - problem.sparse_start // rows
    each = len(heads_here) * problem.group  # query heads, whose tiles of the same tokens follow each other
    room = triton.cdiv(problem.num_blocks, 64) * 64 if far or choose else 0
    at_once = tiles * each
    score_bytes = 2 if problem.short_scores else 4
    if room:  # the query heads of a key head together
        most_bytes = max(_SCORE_BYTES, tensors[0].numel() * tensors[0].element_size())
        at_once = min(at_once, max(1, most_bytes // (score_bytes * rows * room * problem.group)) * problem.group)
    blocks = 64 if problem.most_rows >= 64 and width <= 128 else 32
    new = chosen.new_empty
    each_score = new(at_once, room // 64, rows, 64, dtype=torch.int16 if problem.short_scores else torch.float32)
    # the search reads whole tiles of peaks and bests, perhaps beyond those of the last query
    bests = new(at_once * (room // blocks) * rows + 64 * rows, dtype=torch.float32)
    wanted = choose and config.top_k <= MOST_WRITTEN_OUT and reads_peaks(room)
    peaks = new(at_once * rows * room // 8 + 64, dtype=torch.float32) if wanted else None
    scores = Scores(each_score, bests, peaks)
    tops = new(at_once, rows, dtype=torch.float32)
    values = arranged = None
    if far and hopper.copies_tiles(problem, tensors[0]):
        values = TensorDescriptor.from_tensor(field.mean_v.view(-1, width), [blocks, width])
    if room and hopper.scores_in_gluon(problem, tensors[0]):
        from bsbr.ops.triton import scores_hopper  # Gluon is experimental

        arranged = scores_hopper.arrange(field)
    for first in range(0, tiles * each, at_once):
        here = Tiles(first, min(at_once, tiles * each - first), tiles, rows, room, heads_here, blocks)
        if arranged is not None:
            scores_hopper.write_scores_on_hopper(problem, here, tensors[0], arranged, calibration, scores)
        elif room:
            write_scores(problem, here, tensors[0], field, calibration, scores)
        if choose:
            search = choose_blocks if config.top_k <= MOST_WRITTEN_OUT else choose_many_blocks
            search(problem, here, scores, tops, chosen, counts)
        elif far and config.top_k:
            strike_out(problem, here, scores.each, chosen)
        _attend_past[(here.count,)](
            *tensors, field.mean_v, values, field.first_k, field.states, calibration, part_o, part_lse, scores.each,
            scores.bests, tops, *(stride for x in tensors for stride in x.stride()[:3]),
            tensors[1].shape[2], each, heads_here.start, first, tiles, field.centred_k.shape[1],
            field.states.shape[1], room, problem.sparse_start, problem.q_start, problem.num_queries,
            problem.score_scales[0], problem.scale,
            G=problem.group, B=config.block_size, UNIT=config.unit, TOP_K=config.top_k, D=width, DP=padded(width),
            BM=rows, BN=blocks, FAR=far, FIND=not choose, GAPS=problem.gaps, STATE=config.state != "none",
            PIECE=min(64, padded(width)), num_warps=4, num_stages=1,
            maxnreg=168 if width <= 128 else None,
        )  # fmt: skip


@triton.jit
def _tile_at(scores, bests, top, start, BM: tl.constexpr, BN: tl.constexpr):
    """How far the scores of a tile of blocks are above `top`."""
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    # no mask: of one that ends anywhere the compiler makes loads of four bytes, and there is room for whole tiles
    own = tl.load(scores + score_at(row[:, None], start + column[None, :], BM))
    if scores.dtype.element_ty == tl.int16:
        own = above(own, tl.load(bests + start // BN * BM + row) / STEPS - top)
    else:
        own -= top[:, None]
    return own


@triton.jit
def _read_far(
    scores, bests, mean_v, values, row, top, stop, find: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The softmax over the scores that are left; `top` is about the largest of them, and is found if `find` says so.

    Whole tiles of mean values come by their descriptor, if there is one, two of them and of scores on their way while
    one is worked on. Their weights are added by a product with ones: so they are in no other layout than that of the
    products, and what reads the sums waits for both products before the weights are replaced. The last tile would bring
    blocks that are not past.
    """
    column, d = tl.arange(0, BN), tl.arange(0, DP)
    if find:
        most = tl.full([BM, BN], float("-inf"), tl.float32)
        for start in range(0, stop, BN):
            own = _tile_at(scores, bests, tl.zeros([BM], tl.float32), start, BM, BN)
            most = tl.maximum(most, tl.where((start + column < stop)[None, :], own, float("-inf")))
        top = tl.max(most, 1)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    whole = 0
    if values is not None:
        whole = stop // BN * BN
        ones = tl.full([BN, 16], 1.0, mean_v.dtype.element_ty)
        for start in tl.range(0, whole, BN, num_stages=3):
            own_v = values.load([row.to(tl.int32) + start, 0])
            rounded = tl.exp2(_tile_at(scores, bests, top, start, BM, BN)).to(own_v.dtype)
            acc = tl.dot(rounded, own_v, acc)
            total += tl.max(tl.dot(rounded, ones), 1)
    for start in range(whole, stop, BN):
        own = _tile_at(scores, bests, top, start, BM, BN)
        weights = tl.exp2(tl.where((start + column < stop)[None, :], own, float("-inf")))
        n = tl.minimum(start + column, stop - 1)[:, None] * D + d[None, :]
        own_v = tl.load(mean_v + row * D + n, mask=(d < D)[None, :], other=0.0)
        total += tl.sum(weights, 1)
        acc = tl.dot(weights.to(own_v.dtype), own_v, acc, input_precision="ieee")
    return top, total, acc


@triton.jit(do_not_specialize=[*VARYING, "num_blocks", "num_states", "q_start", "num_queries"])
def _attend_past(
    q, k, v, mean_v, values, first_k, states, calibration, part_o, part_lse, scores, bests, tops,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    heads, heads_all, first_head, first_work, num_tiles, num_blocks, num_states, room, sparse_start, q_start,
    num_queries, score_scale, scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FAR: tl.constexpr, FIND: tl.constexpr, GAPS: tl.constexpr,
    STATE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    first, own_z, member = tile_of(tl.program_id(0) + first_work, num_tiles, heads_all, sparse_start, G, BM)
    z = (first_head + own_z).to(tl.int64)
    row, head = z // heads, z % heads * G + member
    token, d = first + tl.arange(0, BM), tl.arange(0, DP)
    inside = (d < D)[None, :]
    valid = (token >= sparse_start) & (token < q_start + num_queries)
    sparse = (token - sparse_start).to(tl.int64)
    num_sparse = q_start + num_queries - sparse_start
    own = q + row * qb + head * qh + (token - q_start).to(tl.int64)[:, None] * qt
    block = first // B
    stop = block * (B // UNIT)
    top = tl.full([BM], -1e38, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    if FAR:
        at = tl.program_id(0).to(tl.int64) * BM
        if not FIND:
            top = tl.load(tops + at + tl.arange(0, BM))
        top, total, acc = _read_far(
            scores + at * room, bests + at * (room // BN), mean_v, values, z * num_blocks, top, stop, FIND, D, DP, BM,
            BN,
        )  # fmt: skip
        if GAPS:  # of queries that read all of their past nothing is left, whatever the scores struck out say
            left = top > -1e37
            total, acc = tl.where(left, total, 0.0), tl.where(left[:, None], acc, 0.0)
        scalars = calibration + head * 5
        mean_factor, _ = score_factors(calibration, head, score_scale, score_scale)
        top += tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0)
        acc *= tl.load(scalars + 3)
        factor = scale * tl.load(scalars + 4)
        # the queries are multiplied as they are: no registers for a copy of them
        factor = tl.where(tl.abs(factor) < 1e-20, 1e-20, factor)
        factor *= tl.maximum(total, 1e-10)  # nothing may be left beside a block that outweighs all others by far
        if STATE:
            acc = acc / factor[:, None]
        # queries and state by parts of their width, and only now: fewer registers, so that three programs share a
        # multiprocessor
        for piece in tl.static_range(0, DP, PIECE):
            e = piece + tl.arange(0, PIECE)
            tile_q = tl.load(own + e[None, :], mask=valid[:, None] & (e < D)[None, :], other=0.0)
            common = tl.load(first_k + z * D + e, mask=e < D, other=0.0)
            top += mean_factor * tl.sum(tile_q.to(tl.float32) * common[None, :], 1)  # what all blocks share
            if STATE:
                at = (z * num_states + block) * D * D
                state = tl.load(states + at + e[:, None] * D + d[None, :], mask=(e < D)[:, None] & inside, other=0.0)
                acc = tl.dot(tile_q.to(state.dtype), state, acc, input_precision="ieee")
        if STATE:
            acc *= factor[:, None]

    for start in range(block * B, first + BM, BM):
        key = start + tl.arange(0, BM)
        real = (key < q_start + num_queries)[:, None]
        far_key = key.to(tl.int64)[:, None]
        tile_s = tl.zeros([BM, BM], tl.float32)
        for piece in tl.static_range(0, DP, PIECE):
            e = piece + tl.arange(0, PIECE)
            tile_q = tl.load(own + e[None, :], mask=valid[:, None] & (e < D)[None, :], other=0.0)
            from_k = k + row * kb + z % heads * kh + far_key * kt + e[None, :]
            own_k = tl.load(from_k, mask=real & (e < D)[None, :], other=0.0)
            tile_s = tl.dot(tile_q, tl.trans(own_k), tile_s, input_precision="ieee")
        own_v = tl.load(v + row * vb + z % heads * vh + far_key * vt + d[None, :], mask=real & inside, other=0.0)
        tile_s = tl.where(key[None, :] <= token[:, None], tile_s * score_scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(tile_s, 1))
        weights = tl.exp2(tile_s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(own_v.dtype), own_v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    part = (own_z.to(tl.int64) * num_sparse * G + sparse * G + member) * (TOP_K + 1) + TOP_K
    tl.store(part_lse + part, top + tl.log2(total), mask=valid)
    acc = (acc / total[:, None]).to(part_o.dtype.element_ty)
    tl.store(part_o + part[:, None] * D + d[None, :], acc, mask=valid[:, None] & inside)
