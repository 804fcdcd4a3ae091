"""Reading a text in parts through a stock cache gives what reading it at once gives."""

import pytest
import torch
from transformers import DynamicCache

from bsbr import BSBRConfig, convert
from bsbr.peers import AdditiveConfig

CONFIGS = [
    pytest.param(BSBRConfig(dense_below=0, block_size=8, top_k=1), id="bsbr"),
    pytest.param(BSBRConfig(block_size=8, retrieval_block_size=4, top_k=2, state="token", dense_below=19), id="units"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("splits", [[1], [8, 9], [23, 24, 25, 40], [39]], ids=str)
def test_prefill_and_decode_equal_one_forward_pass(family, config, splits, tiny, tokens, logits):
    converted, ids = convert(tiny(family), config), tokens(2, 49)
    whole, cache, parts = logits(converted, ids), DynamicCache(), []
    for part in torch.tensor_split(ids, splits, 1):
        parts.append(logits(converted, part, past_key_values=cache, use_cache=True))
    assert (torch.cat(parts, 1) - whole).abs().max() <= 2e-5


def test_decoding_a_ragged_batch_equals_each_row_alone(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(3, 45)
    mask = torch.ones(3, 45, dtype=torch.long)
    mask[0, :20] = mask[1, :3] = 0
    place, cache, parts = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(), []
    for start, stop in ((0, 30), (30, 31), (31, 42), (42, 43), (43, 45)):
        parts.append(
            logits(
                converted, ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
                past_key_values=cache, use_cache=True,
            )
        )  # fmt: skip
    together = torch.cat(parts, 1)
    for row in range(3):
        real = mask[row].bool()
        assert (together[row, real] - logits(converted, ids[row, real][None])[0]).abs().max() <= 2e-5


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_generate_is_the_same_with_every_cache(family, settings, tiny, tokens):
    converted, ids = convert(tiny(family), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    outputs = []
    caches = [{}, {"past_key_values": DynamicCache()}, {"cache_implementation": "static", "disable_compile": True}]
    for cache in ({"use_cache": False}, *caches):
        torch.manual_seed(0)
        outputs.append(
            converted.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None, **settings, **cache)
        )
    for output in outputs[1:]:
        assert torch.equal(outputs[0], output)


def test_greedy_generation_is_the_argmax_of_the_whole_text(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(1, 30)
    text = converted.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(logits(converted, text)[0, 29:-1].argmax(-1), text[0, 30:])


def test_what_cannot_continue_from_a_cache_says_so(tiny, tokens):
    ids = tokens(1, 30)
    for config in (AdditiveConfig(block_size=8), BSBRConfig(dense_below=0, block_size=8, top_k=0, state="block")):
        converted = convert(tiny("llama"), config)
        with pytest.raises(NotImplementedError, match="use_cache=False"):
            converted.generate(ids, max_new_tokens=3, do_sample=False)
        assert converted.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (1, 33)
