"""What the benchmark of kernels times beside ours."""

import importlib.util

import pytest
import torch
from benchmarks.attention_peers import ADDITIVE, DELTA, LINEAR, NSA, other_call

from bsbr.config import BSBRConfig

CONFIG = BSBRConfig(block_size=16, top_k=2)
NO_FLA = importlib.util.find_spec("fla") is None


def draw() -> list[torch.Tensor]:
    return [torch.randn(1, 70, heads, 32) for heads in (4, 2, 2)]


def test_the_additive_form_runs():
    assert other_call(ADDITIVE, draw(), CONFIG)().shape == (1, 70, 4, 32)


def test_shapes_that_a_kernel_does_not_take_are_told():
    with pytest.raises(ValueError, match="16 query heads a key head and more, here are 2"):
        other_call(NSA, draw(), CONFIG)


@pytest.mark.skipif(not NO_FLA, reason="flash-linear-attention is installed")
@pytest.mark.parametrize("name", [LINEAR, DELTA])
def test_what_is_not_installed_is_told(name):
    with pytest.raises(ImportError, match="fla"):
        other_call(name, draw(), CONFIG)
