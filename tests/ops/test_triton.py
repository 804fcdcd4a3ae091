"""The Triton backend computes what the reference defines: on a GPU, or interpreted on a CPU in a process of its own."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention, resolve_backend
from bsbr.ops.triton.problem import why_not_triton
from tests.ops.cases import Case, error_bound

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"

runs_kernels = pytest.mark.skipif(not (GPU or INTERPRETED), reason="kernels need a GPU or TRITON_INTERPRET=1")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

CASES = {
    "plain": (BSBRConfig(block_size=32, top_k=2, dense_below=0), (1, 170, 2, 1, 16), 0),
    "units, rows, dense prefix": (
        BSBRConfig(block_size=32, retrieval_block_size=16, top_k=3, dense_below=45), (2, 100, 1, 1, 32), 0,
    ),
    "late queries, dropped far field": (
        BSBRConfig(block_size=16, top_k=2, dense_below=0, far="drop"), (1, 110, 2, 1, 24), 70,
    ),
    "states only": (BSBRConfig(block_size=16, top_k=0, dense_below=0), (1, 60, 2, 1, 16), 0),
    "odd block, means": (
        BSBRConfig(block_size=48, retrieval_block_size=16, top_k=1, dense_below=0, far="mean"), (1, 110, 2, 1, 16), 0,
    ),
    "means with state": (
        BSBRConfig(block_size=16, top_k=1, dense_below=0, far="mean", state="global"), (1, 60, 3, 3, 16), 0,
    ),
    "no state": (BSBRConfig(block_size=16, top_k=2, dense_below=0, state="none"), (1, 90, 4, 2, 16), 0),
    "all dense": (BSBRConfig(block_size=32, top_k=2, dense_below=128), (1, 60, 2, 1, 16), 0),
}  # fmt: skip

BY_HEAD = {
    "units, rows": (
        BSBRConfig(block_size=32, retrieval_block_size=16, top_k_per_head=(3, 0, 4, 5), dense_below=0),
        (2, 180, 4, 4, 16), 0,
    ),
    "groups, late queries, dropped far field": (
        BSBRConfig(block_size=16, top_k_per_head=(3, 2, 4), dense_below=0, far="drop"), (1, 130, 6, 3, 16), 90,
    ),
    "one power, states": (BSBRConfig(block_size=16, top_k_per_head=(3, 4), dense_below=0), (1, 150, 4, 2, 24), 0),
}  # fmt: skip

WIDE = {
    "128, 64": (BSBRConfig(block_size=128, top_k=4, dense_below=0), (1, 1500, 8, 2, 64), 0),
    "128, 128": (BSBRConfig(block_size=128, top_k=4, dense_below=700), (1, 1500, 8, 2, 128), 0),
    "64, 96": (BSBRConfig(block_size=64, top_k=8, dense_below=0), (2, 900, 2, 2, 96), 0),
    "128 of 32": (BSBRConfig(block_size=128, retrieval_block_size=32, top_k=8, dense_below=0), (1, 1300, 4, 1, 128), 0),
    "32 with 16": (BSBRConfig(block_size=32, top_k=16, dense_below=0), (1, 1300, 4, 1, 64), 600),
    "256": (BSBRConfig(block_size=256, top_k=2, dense_below=0), (1, 1800, 4, 2, 64), 0),
    "wide heads": (BSBRConfig(block_size=128, top_k=2, dense_below=0), (1, 1000, 2, 1, 256), 0),
    "dense text": (BSBRConfig(block_size=128, top_k=4, dense_below=1024), (2, 700, 8, 2, 128), 0),
}  # fmt: skip


def draw(name: str, dtype: torch.dtype = torch.float32) -> Case:
    config, (rows, tokens, heads, key_heads, width), start = {**CASES, **BY_HEAD, **WIDE}[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double().to(DEVICE)

    return Case(
        seed=0,
        config=config,
        q=normal(rows, tokens - start, heads, width),
        k=normal(rows, tokens, key_heads, width) + 0.5,
        v=normal(rows, tokens, key_heads, width),
        calibration=torch.tensor([0.0, 1, 1, 1, 1]).to(DEVICE) + 0.1 * normal(heads, 5).float(),
        q_start=start,
        lengths=None,
    )


def check_values(case: Case, dtype: torch.dtype) -> None:
    q, k, v = case.tensors(dtype)
    options = {**case.options, "calibration": case.calibration}
    expected, _, chosen = reference_attention(q, k, v, case.config, **options)
    actual = bsbr_attention(q, k, v, case.config, **options, block_indices=chosen, backend="triton")
    assert actual.dtype == dtype
    excess = (actual.double() - expected).abs() / error_bound(case, q, k, v, chosen)
    assert excess.max() <= 1, f"{excess.max():.3g} times the bound"


def check_gradients(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    narrow = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    leaves = [x.detach().double().requires_grad_() for x in narrow]
    scalars = case.calibration.clone().requires_grad_()
    wide_scalars = case.calibration.double().requires_grad_()
    expected, _, chosen = reference_attention(*leaves, case.config, q_start=case.q_start, calibration=wide_scalars)
    actual = bsbr_attention(
        *narrow, case.config, q_start=case.q_start, calibration=scalars, block_indices=chosen, backend="triton"
    )
    do = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(dtype)
    options = {"allow_unused": True, "materialize_grads": True}
    wanted = torch.autograd.grad(expected, [*leaves, wide_scalars], do.double(), **options)
    found = torch.autograd.grad(actual, [*narrow, scalars], do, **options)
    for name, a, b in zip(("q", "k", "v", "calibration"), found, wanted, strict=True):
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"gradient of {name}: {error:.3g}"


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_values_stay_within_the_forward_error_bound(name):
    check_values(draw(name), torch.float32)


@runs_kernels
@pytest.mark.parametrize("name", ["plain", "units, rows, dense prefix"])
def test_tiles_as_large_as_those_of_16_bit_input(name, monkeypatch):
    """Smaller ones are for float32; these also hold several heads of a key head."""
    from bsbr.ops.triton import operator

    smaller = operator.make_problem
    monkeypatch.setattr(operator, "make_problem", lambda *sizes: smaller(*sizes)._replace(most_rows=64))
    check_values(draw(name), torch.float32)
    check_gradients(draw(name), torch.float32, 5e-6)


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_reference(name):
    check_gradients(draw(name), torch.float32, 5e-6)


@runs_kernels
@pytest.mark.parametrize("name", ["plain", "units, rows, dense prefix", "late queries, dropped far field"])
def test_it_chooses_the_blocks_the_reference_chooses(name):
    """With its own choice the output agrees only if every choice does."""
    case = draw(name)
    q, k, v = case.tensors(torch.float32)
    options = {**case.options, "calibration": case.calibration}
    expected = reference_attention(q, k, v, case.config, **options)[0]
    actual = bsbr_attention(q, k, v, case.config, **options, backend="triton")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


@runs_kernels
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=[gpu, needs_gpu])], ids=["one call", "by power"])
@pytest.mark.parametrize("name", BY_HEAD)
def test_heads_that_read_different_numbers_of_blocks(name, together, monkeypatch):
    """In one call, or in one for each power of two; its first queries have fewer past blocks than some head reads."""
    from bsbr.ops import shares
    from bsbr.ops.triton import operator

    if not together:
        monkeypatch.setattr(shares, "_ONE_CALL", 0)

    calls, forward = [], operator.forward
    monkeypatch.setattr(operator, "forward", lambda *given: calls.append(given) or forward(*given))
    case = draw(name)
    narrow = [x.float().requires_grad_() for x in (case.q, case.k, case.v)]
    leaves = [x.detach().double().requires_grad_() for x in narrow]
    scalars = case.calibration.clone().requires_grad_()
    options = {"q_start": case.q_start, "calibration": scalars, "return_lse": True, "backend": "triton"}
    o, lse = bsbr_attention(*narrow, case.config, **options)
    powers = {math.ceil(math.log2(n)) if n else None for n in case.config.top_k_per_head}
    assert len(calls) == (1 if together or case.q_start else len(powers))
    wide_scalars = case.calibration.double().requires_grad_()
    wanted, wanted_lse, _ = reference_attention(*leaves, case.config, q_start=case.q_start, calibration=wide_scalars)
    torch.testing.assert_close(o.double(), wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=2e-5)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    unused = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(o, [*narrow, scalars], do, **unused)
    expected = torch.autograd.grad(wanted, [*leaves, wide_scalars], do.double(), **unused)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 5e-6 * b.norm()


@runs_kernels
def test_exact_ties_go_to_the_lower_block():
    """Keys repeat block by block, so block scores tie exactly, and values tell which blocks were read."""
    generator = torch.Generator().manual_seed(0)
    config = BSBRConfig(dense_below=0, block_size=16, top_k=2, far="drop")
    block = torch.randint(-2, 3, (1, 16, 1, 16), generator=generator).float().to(DEVICE)
    k = block.repeat(1, 8, 1, 1)
    q = torch.randint(-2, 3, (1, 128, 2, 16), generator=generator).float().to(DEVICE)
    v = torch.randn(1, 128, 1, 16, generator=generator).to(DEVICE)
    expected = reference_attention(q, k, v, config)[0]
    actual = bsbr_attention(q, k, v, config, backend="triton")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


@runs_kernels
@pytest.mark.parametrize("better", [2, 65])
def test_a_better_block_pushes_the_later_of_two_equal_ones_out(better):
    """Two blocks are equal, a later one, perhaps in another tile of scores, is better: first and last are read."""
    blocks = better + 2
    k = torch.full((1, 16 * blocks, 1, 16), -1.0)
    k[:, :32], k[:, 16 * better : 16 * better + 16] = 0, 1
    q, v = torch.ones(1, 16 * blocks, 1, 16), torch.zeros(1, 16 * blocks, 1, 16)
    v[:, :16, :, 0] = v[:, 16:32, :, 1] = v[:, 16 * better : 16 * better + 16, :, 2] = 1
    config, start = BSBRConfig(block_size=16, top_k=2, far="drop", dense_below=0), 16 * blocks - 1
    o = bsbr_attention(*(x.to(DEVICE) for x in (q[:, start:], k, v)), config, q_start=start, backend="triton")
    assert (o[0, 0, 0, :3] > 0).tolist() == [True, False, True]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=[gpu, needs_gpu])], ids=str)
def test_no_earlier_output_changes_by_a_bit(dtype):
    config = BSBRConfig(block_size=16, top_k=1, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 120, heads, 16, generator=generator).to(DEVICE, dtype) for heads in (2, 1, 1))
    before = bsbr_attention(q, k, v, config, backend="triton")
    for t in range(3, 120, 1 if GPU else 47):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = x[:, t] + 1 if t % 2 else 1e4
        after = bsbr_attention(*changed, config, backend="triton")
        assert torch.equal(before[:, :t], after[:, :t]), f"token {t} changed an earlier output"
        assert not torch.equal(before[:, t], after[:, t])


@runs_kernels
def test_padding_changes_nothing():
    config = BSBRConfig(block_size=16, top_k=1, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 80, heads, 16, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    k[1, 53:], v[1, 53:] = torch.nan, torch.inf
    o, lse = bsbr_attention(
        q, k, v, config, lengths=torch.tensor([80, 53], device=DEVICE), backend="triton", return_lse=True
    )
    alone = bsbr_attention(q[1:, :53], k[1:, :53], v[1:, :53], config, backend="triton")
    torch.testing.assert_close(o[1:, :53], alone, rtol=0, atol=2e-6)
    assert not o[1, 53:].any()
    assert (lse[1, 53:] == -torch.inf).all()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_wide_values_stay_within_the_forward_error_bound(name, dtype):
    check_values(draw(name, dtype), dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize("name", WIDE)
def test_wide_gradients_are_those_of_the_reference(name):
    check_gradients(draw(name, torch.bfloat16), torch.bfloat16, 1e-2)


@gpu
@needs_gpu
def test_a_cuda_graph_replays_forward_and_compile_sees_through():
    case = draw("128, 128", torch.bfloat16)
    q, k, v = case.tensors(torch.bfloat16)
    expected = bsbr_attention(q, k, v, case.config, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bsbr_attention(q, k, v, case.config, backend="triton")
    graph.replay()
    assert torch.equal(captured, expected)
    compiled = torch.compile(lambda q, k, v: bsbr_attention(q, k, v, case.config, backend="triton"), fullgraph=True)
    assert torch.equal(compiled(q, k, v), expected)


def test_what_it_cannot_compute_is_named():
    q, v = torch.zeros(1, 9, 4, 64, device="meta"), torch.zeros(1, 9, 2, 64, device="meta")
    assert resolve_backend("auto", q, v, v, BSBRConfig())[0] == "chunked"
    with pytest.raises(ValueError, match="triton"):
        resolve_backend("triton", q, v, v, BSBRConfig(state="token"))


def test_more_blocks_than_kernels_are_written_out_for_are_left_to_other_backends(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 9, 2, 64)
    assert why_not_triton(x, x, x, BSBRConfig(top_k=128)) is None
    assert why_not_triton(x, x, x, BSBRConfig(top_k=129)) == "top_k 129"
    million = torch.zeros(1, 1 << 20, 8, 128, device="meta", dtype=torch.bfloat16)
    assert why_not_triton(million, million, million, BSBRConfig(top_k=8)) is None
    assert "so many queries" in str(why_not_triton(million, million, million, BSBRConfig(top_k=64)))


def test_texts_of_other_lengths_are_not_compiled_anew(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    counter = CompileCounter()
    config = BSBRConfig(block_size=16, top_k=40, dense_below=0)

    @torch.compile(backend=counter, fullgraph=True)
    def ask(q):
        return q + 1 if why_not_triton(q, q, q, config) is None else q

    for tokens in (700, 800, 900, 1000):
        ask(torch.zeros(1, tokens, 2, 16))
    assert counter.frame_count <= 2


def interpreter_obstacle() -> str | None:
    """Why the interpreter cannot run here, or None."""
    if GPU or INTERPRETED:
        return "the kernels run in this process"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import numpy

    version = tuple(int(x) for x in numpy.__version__.split(".")[:2])
    return "triton's interpreter needs numpy below 2.4" if version >= (2, 4) else None


not_interpreted = pytest.mark.skipif(interpreter_obstacle() is not None, reason=str(interpreter_obstacle()))


def pass_under_the_interpreter(file: str) -> None:
    """Run a file of tests in a process of its own: the switch has to be set before triton is imported."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", file]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout


@not_interpreted
def test_kernels_under_the_interpreter():
    pass_under_the_interpreter(__file__)
