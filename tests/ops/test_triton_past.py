"""Scores of past blocks in 16 bits, the searches for a long past and for many blocks: at full precision of products.

Kernels take scores in 16 bits for 16-bit input; here all of these are asked for in float32.
"""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from tests.ops.choices import ROUNDING, choices, masses, wrong_choices
from tests.ops.test_triton import (
    DEVICE,
    check_gradients,
    draw,
    gpu,
    needs_gpu,
    not_interpreted,
    pass_under_the_interpreter,
    runs_kernels,
)

FAR = BSBRConfig(block_size=16, top_k=4, dense_below=0)
"""With 1,312 tokens 81 past blocks, in two tiles."""

UNCALIBRATED = torch.tensor([[0.0, 1, 1, 1, 1]], device=DEVICE).repeat(2, 1)


@pytest.fixture(
    params=[
        "16 bits", "by tiles", "16 bits, by tiles", "8 peaks at once", pytest.param("many", marks=[gpu, needs_gpu])
    ]
)  # fmt: skip
def way(request, monkeypatch) -> str:
    """Ask for it."""
    if "16 bits" in request.param and DEVICE == "cuda":
        pytest.skip("Triton 3.6 mixes up float32 products written in 16 bits; only 16-bit input has them so")
    ask_for(request.param, monkeypatch)
    return request.param


def ask_for(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels score and search in this way."""
    from bsbr.ops.triton import operator, past, problem, search, search_many

    make = problem.make_problem
    short = "16 bits" in way
    for module in (operator, problem):
        monkeypatch.setattr(
            module, "make_problem", lambda *sizes: make(*sizes)._replace(most_rows=64, short_scores=short)
        )
    if "by tiles" in way:
        monkeypatch.setattr(search, "_MANY_GROUPS", 0)
    if "peaks" in way:
        monkeypatch.setattr(search, "_AT_ONCE", 0)
        monkeypatch.setattr(search, "_COLUMNS", 8)
    if "many" in way:
        monkeypatch.setattr(past, "MOST_WRITTEN_OUT", 0)
    if "in parts" in way:
        monkeypatch.setattr(search_many, "_COLUMNS", 32)


def late(tokens: int = 1312, rows: int = 4, outlier: float = 0.0) -> list[torch.Tensor]:
    """Queries of the last rows, keys that differ by block, values; block 1 outweighs the others for the first head."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 16, generator=generator) for n, heads in ((rows, 2), (tokens, 1), (tokens, 1)))
    k += torch.randn(1, tokens // 16, 1, 16, generator=generator).repeat_interleave(16, 1)
    k[:, 16:32] += outlier * q[0, 0, 0]
    return [x.to(DEVICE) for x in (q, k, v)]


@runs_kernels
@pytest.mark.parametrize(("far", "outlier"), [("moments", 0.0), ("moments", 30.0), ("drop", 30.0)])
def test_late_queries_choose_and_read_as_the_reference(way, outlier, far):
    """A weight may be off by two steps of its score at most, whatever outweighs it and is read exactly."""
    q, k, v = late(outlier=outlier)
    config = BSBRConfig(block_size=16, top_k=4, dense_below=0, far=far, state="none" if far == "drop" else "global")
    start = k.shape[1] - q.shape[1]
    found = choices("triton", q, k, v, config, UNCALIBRATED, start)
    mass, size = masses(q.cpu(), k.cpu(), config, UNCALIBRATED.cpu(), start)
    assert wrong_choices(found.cpu(), mass, size, config.top_k, ROUNDING["triton"])[0] == 0
    expected = reference_attention(q, k, v, config, q_start=start, block_indices=found)[0]
    actual = bsbr_attention(q, k, v, config, q_start=start, backend="triton")
    assert (actual.double() - expected).abs().max() <= (2.0**-11 if far != "drop" else 2.0**-18) * v.abs().max()


@gpu
@needs_gpu
@pytest.mark.parametrize("counts", [None, (40, 33), (64, 50)], ids=str)
def test_more_blocks_than_the_search_writes_out(counts):
    """Of 81 past blocks; the first call reads 48 with every head."""
    q, k, v = late()
    k, v = (torch.cat([x, x.roll(7, 1)], 2) for x in (k, v))
    config = BSBRConfig(block_size=16, top_k=48, top_k_per_head=counts, dense_below=0)
    start = k.shape[1] - q.shape[1]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, lse = bsbr_attention(*leaves, config, q_start=start, backend="triton", return_lse=True)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse, _ = reference_attention(*wide, config, q_start=start)
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-5)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = torch.autograd.grad(o, leaves, do)
    for a, b in zip(found, torch.autograd.grad(expected, wide, do.double()), strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm()


@runs_kernels
def test_equal_blocks_in_tiles_of_different_best_go_to_the_lower(way):
    """Blocks 3 and 70 are equal, 71 is better: with two to read they are 3 and 71. The score is no whole step."""
    blocks = 72
    k = torch.full((1, 16 * blocks + 1, 1, 16), -1.0)
    k[:, 48:64] = k[:, 1120:1136] = 0.0371
    k[:, 1136:1152] = 0.7
    v = torch.zeros_like(k)
    v[:, 48:64, :, 0] = v[:, 1120:1136, :, 1] = v[:, 1136:1152, :, 2] = 1
    q = torch.ones(1, 1, 2, 16)
    config = BSBRConfig(block_size=16, top_k=2, far="drop", dense_below=0)
    o = bsbr_attention(*(x.to(DEVICE) for x in (q, k, v)), config, q_start=16 * blocks, backend="triton")
    assert (o[0, 0, 0, :3] > 0).tolist() == [True, False, True]


@runs_kernels
@pytest.mark.parametrize("name", ["plain", "states only"])
def test_gradients_fit_the_scores_of_the_forward_pass(way, name):
    check_gradients(draw(name), torch.float32, 1e-3)


@runs_kernels
def test_nothing_is_left_of_a_past_that_is_read_whole(way):
    """The second head reads 4 of the 4 blocks before token 64, the first 3 in the same call; products are large."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 80, 2, 16, generator=generator).to(DEVICE) for _ in range(3))
    q = q[:, 64:]
    config = BSBRConfig(block_size=16, top_k_per_head=(3, 4), dense_below=0)
    for scale in (1, 20, 40):
        o, lse = bsbr_attention(scale * q, k, v, config, q_start=64, backend="triton", return_lse=True)
        wanted, wanted_lse, _ = reference_attention(scale * q, k, v, config, q_start=64)
        whole = slice(0, 16), 1
        torch.testing.assert_close(o[0][whole].double(), wanted[0][whole], rtol=0, atol=1e-4)
        torch.testing.assert_close(lse[0][whole].double(), wanted_lse[0][whole], rtol=1e-5, atol=1e-4)


@runs_kernels
def test_a_key_that_is_no_number_shows_where_its_block_is_past(way):
    q, k, v = late()
    k[0, 100] = torch.nan
    o = bsbr_attention(q, k, v, FAR, q_start=k.shape[1] - q.shape[1], backend="triton")
    assert o.isnan().any(-1).all()


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [16, 96, 128, 256])
@pytest.mark.parametrize(("block_size", "group"), [(16, 2), (32, 3), (128, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_in_16_bits_are_the_products_to_half_a_step(dtype, block_size, group, width):
    """Each score of each query, as written; products of squares are rounded to bfloat16 first."""
    from bsbr.ops.triton.problem import make_problem
    from bsbr.ops.triton.scores import Scores, Tiles, write_scores
    from bsbr.ops.triton.summaries import block_moments, far_field

    count, generator = 81, torch.Generator().manual_seed(0)
    tokens = block_size * (count + 1)
    q, k, v = (
        torch.randn(1, n, heads, width, generator=generator).to(DEVICE, dtype)
        for n, heads in ((8, group), (tokens, 1), (tokens, 1))
    )
    problem = make_problem(q, k, BSBRConfig(block_size=block_size, top_k=4, dense_below=0), width**-0.5, tokens - 8)
    field = far_field(block_moments(k, v, block_size, count, True), 1, dtype)
    rows, room, blocks = problem.tile_rows, 128, 64 if width <= 128 else 32
    each = torch.zeros(group, room // 64, rows, 64, dtype=torch.int16, device=DEVICE)
    bests = torch.zeros(group * room // blocks * rows, device=DEVICE)
    peaks = torch.zeros(group * rows * room // 8, device=DEVICE)
    calibration = UNCALIBRATED[:1].repeat(group, 1)
    tiles = Tiles(0, group, 1, rows, room, range(1), blocks)
    write_scores(problem, tiles, q, field, calibration, Scores(each, bests, peaks))
    code = (each.permute(0, 2, 1, 3).flatten(2).int() & 0xFFFF).double()
    below = torch.maximum(code, 16 * code - 491_520)
    best = bests.view(group, -1, rows).transpose(1, 2).repeat_interleave(blocks, 2)
    found = ((best - below) / 2048)[:, -8:, :count]
    mean_scale, var_scale = problem.score_scales
    own = q[0].transpose(0, 1).double()
    mean_k, var_k = (x[0].double().T for x in (field.centred_k, field.var_k))
    expected = own @ mean_k * mean_scale + own.square() @ var_k * var_scale
    rounding = 2.0**-8 * (own.square() @ var_k * var_scale)
    assert ((found - expected).abs() <= 2.0**-11 + rounding + 1e-5 * (own.abs() @ mean_k.abs())).all()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_long_past_is_searched_as_well_as_products_of_16_bits_allow(dtype):
    q, k, v = (x.to(dtype) for x in late(tokens=16_000, rows=200))
    start = k.shape[1] - q.shape[1]
    found = choices("triton", q, k, v, FAR, UNCALIBRATED, start)
    mass, size = masses(q.cpu(), k.cpu(), FAR, UNCALIBRATED.cpu(), start)
    assert wrong_choices(found.cpu(), mass, size, FAR.top_k, 2.0**-11)[0] == 0


@not_interpreted
def test_kernels_under_the_interpreter():
    pass_under_the_interpreter(__file__)
