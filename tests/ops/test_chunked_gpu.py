"""What the chunked backend does on a GPU, run on a CPU: batches of tiles and a sort give what the loops give."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention, reference_attention, retrieved, retrieved_batched, routing
from tests.ops.cases import random_case


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the paths of a GPU, a few tiles at a time so that there are several parts."""
    monkeypatch.setattr(retrieved, "_batches", lambda q, dropout: not dropout.p)
    monkeypatch.setattr(retrieved_batched, "_ELEMENTS", 1 << 14)
    monkeypatch.setattr(routing, "_take_best", routing._sort_best)


def test_values_and_gradients_equal_those_of_the_reference(as_on_gpu: None) -> None:
    for seed in range(60):
        case = random_case(seed, longest=150)
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.calibration)]
        options = {**case.options, "calibration": leaves[3]}
        expected = reference_attention(*leaves[:3], case.config, **options)[0]
        actual = bsbr_attention(*leaves[:3], case.config, **options, backend="chunked")
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
        found = torch.autograd.grad((actual * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
        for name, a, b in zip(("q", "k", "v", "calibration"), found, wanted, strict=True):
            error = (a - b).abs().max() / (1 + b.abs().max())
            assert error <= 1e-10, f"case {seed}, {name}: {error:.3g}, {case.config}"


def test_batches_are_what_ran(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []

    def count(*given: object) -> object:
        parts.append(list(cut(*given)))
        return parts[-1]

    cut = retrieved_batched._parts
    monkeypatch.setattr(retrieved_batched, "_parts", count)
    # one key head, so one group of heads whatever the number of threads
    q, k, v = (torch.randn(1, 300, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 1, 1))
    config = BSBRConfig(block_size=16, top_k=4, dense_below=0)
    bsbr_attention(q, k, v, config, backend="chunked").sum().backward()
    assert len(parts) == 2, "once forward, once backward"
    assert min(map(len, parts)) > 1


def test_a_sort_chooses_what_repeated_maxima_choose() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, top_k in ((1, 1), (5, 2), (40, 7), (40, 40)):
        scores = torch.randint(-3, 4, (2, 3, count, 50), generator=generator).float()  # many are equal
        kept = scores.clone()
        chosen = routing._take_best(scores, top_k)
        assert torch.equal(routing._sort_best(kept, top_k), chosen)
        assert torch.equal(kept, scores)
