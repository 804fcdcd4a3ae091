"""What runs on Hopper GPUs alone, beside what runs on others, at sizes where it is used."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


@pytest.fixture
def without(monkeypatch):
    """Compute what is given without something that `bsbr.ops.triton.hopper` allows."""
    from bsbr.ops.triton import hopper

    def compute(what, *given, **options):
        with monkeypatch.context() as patch:
            patch.setattr(hopper, what, lambda *problem: False)
            return bsbr_attention(*given, **options)

    return compute


def draw(tokens: int, heads: int, dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    shape = ((1, tokens, n, width) for n in (heads, heads // 2, heads // 2))
    return [torch.randn(x, generator=generator, device="cuda", dtype=dtype) for x in shape]


@pytest.mark.parametrize(
    ("tokens", "dtype", "width", "settings"),
    [
        (40_000, torch.bfloat16, 128, {}),
        (33_333, torch.bfloat16, 128, {"far": "mean", "state": "none"}),
        (36_000, torch.bfloat16, 128, {"top_k_per_head": (3, 8)}),
        (150_000, torch.bfloat16, 128, {}),
        (20_000, torch.bfloat16, 128, {"retrieval_block_size": 32, "top_k": 40}),
        (40_000, torch.float16, 64, {}),
    ],
    ids=["plain", "means", "numbers by head", "by tiles", "many units", "float16"],
)
def test_as_elsewhere(tokens, dtype, width, settings, without):
    config = BSBRConfig(**{"block_size": 128, "top_k": 8, "dense_below": 0, **settings})
    q, k, v = draw(tokens, 4, dtype, width)
    options = {"config": config, "backend": "triton"}
    here = bsbr_attention(q, k, v, **options)
    for _ in range(5):
        assert torch.equal(here, bsbr_attention(q, k, v, **options))
    assert torch.equal(here, without("scores_in_gluon", q, k, v, **options))
    # weights are added as they were rounded for the product, elsewhere as they were
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(here, without("copies_tiles", q, k, v, **options), rtol=2 * eps, atol=eps / 8)


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_what_is_not_past_changes_nothing(bad):
    config = BSBRConfig(block_size=128, top_k=8, dense_below=0)
    q, k, v = draw(40_000, 4, torch.bfloat16, 128)
    clean = bsbr_attention(q, k, v, config, backend="triton")
    for cut in (128 * 270, 128 * 311):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, cut:], other_v[:, cut:] = bad, bad
        found = bsbr_attention(q, other_k, other_v, config, backend="triton")
        assert torch.equal(found[:, :cut], clean[:, :cut])
