"""Scores of past blocks on Hopper GPUs: those of `bsbr.ops.triton.scores` bit by bit, in less time.

In Gluon, Triton's language below the level at which the compiler places loads, waits and registers. Tensor descriptors
(TMA) bring the next tiles of summaries into shared memory while this one is worked on, so that no fence of the products
waits for loads; both products run without a wait between them; and a thread writes what it holds, 16 bytes at a time,
without an exchange between threads.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import PropagateNan

from bsbr.ops.triton.problem import Problem
from bsbr.ops.triton.scores import SHARE, VARYING, Scores, Tiles, score_factors, tile_of
from bsbr.ops.triton.short_scores import ROUNDING, STEPS, encode
from bsbr.ops.triton.summaries import FarField

_BLOCKS, _STAGES = 64, 2
"""Blocks of a tile, and tiles that are on their way or worked on."""

_NAN = gl.constexpr(PropagateNan.ALL)
_LEFT_OUT = gl.constexpr(-1e30)


def arrange(field: FarField) -> TensorDescriptor:
    """Lay mean keys and variances out as the products read them.

    A thread holds columns 2 i, 2 i + 1 of every 8 in the result of a product. Blocks are laid to columns such that
    these are two groups of 8 blocks in a row, 32 blocks apart.

    Args:
        field: summaries in bfloat16.
    Returns:
        [Z * tiles * 2 * 64, D]: of each tile of 64 blocks the mean keys, then the variances; zeros behind the last.
    """
    both = torch.stack((field.centred_k, field.var_k), 1)
    heads, _, num_blocks, width = both.shape
    tiles = -(-num_blocks // _BLOCKS)
    both = torch.nn.functional.pad(both, (0, 0, 0, tiles * _BLOCKS - num_blocks))
    halves = both.view(heads, 2, tiles, 2, 4, 4, 2, width)  # block = 32 half + 8 i + 2 j + e
    laid = halves.permute(0, 2, 1, 3, 5, 4, 6, 7).reshape(-1, width).contiguous()  # column = 32 half + 8 j + 2 i + e
    block = [2 * _BLOCKS, width]
    return TensorDescriptor.from_tensor(laid, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def write_scores_on_hopper(
    problem: Problem, tiles: Tiles, q: Tensor, arranged: TensorDescriptor, calibration: Tensor, scores: Scores
) -> None:
    """Do what `bsbr.ops.triton.scores.write_scores` does.

    Args:
        problem, tiles, q, calibration, scores: as there.
        arranged: from `arrange`.
    """
    config, heads = problem.config, q.shape[2] // problem.group
    tiles_of_head = arranged.shape[0] // (2 * _BLOCKS * q.shape[0] * heads)
    _write_scores_hopper[(tiles.count // SHARE,)](
        q, arranged, calibration, *scores, *q.stride()[:3], heads, len(tiles.heads) * problem.group,
        tiles.heads.start, tiles.first, tiles.per_head, tiles_of_head, tiles.room, problem.sparse_start,
        problem.q_start, problem.num_queries, *problem.score_scales, G=problem.group, B=config.block_size,
        UNIT=config.unit, D=q.shape[3], BM=tiles.rows, BN=_BLOCKS, SHARE=SHARE, STAGES=_STAGES,
        MOMENTS=config.far == "moments", num_warps=4 * SHARE, maxnreg=128,
    )  # fmt: skip


@gluon.jit
def _larger(a, b):
    return gl.maximum(a, b, propagate_nan=_NAN)


@gluon.jit
def _fetch(arranged, arrived, buffers, tile, first_tile, num_tiles, STAGES: gl.constexpr):
    """Send for a tile of summaries, if there is one."""
    slot, there = tile % STAGES, tile < num_tiles
    mbarrier.expect(arrived.index(slot), arranged.block_type.nbytes, pred=there)
    row = (first_tile + tile) * arranged.block_type.shape[0]
    tma.async_copy_global_to_shared(arranged, [row, 0], arrived.index(slot), buffers.index(slot), pred=there)


@gluon.jit(do_not_specialize=[*VARYING, "tiles_of_head", "q_start", "num_queries"])
def _write_scores_hopper(
    q, arranged, calibration, scores, bests, peaks, qb, qt, qh,
    heads, heads_all, first_head, first_work, num_tiles, tiles_of_head, room, sparse_start, q_start, num_queries,
    mean_scale, var_scale,
    G: gl.constexpr, B: gl.constexpr, UNIT: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SHARE: gl.constexpr, STAGES: gl.constexpr, MOMENTS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = SHARE * BM
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    loading: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    # a thread's 8 blocks in a row, then those 32 further on, then the row 8 further on
    writing: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]], [], [ROWS, BN],
    )  # fmt: skip
    room = gl.multiple_of(room, 64)
    work = gl.program_id(0) * SHARE + first_work
    first, own_z, member = tile_of(work, num_tiles, heads_all, sparse_start, G, BM)
    z = (first_head + own_z).to(gl.int64)
    stop = first // B * (B // UNIT)
    tiles = (stop + BN - 1) // BN

    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(arrived.index(s), count=1)
    fence_async_shared()  # what copies see the barriers by
    buffers = gl.allocate_shared_memory(arranged.dtype, [STAGES, 2 * BN, D], arranged.layout)
    first_tile = ((first_head + own_z) * tiles_of_head).to(gl.int32)
    for s in gl.static_range(STAGES):
        _fetch(arranged, arrived, buffers, s, first_tile, tiles, STAGES)

    place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, loading))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, loading))
    head, token = z % heads * G + member + place // BM, first + place % BM
    valid = (token >= sparse_start) & (token < q_start + num_queries)
    at = z // heads * qb + head * qh + (token - q_start).to(gl.int64) * qt
    tile_q = gl.load(q + at[:, None] + d[None, :], mask=valid[:, None], other=0.0)
    mean_factor, var_factor = score_factors(calibration, head, mean_scale, var_scale)
    wide = tile_q.to(gl.float32)
    square = (wide * wide * var_factor[:, None]).to(arranged.dtype)
    square = gl.convert_layout(square, gl.DotOperandLayout(0, product, 2))
    in_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], arranged.dtype)
    own_q = gl.allocate_shared_memory(arranged.dtype, [ROWS, D], in_shared, tile_q)
    fence_async_shared()
    factor = gl.convert_layout(mean_factor * STEPS, gl.SliceLayout(1, product))

    program = gl.program_id(0).to(gl.int64)
    scores += program * ROWS * room
    bests += program * ROWS * (room // BN)
    if peaks is not None:
        peaks += program * ROWS * (room // 8)
    zero = gl.zeros([ROWS, BN], gl.float32, layout=product)
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, product))
    block = column // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, writing))
    each = row // BM * (BM * room) + row % BM * BN
    to = scores + each[:, None] + gl.arange(0, BN, layout=gl.SliceLayout(0, writing))[None, :]
    for i in range(tiles):
        own = buffers.index(i % STAGES)
        mbarrier.wait(arrived.index(i % STAGES), i // STAGES & 1)
        acc = warpgroup_mma(own_q, own.slice(0, BN, 0).permute((1, 0)), zero, use_acc=False, is_async=True)
        if MOMENTS:
            acc = warpgroup_mma(square, own.slice(BN, BN, 0).permute((1, 0)), acc, is_async=True)
        tile = warpgroup_mma_wait(0, deps=(acc,))
        _fetch(arranged, arrived, buffers, i + STAGES, first_tile, tiles, STAGES)
        tile = tile * factor[:, None] + ROUNDING
        left = stop - i * BN
        if left < BN:  # what is not past, even if it is no number, is none of the tile's best
            tile = gl.where((block < left)[None, :], tile, _LEFT_OUT)
        groups = tile.reshape([ROWS, BN // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, BN // 8, 8])
        most = gl.reduce(groups, 2, _larger)
        best = gl.max(most, 1)
        code = encode(best[:, None, None] - groups).reshape([ROWS, BN])
        best += 0.0 * gl.sum(most, 1) - ROUNDING  # a score that is no number leaves none of its tile's
        gl.store(to + i * (BM * BN), gl.convert_layout(code, writing))
        if peaks is not None:
            group = gl.arange(0, ROWS)[:, None] * (room // 8) + i * (BN // 8) + gl.arange(0, BN // 8)[None, :]
            gl.store(peaks + group, most - ROUNDING)
        own_row = gl.arange(0, ROWS)
        gl.store(bests + own_row // BM * (BM * (room // BN)) + i * BM + own_row % BM, best)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(s))
