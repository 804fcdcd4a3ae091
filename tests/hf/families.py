"""A tiny random model of every family."""

from functools import cache
from typing import Any

import torch
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
    "phi3": _GQA | {"partial_rotary_factor": 0.5},
    "qwen3_moe": _GQA
    | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gemma2": _GQA
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": None,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "stablelm": _GQA | {"partial_rotary_factor": 0.25},
    "smollm3": _GQA | {"no_rope_layers": [1, 0]},
    "gpt_oss": _GQA
    | {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bloom": _COMMON | {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "codegen": _COMMON | {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 1, "n_heads": 4},
    "falcon": _COMMON | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
}


@cache
def _kept(family: str) -> PreTrainedModel:
    return _make(family, len(family), SIZES[family])


def _make(family: str, seed: int, settings: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).eval()


def build(family: str, **settings: Any) -> PreTrainedModel:
    """Make a tiny random model; without settings of its own always the same one."""
    return _make(family, 0, SIZES[family] | settings) if settings else _kept(family)
