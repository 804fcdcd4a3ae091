"""A step of decoding by kernels computes what the reference defines: on a GPU, or interpreted on a CPU."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import reference_attention
from bsbr.ops.block_cache import BlockCache
from bsbr.ops.shared_cache import block_cache
from bsbr.ops.triton import early_launch
from bsbr.ops.triton.problem import why_not_decode
from tests.ops.cases import Case, error_bound
from tests.ops.test_triton import DEVICE, GPU, gpu, needs_gpu, not_interpreted, pass_under_the_interpreter, runs_kernels

CASES = {
    "plain": (BSBRConfig(block_size=32, top_k=2, dense_below=0), (1, 162, 4, 2, 16), 1, "full"),
    "units, rows, two tokens": (
        BSBRConfig(block_size=32, retrieval_block_size=16, top_k=3, dense_below=0), (2, 130, 2, 1, 24), 2, "full",
    ),
    "dropped far field": (BSBRConfig(block_size=16, top_k=2, dense_below=0, far="drop"), (1, 98, 2, 2, 16), 1, "full"),
    "states only": (BSBRConfig(block_size=16, top_k=0, dense_below=0), (2, 82, 2, 1, 16), 1, "states"),
    "odd block, means": (
        BSBRConfig(block_size=48, retrieval_block_size=16, top_k=1, dense_below=0, far="mean"), (1, 146, 2, 1, 16), 1,
        "full",
    ),
    "means with state": (
        BSBRConfig(block_size=16, top_k=1, dense_below=0, far="mean", state="global"), (1, 66, 3, 3, 16), 1, "full",
    ),
    "eighteen columns": (BSBRConfig(block_size=16, top_k=3, dense_below=0), (1, 2100, 9, 1, 16), 2, "full"),
    "own block in two parts": (
        BSBRConfig(block_size=192, retrieval_block_size=64, top_k=3, dense_below=0), (1, 746, 2, 1, 16), 1, "full",
    ),
}  # fmt: skip

WIDE = {
    "128, 128": (BSBRConfig(block_size=128, top_k=8, dense_below=0), (2, 12000, 8, 2, 128), 1, "full"),
    "128, 64": (BSBRConfig(block_size=128, top_k=8, dense_below=0), (1, 5000, 8, 2, 64), 3, "full"),
    "64 with 16, 96": (BSBRConfig(block_size=64, top_k=16, dense_below=0), (1, 3000, 4, 4, 96), 1, "full"),
    "256 of 32, 128": (
        BSBRConfig(block_size=256, retrieval_block_size=32, top_k=12, dense_below=0), (1, 4000, 8, 1, 128), 2, "full",
    ),
    "wide heads": (BSBRConfig(block_size=128, top_k=2, dense_below=0), (1, 2000, 2, 1, 256), 1, "full"),
}  # fmt: skip


def draw(name, dtype):
    config, (rows, tokens, heads, key_heads, width), steps, mode = {**CASES, **WIDE}[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).double().to(DEVICE)

    q, k, v = (
        normal(rows, tokens, heads, width),
        normal(rows, tokens, key_heads, width),
        normal(rows, tokens, key_heads, width),
    )
    calibration = torch.tensor([0.0, 1, 1, 1, 1]).to(DEVICE) + 0.1 * normal(heads, 5).float()
    return Case(0, config, q, k + 0.5, v, calibration, 0, None), steps, mode


def decoded(cache, tensors, calibration, start, stop, steps):
    outputs = []
    while start < stop:
        part = [x[:, start : min(stop, start + steps)] for x in tensors]
        outputs.append(cache.attend(*part, scale=part[0].shape[-1] ** -0.5, calibration=calibration))
        start += steps
    return torch.cat(outputs, 1)


def check(name, dtype, new_tokens):
    """The last tokens, the ends of blocks among them, decoded after all others have been filled in."""
    case, steps, mode = draw(name, dtype)
    tensors, tokens = case.tensors(dtype), case.k.shape[1]
    start = tokens - new_tokens
    obstacle = why_not_decode(*(x[:, :steps] for x in tensors), case.config)
    if obstacle:
        pytest.skip(obstacle)
    cache = BlockCache(case.config, mode)
    cache.fill(tensors[1][:, :start], tensors[2][:, :start])
    o = decoded(cache, tensors, case.calibration, start, tokens, steps)
    case.q, case.q_start, case.options = case.q[:, start:], start, {"q_start": start, "lengths": None}
    late = (tensors[0][:, start:], *tensors[1:])
    expected, _, chosen = reference_attention(*late, case.config, q_start=start, calibration=case.calibration)
    assert o.dtype == dtype
    excess = (o.double() - expected).abs() / error_bound(case, *late, chosen)
    assert excess.max() <= 1, f"{excess.max():.3g} times the bound"


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_each_token_equals_the_reference(name):
    check(name, torch.float32, 40 if GPU else 4)


@runs_kernels
@pytest.mark.parametrize("name", ["plain", "units, rows, two tokens"])
def test_many_columns_are_searched_together_to_the_same_bits(name, monkeypatch):
    from bsbr.ops.triton import decode

    case, steps, mode = draw(name, torch.float32)
    tensors, tokens = case.tensors(torch.float32), case.k.shape[1]
    outputs = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(decode, "_MANY_COLUMNS", most)
        cache = BlockCache(case.config, mode)
        cache.fill(*(x[:, : tokens - 4] for x in tensors[1:]))
        outputs.append(decoded(cache, tensors, case.calibration, tokens - 4, tokens, steps))
    assert torch.equal(*outputs)


@runs_kernels
@pytest.mark.parametrize(
    ("query", "held"), [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=["float32", "float16"]
)
def test_queries_need_not_have_the_dtype_of_the_cache(query, held):
    """As after a text that was read under autocast."""
    config, generator = BSBRConfig(block_size=16, top_k=2, dense_below=0), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 90, heads, 16, generator=generator).half().to(DEVICE) for heads in (2, 1, 1))
    cache = BlockCache(config)
    cache.fill(k[:, :-1].to(held), v[:, :-1].to(held))
    o = cache.attend(*(x[:, -1:].to(query) for x in (q, k, v)), scale=0.25)
    expected = reference_attention(q.float(), k.float(), v.float(), config, scale=0.25)[0]
    torch.testing.assert_close(o[:, 0].double(), expected[:, -1], rtol=0, atol=2e-5 if query == torch.float32 else 1e-3)


@runs_kernels
@pytest.mark.parametrize("name", ["plain", "eighteen columns"])
def test_a_far_field_in_one_part_is_read_tile_by_tile(name, monkeypatch):
    from bsbr.ops.triton import decode

    monkeypatch.setattr(decode, "_FAR_PARTS", 1)
    check(name, torch.float32, 2)


NUMBERS = {
    "plain": BSBRConfig(block_size=16, top_k_per_head=(3, 0, 1), dense_below=0),
    "units": BSBRConfig(block_size=32, retrieval_block_size=16, top_k_per_head=(2, 5, 2), dense_below=0),
    "dropped far field": BSBRConfig(block_size=16, top_k_per_head=(1, 4, 2), dense_below=40, far="drop"),
}


@gpu
@needs_gpu
@pytest.mark.parametrize(("name", "most"), [("plain", 1 << 30), ("units", 0), ("dropped far field", 1 << 30)])
def test_heads_that_read_different_numbers_are_one_step(name, most, monkeypatch):
    """From the first blocks on, where some read all there is; one part is too long for one step."""
    from bsbr.ops.triton import decode

    monkeypatch.setattr(decode, "_MANY_COLUMNS", most)
    config, generator = NUMBERS[name], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 96, heads, 16, generator=generator).to(DEVICE) for heads in (6, 3, 3))
    calibration = torch.tensor([0.0, 1, 1, 1, 1]) + 0.1 * torch.randn(6, 5, generator=generator)
    cache, outputs, start = block_cache(config), [], 0
    for size in (19, 1, 20, 24, 32):
        part = [x[:, start : start + size] for x in (q, k, v)]
        outputs.append(cache.attend(*part, scale=0.25, calibration=calibration.to(DEVICE)))
        start += size
    assert len(cache._caches) == 1
    expected = reference_attention(q, k, v, config, scale=0.25, calibration=calibration.to(DEVICE))[0]
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=0, atol=3e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_each_token_of_wide_heads_equals_the_reference(name, dtype):
    check(name, dtype, 140)


@runs_kernels
@pytest.mark.parametrize("token", [643, 1600])
def test_a_key_that_is_no_number_shows(token):
    """Also where its block is neither in the tiles that are searched nor has a state that would show it."""
    config = BSBRConfig(block_size=16, top_k=1, dense_below=0, far="mean", state="none")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16 * 140 + 2, heads, 16, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    k[0, token] = torch.nan
    cache = BlockCache(config)
    cache.fill(k[:, :-1], v[:, :-1])
    assert cache.attend(q[:, -1:], k[:, -1:], v[:, -1:], scale=0.25).isnan().all()


@runs_kernels
def test_rows_of_different_lengths_decode_together():
    config = BSBRConfig(block_size=16, top_k=1, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 90, heads, 16, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    cache, starts = BlockCache(config), [70, 46]
    cache.attend(q[:, :70], k[:, :70], v[:, :70], scale=0.25, counts=starts)
    expected = reference_attention(q, k, v, config, scale=0.25)[0]
    for step in range(3):
        part = [torch.stack([x[row, start + step] for row, start in enumerate(starts)])[:, None] for x in (q, k, v)]
        o = cache.attend(*part, scale=0.25)
        for row, start in enumerate(starts):
            torch.testing.assert_close(o[row, 0].double(), expected[row, start + step], rtol=0, atol=2e-5)
    cache.crop([72, 46])
    o = cache.attend(q[:, 72:73], k[:, 72:73], v[:, 72:73], scale=0.25, counts=[1, 0])
    torch.testing.assert_close(o[0, 0].double(), expected[0, 72], rtol=0, atol=2e-5)


@gpu
@needs_gpu
def test_a_cuda_graph_of_a_step_goes_on_through_the_text():
    case, _, _ = draw("128, 128", torch.bfloat16)
    tensors, start = case.tensors(torch.bfloat16), 11_900
    cache = BlockCache(case.config)
    cache.fill(tensors[1][:, :start], tensors[2][:, :start])
    cache.reserve(12_000)
    options = {"scale": 128**-0.5, "calibration": case.calibration}
    token = [x[:, start : start + 1].clone() for x in tensors]
    outputs = [cache.attend(*token, **options)]
    for buffer, x in zip(token, tensors, strict=True):
        buffer.copy_(x[:, start + 1 : start + 2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cache.attend(*token, **options)
    for at in range(start + 1, 12_000):
        for buffer, x in zip(token, tensors, strict=True):
            buffer.copy_(x[:, at : at + 1])
        graph.replay()
        if at > start + 1:
            cache.replayed()
        outputs.append(o.clone())
    again = BlockCache(case.config)
    again.fill(tensors[1][:, :start], tensors[2][:, :start])
    assert torch.equal(torch.cat(outputs, 1), decoded(again, tensors, case.calibration, start, 12_000, 1))


@pytest.mark.parametrize(("driver", "early"), [(12_020, False), (13_000, True)])
def test_launches_go_out_early_where_a_graph_can_hold_that(driver, early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(early_launch, "_driver_version", lambda: driver)
    assert early_launch.starts_early.__wrapped__(torch.device("cuda", 0)) is early


@gpu
@needs_gpu
def test_the_driver_tells_its_version():
    assert early_launch._driver_version() >= 12_000


@not_interpreted
def test_kernels_under_the_interpreter():
    pass_under_the_interpreter(__file__)
