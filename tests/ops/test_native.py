"""The native code computes what the reference defines, and where it cannot be had the rest works without it."""

import ctypes
import subprocess
import sys

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, log_mass, reference_attention, resolve_backend, summarize
from bsbr.ops.native.build import load_library
from bsbr.ops.native.forward import why_not_native
from tests.ops.cases import Case, error_bound, random_case

needs_native = pytest.mark.skipif(isinstance(load_library(), str), reason=f"no native code: {load_library()}")
CONFIG = BSBRConfig(dense_below=0, block_size=32, top_k=2)


def able_cases(count):
    """Random problems that the native code takes, in float32."""
    for seed in range(count):
        case = random_case(seed)
        tensors = case.tensors(torch.float32)
        if not why_not_native(tensors[0], case.config):
            yield case, tensors


def draw(seed, *shape, group=1):
    generator = torch.Generator().manual_seed(seed)
    rows, tokens, heads, width = shape
    return [torch.randn(rows, tokens, heads * factor, width, generator=generator) for factor in (group, 1, 1)]


@needs_native
def test_values_stay_within_the_forward_error_bound():
    count = 0
    for case, (q, k, v) in able_cases(400):
        options = {**case.options, "calibration": case.calibration}
        expected, expected_lse, chosen = reference_attention(q, k, v, case.config, **options)
        options |= {"block_indices": chosen, "backend": "native", "return_lse": True}
        actual, lse = bsbr_attention(q, k, v, case.config, **options)
        excess = (actual.double() - expected).abs() / error_bound(case, q, k, v, chosen)
        assert excess.max() <= 1, f"case {case.seed}: {excess.max():.3g} times the bound, {case.config}"
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
        count += 1
    assert count > 100


@needs_native
@pytest.mark.parametrize(("size", "unit"), [(256, 256), (300, 150), (200, 200)])
def test_blocks_that_are_read_in_several_pieces(size, unit):
    """The code works on pieces of 128 keys."""
    q, k, v = draw(9, 1, 2 * size + 2 * unit + 70, 1, 16, group=2)
    config = BSBRConfig(dense_below=0, block_size=size, retrieval_block_size=unit, top_k=1)
    expected, _, chosen = reference_attention(q, k, v, config)
    plain = torch.tensor([[0.0, 1, 1, 1, 1]], dtype=torch.float64).repeat(2, 1)
    case = Case(9, config, q.double(), k.double(), v.double(), plain, 0, None)
    actual = bsbr_attention(q, k, v, config, block_indices=chosen, backend="native")
    assert ((actual.double() - expected).abs() / error_bound(case, q, k, v, chosen)).max() <= 1


@needs_native
def test_it_chooses_the_blocks_of_largest_mass():
    """With its own choice outputs agree with the reference wherever the masses are no near tie."""
    compared = 0
    for seed in range(12):
        q, k, v = draw(seed, 1, 700, 2, 16, group=2)
        expected = reference_attention(q, k, v, CONFIG)[0]
        actual = bsbr_attention(q, k, v, CONFIG, backend="native")
        mean_k, var_k = (x.double() for x in summarize(k[0].transpose(0, 1), v[0].transpose(0, 1), 32)[:2])
        by_key_head = q[0].double().unflatten(1, (2, 2)).permute(1, 2, 0, 3)
        plain = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64).expand(2, 2, 5)
        mass = log_mass(by_key_head, mean_k, var_k, 32, plain, 0.25)  # [H, G, N, T]
        past = torch.arange(mass.shape[2])[:, None] < torch.arange(700) // 32
        best = mass.masked_fill(~past, -torch.inf).topk(3, 2).values
        clear = ~((best[:, :, 1] - best[:, :, 2]) < 1e-4).flatten(0, 1).mT[None]  # [1, T, HQ]
        compared += clear.sum().item()
        torch.testing.assert_close(actual[clear].double(), expected[clear], rtol=0, atol=1e-4)
    assert compared > 0.99 * 12 * 700 * 4


@needs_native
def test_exact_ties_go_to_the_lower_block():
    generator = torch.Generator().manual_seed(0)
    config = BSBRConfig(dense_below=0, block_size=4, top_k=2, far="drop")
    for _ in range(40):
        k = torch.randint(-2, 3, (1, 4, 1, 4), generator=generator).float().repeat(1, 12, 1, 1)
        q = torch.randint(-2, 3, (1, 48, 2, 4), generator=generator).float()
        v = torch.randn(1, 48, 1, 4, generator=generator)
        expected = reference_attention(q, k, v, config)[0]
        actual = bsbr_attention(q, k, v, config, backend="native")
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@needs_native
def test_gradients_are_those_of_the_chunked_backend():
    q, k, v = draw(1, 2, 300, 2, 16, group=2)
    found = []
    for backend in ("native", "chunked"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = bsbr_attention(*leaves, CONFIG, backend=backend)
        found.append(torch.autograd.grad(o.square().sum(), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("start", [1, 31, 32, 64, 99, 169])
def test_queries_that_come_later_get_the_same(start):
    q, k, v = draw(3, 1, 170, 2, 8)
    whole = bsbr_attention(q, k, v, CONFIG, backend="native")
    late = bsbr_attention(q[:, start:], k, v, CONFIG, q_start=start, backend="native")
    torch.testing.assert_close(late, whole[:, start:], rtol=0, atol=1e-6)


@needs_native
def test_memory_layout_does_not_matter():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(4, 2, 300, 2, 16))
    strange = [torch.empty(2, 300, 2, 32)[..., ::2].copy_(x) for x in (q, k, v)]
    expected = bsbr_attention(*(x.contiguous() for x in (q, k, v)), CONFIG, backend="native")
    assert torch.equal(bsbr_attention(q, k, v, CONFIG, backend="native"), expected)
    assert torch.equal(bsbr_attention(*strange, CONFIG, backend="native"), expected)


@needs_native
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e3, 1e4])
def test_extreme_scores_stay_within_reason(factor):
    q, k, v = draw(5, 1, 300, 1, 64)
    config = BSBRConfig(dense_below=0, block_size=32, top_k=2, far="drop")
    expected, _, chosen = reference_attention(q * factor, k, v, config)
    actual = bsbr_attention(q * factor, k, v, config, block_indices=chosen, backend="native")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * max(1, factor / 100))


@needs_native
def test_what_is_no_number_is_seen_by_later_queries_only():
    q, k, v = draw(6, 1, 300, 1, 16)
    clean = bsbr_attention(q, k, v, CONFIG, backend="native")
    k[:, 200] = torch.nan
    o = bsbr_attention(q, k, v, CONFIG, backend="native")
    assert torch.equal(o[:, :192], clean[:, :192])
    assert o[:, 200:224].isnan().all()


def test_what_it_does_not_compute_goes_to_the_chunked_backend():
    q, k, v = draw(7, 1, 70, 1, 8)
    token = BSBRConfig(dense_below=0, block_size=32, top_k=1, state="token")
    for tensor, config, dropout in ((q.double(), CONFIG, 0.0), (q, token, 0.0), (q, CONFIG, 0.1)):
        name, reason = resolve_backend("auto", tensor, tensor, tensor, config, dropout_p=dropout)
        assert name == "chunked"
        assert reason.startswith(("native code", "no native code"))
    with pytest.raises(ValueError, match="native code computes float32"):
        bsbr_attention(q.double(), k.double(), v.double(), CONFIG, backend="native")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"BSBR_NATIVE": "0"}, "BSBR_NATIVE=0"),
        ({"CC": "no-such-compiler"}, "no C compiler 'no-such-compiler'"),
        ({"CC": "false"}, "failed"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cannot be written"),
    ],
)
def test_without_native_code_there_is_a_reason_and_no_error(variables, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = load_library.__wrapped__()
    assert isinstance(said, str)
    assert "\n" not in said
    assert reason in said or "no C compiler" in said
    assert not list(tmp_path.rglob("*.so"))


@needs_native
def test_processes_that_compile_at_once_all_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ask = "from bsbr.ops.native.build import load_library; print(type(load_library()).__name__)"
    running = [subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["CDLL"] * 3
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and one library, nothing half made
    assert isinstance(load_library.__wrapped__(), ctypes.CDLL)


def test_a_block_that_does_not_exist_is_refused():
    q, k, v = draw(8, 1, 130, 1, 8)
    indices = torch.full((1, 130, q.shape[2], CONFIG.top_k), 99)
    with pytest.raises(ValueError, match="block_indices of sparse queries"):
        bsbr_attention(q, k, v, CONFIG, block_indices=indices, backend="native")


@needs_native
@pytest.mark.parametrize("dense_below", [0, 200])
@pytest.mark.parametrize("unit", [32, 8])
def test_heads_that_read_different_numbers_of_blocks_are_one_call_with_the_bits_of_many(unit, dense_below):
    """Where nothing is kept for a backward pass the C code counts head by head; else each number is its own call."""
    config = BSBRConfig(
        dense_below=dense_below, block_size=32, retrieval_block_size=unit, top_k=3, top_k_per_head=(4, 0, 11, 1)
    )
    q, k, v = draw(6, 2, 500, 4, 16, group=2)
    together = bsbr_attention(q, k, v, config, backend="native")
    apart = bsbr_attention(q.clone().requires_grad_(), k, v, config, backend="native")
    assert torch.equal(together, apart)
    late = bsbr_attention(q[:, 330:], k, v, config, q_start=330, backend="native")
    assert torch.equal(late, together[:, 330:])
