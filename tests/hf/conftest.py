"""Tiny random models of every family, and the two ways to read them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.hf.families import VOCABULARY, build


@pytest.fixture(params=("gpt2", "llama", "qwen3", "mistral", "gpt_neox", "opt"))
def family(request: pytest.FixtureRequest) -> str:
    """Each family that must work, one after the other."""
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Make a tiny random model: `tiny("gpt2")`, the same for the same arguments, or with settings of its own."""

    def make(family: str, **settings: Any) -> PreTrainedModel:
        return build(family, **settings)

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Draw token ids: `tokens(rows, length, seed)`."""

    def draw(rows: int, length: int, seed: int = 0) -> Tensor:
        return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    """Run a model without gradient: `logits(model, ids, **inputs)`."""

    @torch.no_grad()
    def run(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
        return model(ids, **inputs).logits

    return run
