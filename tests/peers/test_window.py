"""The window is softmax attention to exactly the latest keys, wherever the queries start."""

import pytest
import torch

from bsbr.peers import WindowConfig, full_attention, window_attention
from tests.peers.cases import draw, plain


@pytest.mark.parametrize("window", [1, 2, 7, 8, 36, 37, 99])
@pytest.mark.parametrize("q_start", [0, 1, 5, 12, 30, 36])
def test_it_reads_the_latest_keys(window, q_start):
    q, k, v = (x.double() for x in draw(37))
    distance = torch.arange(37)[:, None] - torch.arange(37)
    expected = plain(q, k, v, (distance >= 0) & (distance < window))[:, q_start:]
    actual = window_attention(q[:, q_start:], k, v, window=window, q_start=q_start)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def test_a_window_over_all_is_full_attention_and_the_scale_counts():
    q, k, v = draw(20)
    assert torch.allclose(window_attention(q, k, v, window=20), full_attention(q, k, v), atol=1e-6)
    scaled = window_attention(q, k, v, window=5, scale=0.1)
    assert torch.allclose(scaled, window_attention(q * 0.1 * 6**0.5, k, v, window=5), atol=1e-6)


def test_memory_grows_with_the_tokens_alone():
    """No tensor of it has as many numbers as tokens times tokens."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    x = torch.randn(1, 2048, 1, 4)
    with Watch():
        window_attention(x, x, x, window=16)
    assert max(sizes) < 2048 * 64


def test_it_compiles_as_one_graph():
    compiled = torch.compile(window_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*draw(20), window=6), window_attention(*draw(20), window=6))


def test_settings():
    assert WindowConfig.from_dict({"window": 3}).to_dict() == {"window": 3}
    for bad in (0, -1, 2.5, True, "8"):
        with pytest.raises(ValueError, match="window must be an integer >= 1"):
            WindowConfig(window=bad)
    with pytest.raises(ValueError, match="unknown window setting 'size': expected some of window"):
        WindowConfig.from_dict({"size": 3})
