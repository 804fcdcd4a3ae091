"""Tiny random models of every family, and the two ways to read them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15}
_GQA = _COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
_WITHOUT_GROUPS = {key: value for key, value in _GQA.items() if key != "num_key_value_heads"}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": _COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "llama": _GQA,
    "qwen3": _GQA | {"head_dim": 12},
    "mistral": _GQA | {"sliding_window": None},
    "gpt_neox": _WITHOUT_GROUPS | {"tie_word_embeddings": False},
    "opt": _WITHOUT_GROUPS | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.15},
    "qwen2": _GQA,
    "phi": _GQA,
    "gemma": _GQA | {"head_dim": 8},
    "gemma3_text": _GQA
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_bigcode": _COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "olmo2": _GQA,
    "bloom": _COMMON | {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "codegen": _COMMON | {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 1, "n_heads": 4},
    "falcon": _COMMON | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
}


@cache
def _build(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(family))
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES[family])).eval()


@pytest.fixture(params=("gpt2", "llama", "qwen3", "mistral", "gpt_neox", "opt"))
def family(request: pytest.FixtureRequest) -> str:
    """Each family that must work, one after the other."""
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """Make a tiny random model: `tiny("gpt2")`, the same for the same arguments, or with settings of its own."""

    def make(family: str, **settings: Any) -> PreTrainedModel:
        if not settings:
            return _build(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = CONFIG_MAPPING[family](**SIZES[family] | settings)
            return AutoModelForCausalLM.from_config(config).eval()

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
