"""Texts that `generate` writes with a cache, against those that it writes without one."""

from typing import Any

import torch
from tests.hf.families import VOCABULARY, build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bsbr.config import BSBRConfig
from bsbr.hf import BSBRCache, convert

NEW = 32
"""Tokens written: four blocks of 8."""

KINDS = {
    "greedy": "a ragged batch of 2 with a BSBRCache",
    "offload": "the same with past blocks on the host",
    "static": "the same with transformers' static cache",
    "dynamic": "the same with transformers' dynamic cache",
    "sampling": "a ragged batch of 2, temperature 1, the same seed",
    "beam": "a ragged batch of 2, 3 beams",
    "prompt_lookup": "drafts of 4 tokens copied from where the last token stood before",
    "assisted": "drafts by another conversion of the model, with top_k 0",
    "chat": "three turns on one cache",
    "prefill_chunks": "a prompt read in parts of 7 tokens",
    "each": f"{NEW} tokens for each row and turn, those that differ from the text written without a cache",
}
"""What was written."""


def compare_texts(family: str, config: BSBRConfig) -> dict[str, dict[str, int]]:
    """Count tokens that a cache changes, for each way to write.

    Args:
        family: transformers' model type.
        config: of the conversion.
    Returns:
        For each way the tokens written, those that differ, and how many different ones there are.
    """
    original = build(family, tie_word_embeddings=False)  # tied, a random model repeats its last token
    model, drafter = convert(original, config), convert(original, BSBRConfig(dense_below=0, block_size=8, top_k=0))
    ids = torch.randint(3, VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    ragged = {"inputs": ids, "attention_mask": mask}
    one = {"inputs": ids[1:]}
    offload, dynamic = BSBRCache(model.config, "offload"), DynamicCache(config=model.config)
    static = {"cache_implementation": "static", "disable_compile": True}
    alone = {"ragged": _write(model, ragged, use_cache=False), "one": _write(model, one, use_cache=False)}
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    found = {
        "greedy": (_write(model, ragged), alone["ragged"]),
        "offload": (_write(model, ragged, past_key_values=offload), alone["ragged"]),
        "static": (_write(model, ragged, **static), alone["ragged"]),
        "dynamic": (_write(model, ragged, past_key_values=dynamic), alone["ragged"]),
        "prompt_lookup": (_write(model, one, **lookup), alone["one"]),
        "assisted": (_write(model, one, assistant_model=drafter), alone["one"]),
        "prefill_chunks": (_write(model, one, prefill_chunk_size=7), alone["one"]),
        "sampling": _pair(model, ragged | {"do_sample": True, "top_k": 0}),
        "beam": _pair(model, ragged | {"num_beams": 3}),
        "chat": _chat(model, ids[:1, :21]),
    }
    return {
        way: {
            "tokens": with_cache.numel(),
            "changed": int((with_cache != without).sum()),
            "different": len(without.unique()),
        }
        for way, (with_cache, without) in found.items()
    }


def _write(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """New tokens, [B, NEW]."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW} | inputs | settings
    return model.generate(**settings)[:, inputs["inputs"].shape[1] :]


def _pair(model: PreTrainedModel, inputs: dict[str, Any], **cached: Any) -> tuple[Tensor, Tensor]:
    """New tokens with a cache, and without one."""
    return _write(model, inputs, **cached), _write(model, inputs, use_cache=False)


def _chat(model: PreTrainedModel, start: Tensor) -> tuple[Tensor, Tensor]:
    """Three turns: the same cache goes on, each time with what was written and a new question."""
    cache, text, turns = BSBRCache(model.config), start, []
    for turn in range(3):
        given = {"inputs": text, "attention_mask": torch.ones_like(text)}  # else a written 0 would count as padding
        turns.append(_pair(model, given, past_key_values=cache))
        question = torch.randint(3, VOCABULARY, (1, 10 + turn), generator=torch.Generator().manual_seed(turn))
        text = torch.cat([text, turns[-1][1], question], 1)
    with_cache, without = zip(*turns, strict=True)
    return torch.cat(with_cache, 1), torch.cat(without, 1)
