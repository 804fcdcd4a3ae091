"""The chunked backend computes what the reference defines, values and gradients."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention
from tests.ops.cases import error_bound, random_case, skip_unless_able


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_stay_within_the_forward_error_bound(dtype):
    for seed in range(120):
        case = random_case(seed)
        q, k, v = case.tensors(dtype)
        options = {**case.options, "calibration": case.calibration}
        expected, _, chosen = reference_attention(q, k, v, case.config, **options)
        actual = bsbr_attention(q, k, v, case.config, **options, block_indices=chosen, backend="chunked")
        excess = (actual.double() - expected).abs() / error_bound(case, q, k, v, chosen)
        assert excess.max() <= 1, f"case {seed}: {excess.max():.3g} times the bound, {case.config}"


def test_gradients_in_float64_equal_those_of_the_reference():
    for seed in range(120):
        case = random_case(seed, longest=150)
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.calibration)]
        options = {**case.options, "calibration": leaves[3]}
        expected, lse, chosen = reference_attention(*leaves[:3], case.config, **options)
        actual, actual_lse = bsbr_attention(*leaves[:3], case.config, **options, block_indices=chosen, return_lse=True)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(actual_lse, lse, rtol=1e-11, atol=1e-11)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad((actual * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
        for name, a, b in zip(("q", "k", "v", "calibration"), found, wanted, strict=True):
            error = (a - b).abs().max() / (1 + b.abs().max())
            assert error <= 1e-10, f"case {seed}, {name}: {error:.3g}, {case.config}"


@pytest.mark.parametrize("state", ["global", "block", "token", "none"])
def test_gradcheck(state):
    config = BSBRConfig(dense_below=0, block_size=4, retrieval_block_size=2, top_k=1, state=state)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 11, heads, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (2, 1, 1)
    )
    calibration = torch.tensor([[0.1, 0.9, 1.1, 0.8, 1.2], [0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    chosen = reference_attention(q, k, v, config, calibration=calibration)[2]

    def output(q, k, v, calibration):
        return bsbr_attention(q, k, v, config, calibration=calibration, block_indices=chosen)

    torch.autograd.gradcheck(output, (q, k, v, calibration.requires_grad_()))


def test_it_chooses_the_blocks_the_reference_chooses():
    """In float64 with the chunked backend's own choice, outputs agree only if every choice does."""
    for seed in range(200):
        case = random_case(seed)
        options = {**case.options, "calibration": case.calibration}
        expected = reference_attention(case.q, case.k, case.v, case.config, **options)[0]
        actual = bsbr_attention(case.q, case.k, case.v, case.config, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, c=case: f"{c.config}: {m}")


@pytest.mark.parametrize("selection", ["head", "group"])
def test_exact_ties_go_to_the_lower_block(selection):
    """Keys repeat block by block, so block scores tie exactly, and values tell which blocks were read."""
    generator = torch.Generator().manual_seed(0)
    config = BSBRConfig(dense_below=0, block_size=4, top_k=2, far="drop", selection=selection)
    for _ in range(40):
        block = torch.randint(-2, 3, (1, 4, 1, 4), generator=generator).double()
        k = block.repeat(1, 12, 1, 1)
        q = torch.randint(-2, 3, (1, 48, 2, 4), generator=generator).double()
        v = torch.randn(1, 48, 1, 4, generator=generator, dtype=torch.float64)
        chosen = reference_attention(q, k, v, config)[2]
        assert torch.equal(chosen[0, -1, 0], torch.tensor([0, 1]))
        expected = reference_attention(q, k, v, config)[0]
        torch.testing.assert_close(bsbr_attention(q, k, v, config), expected, rtol=1e-12, atol=1e-12)


def test_reading_every_block_is_exact_attention():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 77, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    for config in (
        BSBRConfig(dense_below=0, block_size=8, top_k=9),
        BSBRConfig(block_size=8, top_k=0, dense_below=77),
        BSBRConfig(dense_below=0, block_size=77, top_k=0),
    ):
        torch.testing.assert_close(bsbr_attention(q, k, v, config), dense, rtol=1e-12, atol=1e-12)
    sparse = bsbr_attention(q, k, v, BSBRConfig(dense_below=0, block_size=8, top_k=1))
    assert (sparse - dense).abs().max() > 1e-3


def test_dropout_keeps_the_mean_and_repeats_in_the_backward_pass():
    generator = torch.Generator().manual_seed(2)
    config = BSBRConfig(dense_below=0, block_size=8, top_k=1, far="drop")
    q, k = (torch.randn(1, 40, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.ones(1, 40, 2, 8, dtype=torch.float64, requires_grad=True)
    outputs = torch.stack([bsbr_attention(q, k, v, config, dropout_p=0.5) for _ in range(300)])
    assert outputs.std() > 0.1
    torch.testing.assert_close(outputs.mean(0), torch.ones_like(outputs[0]), rtol=0, atol=0.25)
    o = bsbr_attention(q, k, v, config, dropout_p=0.5)
    (dv,) = torch.autograd.grad(o.sum(), v)
    # linear in v: with v all ones the sum of its gradient is the sum of the output, if the same weights were dropped
    torch.testing.assert_close(dv.sum(), o.sum())


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads, backend):
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 600, 4, 16, generator=generator) for _ in range(3))
    config, before = BSBRConfig(dense_below=0, block_size=32, top_k=2), torch.get_num_threads()
    skip_unless_able(backend, q, config)
    alone = bsbr_attention(q[:1], k[:1], v[:1], config, backend=backend)
    try:
        torch.set_num_threads(threads)
        together = bsbr_attention(q, k, v, config, backend=backend)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=2e-6)


def test_inference_mode_gives_the_same():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 500, 4, 16, generator=generator) for _ in range(3))
    config = BSBRConfig(dense_below=0, block_size=32, top_k=2)
    with torch.inference_mode():
        inside = bsbr_attention(q, k, v, config)
    assert torch.equal(inside, bsbr_attention(q, k, v, config))
