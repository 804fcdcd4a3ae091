"""The choice of blocks, and the far and the local field, in one kernel: past blocks are scored once for all of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import score_factors, tile_scores
from bsbr.ops.triton.search import GROUP_BLOCKS, best_blocks
from bsbr.ops.triton.summaries import FarField, padded


def attend_past(
    problem: Problem,
    heads_here: range,
    tensors: tuple[Tensor, Tensor, Tensor],
    field: FarField,
    calibration: Tensor,
    chosen: Tensor,
    given: bool,
    part_o: Tensor,
    part_lse: Tensor,
) -> None:
    """Choose the `top_k` past blocks of largest estimated mass, and attend to the other past blocks and the own block.

    Source: `bsbr.ops.routing.select_blocks` and `bsbr.ops.far`; equal scores go to the lower block index.

    A program takes tiles of queries one after the other, and for each:

    1. scores tiles of past blocks and writes them to a space of its own, small enough to stay in the GPU's cache, with
       the largest of every 8;
    2. finds the best blocks there (`best_blocks`) and strikes them out;
    3. reads the scores again: the softmax over what is left, and one product that reads the states;
    4. goes on with the keys of the own block.

    Args:
        problem: sizes.
        heads_here: key heads, counted over rows and key heads.
        tensors: q [B, Tq, HQ, D]; k and v [B, T, H, D].
        field: summaries.
        calibration: [HQ, 5] float32.
        chosen: block indices of the sparse queries, [B, S, HQ, top_k] int32; written for the heads here.
        given: they are there already.
        part_o: partial outputs, [heads, S * G, parts, D]; part_lse: their log2-sum-exp2, [heads, S * G, parts].
            This is part `top_k` of each query.
    """
    config, width = problem.config, tensors[0].shape[3]
    rows, columns = problem.past_rows, 64 if problem.most_rows >= 64 and width <= 128 else 32
    tiles = -(-problem.stop // rows) - problem.sparse_start // rows
    programs = min(tiles * len(heads_here) * problem.group, _programs(tensors[0].device))
    room = triton.cdiv(problem.num_blocks, 64) * 64
    most, groups = triton.next_power_of_2(max(1, config.top_k)), triton.next_power_of_2(room // GROUP_BLOCKS)
    scores = torch.empty(programs, rows, room, dtype=torch.float32, device=chosen.device)
    peaks = torch.empty(programs, rows, room // GROUP_BLOCKS, dtype=torch.float32, device=chosen.device)
    candidates = torch.empty(programs, rows, most * GROUP_BLOCKS, dtype=torch.int32, device=chosen.device)
    _attend_past[(programs,)](
        *tensors, *field, calibration, chosen, part_o, part_lse, scores, peaks, candidates,
        *(stride for x in tensors for stride in x.stride()[:3]),
        tensors[1].shape[2], len(heads_here), heads_here.start, field.centred_k.shape[1], field.states.shape[1],
        tiles, room, problem.sparse_start, problem.q_start, problem.num_queries, *problem.score_scales, problem.scale,
        G=problem.group, B=config.block_size, UNIT=config.unit, TOP_K=config.top_k, KP=most,
        GROUP=GROUP_BLOCKS, GROUPS=min(64, max(16, groups)), D=width, DP=padded(width), BM=rows, BN=columns,
        KEYS=min(rows, 64), CHOOSE=config.top_k > 0 and not given, FAR=config.far != "drop",
        MOMENTS=config.far == "moments", STATE=config.state != "none",
        num_warps=8 if rows >= 128 else 4, num_stages=1,
    )  # fmt: skip


def _programs(device: torch.device) -> int:
    """Programs that a GPU runs at the same time."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _write_scores(
    scores, peaks, tile_q, square, centred_k, var_k, mean_factor, stop, room,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    """Write the scores of all past blocks and the largest of every GROUP; from `stop` on those of the last block."""
    row, d = tl.arange(0, BM), tl.arange(0, DP)
    # In the result of a product a thread holds columns 2 i, 2 i + 1 of every 8. Blocks are laid to columns such that
    # those are blocks in a row: then a thread finds the largest of a group alone, and writes them together.
    column = tl.arange(0, BN)
    turned = row % (BM // 8) // 2 * 16 + row // (BM // 8) * 2 + row % 2
    order = column // 2 % 4 * (BN // 4) + column // 8 * 2 + column % 2
    # the next tile is on its way while this one is worked on
    next_n = tl.minimum(order, stop - 1)[None, :] * D + d[:, None]
    next_k = tl.load(centred_k + next_n, mask=(d < D)[:, None], other=0.0)
    next_var = tl.load(var_k + next_n, mask=(d < D)[:, None], other=0.0) if MOMENTS else next_k
    for start in range(0, stop, BN):
        own_centred, own_var = next_k, next_var
        next_n = tl.minimum(start + BN + order, stop - 1)[None, :] * D + d[:, None]
        next_k = tl.load(centred_k + next_n, mask=(d < D)[:, None], other=0.0)
        next_var = tl.load(var_k + next_n, mask=(d < D)[:, None], other=0.0) if MOMENTS else next_k
        tile = tile_scores(tile_q, square, own_centred, own_var, mean_factor, MOMENTS)
        tile = tl.permute(tl.reshape(tile, [BM, BN // 8, 4, 2]), (0, 2, 1, 3))
        groups = tl.reshape(tile, [BM, BN // GROUP, GROUP])
        # rows as the threads that write them are laid out, so that a row stays in its warp
        tile = tl.reshape(tl.permute(tl.reshape(tile, [BM // 16, 8, 2, BN]), (1, 0, 2, 3)), [BM, BN])
        tl.store(scores + turned[:, None] * room + start + tl.arange(0, BN)[None, :], tile)
        at = row[:, None] * (room // GROUP) + start // GROUP
        tl.store(peaks + at + tl.arange(0, BN // GROUP)[None, :], tl.max(groups, 2))


@triton.jit
def _read_far(
    scores, mean_v, top, stop, room, find: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The softmax over the scores that are left; `top` is about the largest of them, and is found if `find` says so."""
    row, column, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    at = row[:, None] * room + column[None, :]
    there = row[:, None] >= 0
    if find:
        for start in range(0, stop, BN):
            held = there & (start + column < stop)[None, :]
            top = tl.maximum(top, tl.max(tl.load(scores + at + start, mask=held, other=float("-inf")), 1))
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    # the next tile is on its way while this one is worked on
    next_scores = tl.load(scores + at, mask=there & (column < stop)[None, :], other=float("-inf"))
    next_n = tl.minimum(column, stop - 1)[:, None] * D + d[None, :]
    next_values = tl.load(mean_v + next_n, mask=(d < D)[None, :], other=0.0)
    for start in range(0, stop, BN):
        own, values = next_scores, next_values
        held = there & (start + BN + column < stop)[None, :]
        next_scores = tl.load(scores + at + start + BN, mask=held, other=float("-inf"))
        next_n = tl.minimum(start + BN + column, stop - 1)[:, None] * D + d[None, :]
        next_values = tl.load(mean_v + next_n, mask=(d < D)[None, :], other=0.0)
        weights = tl.exp2(own - top[:, None])
        total += tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return top, total, acc


@triton.jit(
    do_not_specialize=[
        "heads",
        "heads_here",
        "first_head",
        "num_blocks",
        "num_states",
        "num_tiles",
        "sparse_start",
        "q_start",
        "num_queries",
    ]
)
def _attend_past(
    q, k, v, centred_k, var_k, mean_v, first_k, states, calibration, chosen, part_o, part_lse, scores, peaks, candidates,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    heads, heads_here, first_head, num_blocks, num_states, num_tiles, room, sparse_start, q_start, num_queries,
    mean_scale, var_scale, scale,
    G: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KEYS: tl.constexpr,
    CHOOSE: tl.constexpr, FAR: tl.constexpr, MOMENTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64) * BM
    scores += slot * room
    peaks += slot * (room // GROUP)
    candidates += slot * (KP * GROUP)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    num_sparse = q_start + num_queries - sparse_start
    heads_all = heads_here * G
    for work in range(tl.program_id(0), num_tiles * heads_all, tl.num_programs(0)):
        tile = num_tiles - 1 - work // heads_all  # the longest first
        own_z, member = work % heads_all // G, work % G
        z = (first_head + own_z).to(tl.int64)
        row, head = z // heads, z % heads * G + member
        first = (sparse_start // BM + tile) * BM
        token = first + tl.arange(0, BM)
        valid = (token >= sparse_start) & (token < q_start + num_queries)
        sparse = (token - sparse_start).to(tl.int64)
        own = q + row * qb + head * qh + (token - q_start).to(tl.int64)[:, None] * qt + d[None, :]
        tile_q = tl.load(own, mask=valid[:, None] & inside, other=0.0)
        block = first // B
        stop = block * (B // UNIT)
        scalars = calibration + head * 5
        top = tl.full([BM], -1e38, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        if CHOOSE or FAR:
            wide = tile_q.to(tl.float32)
            mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
            square = (wide * wide * var_factor).to(var_k.dtype.element_ty)
            shift = mean_factor * tl.sum(wide * tl.load(first_k + z * D + d, mask=d < D, other=0.0)[None, :], 1)
            shift += tl.load(scalars) * 1.4426950408889634 + tl.log2(UNIT * 1.0)  # what all blocks share
            at = z * num_blocks * D
            _write_scores(
                scores, peaks, tile_q, square, centred_k + at, var_k + at, mean_factor, stop, room, D, DP, BM, BN,
                GROUP, MOMENTS,
            )  # fmt: skip
            tl.debug_barrier()
            rank = tl.arange(0, KP)[None, :]
            to = chosen + ((row * num_sparse + sparse[:, None]) * heads * G + head) * TOP_K + rank
            real = valid[:, None] & (rank < TOP_K)
            if CHOOSE:
                blocks, top = best_blocks(scores, peaks, candidates, stop, room, BM, TOP_K, KP, GROUP, GROUPS)
                tl.store(to, blocks, mask=real)
            else:
                blocks = tl.load(to, mask=real, other=0)
        if FAR:
            at = tl.arange(0, BM)[:, None] * room
            nothing = tl.full([BM, KP], float("-inf"), tl.float32)
            tl.store(scores + at + blocks, nothing, mask=real & (blocks < stop))
            tl.debug_barrier()
            at = z * num_blocks * D
            top, total, acc = _read_far(scores, mean_v + at, top, stop, room, not CHOOSE, D, DP, BM, BN)
            top += shift
            acc *= tl.load(scalars + 3)
            if STATE:
                at = (z * num_states + block) * D * D
                state = tl.load(
                    states + at + d[:, None] * D + d[None, :], mask=(d < D)[:, None] & inside, other=0.0
                )  # fmt: skip
                factor = scale * tl.load(scalars + 4)
                # the queries are multiplied as they are: no registers for a copy of them
                factor = total * tl.where(tl.abs(factor) < 1e-20, 1e-20, factor)
                acc = tl.dot(tile_q.to(state.dtype), state, acc / factor[:, None], input_precision="ieee")
                acc *= factor[:, None]

        for start in range(block * B, first + BM, KEYS):
            key = start + tl.arange(0, KEYS)
            held = (key < q_start + num_queries)[:, None] & inside
            far_key = key.to(tl.int64)[:, None]
            own_k = tl.load(k + row * kb + z % heads * kh + far_key * kt + d[None, :], mask=held, other=0.0)
            own_v = tl.load(v + row * vb + z % heads * vh + far_key * vt + d[None, :], mask=held, other=0.0)
            tile_s = tl.dot(tile_q, tl.trans(own_k), input_precision="ieee") * mean_scale
            tile_s = tl.where(key[None, :] <= token[:, None], tile_s, float("-inf"))
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
        tl.debug_barrier()  # others may still read scores that the next tile overwrites
