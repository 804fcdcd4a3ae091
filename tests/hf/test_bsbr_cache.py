"""A BSBRCache changes nothing: not how a text is cut, nor padding, neighbours, beams, drafts or what came before."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from bsbr import BSBRConfig, convert
from bsbr.errors import UserError
from bsbr.hf import BSBRCache
from bsbr.hf.cache import CACHE_ARGUMENT
from bsbr.peers import AdditiveConfig

WRITES_MORE = Version(transformers.__version__) < Version("5.17")
"""Older prompt lookup may write a token or two more than was asked for."""

B, T = 8, 300
CONFIG = BSBRConfig(dense_below=0, block_size=B, top_k=2)
CHUNKS = (1, 2, 3, 7, B - 1, B, B + 1)
STATES = BSBRConfig(dense_below=0, block_size=B, top_k=0)
WINDOW = BSBRConfig(dense_below=0, block_size=B, top_k=3, selection="recent")
CONFIGS = [
    pytest.param(CONFIG, "full", id="full"),
    pytest.param(CONFIG, "offload", id="offload"),
    pytest.param(STATES, "states", id="states"),
    pytest.param(WINDOW, "states", id="window"),
    pytest.param(
        replace(WINDOW, retrieval_block_size=4, top_k_per_head=((0, 3), (9, 1))), "states", id="windows per head"
    ),
    pytest.param(BSBRConfig(dense_below=29, block_size=B, retrieval_block_size=4, top_k=3, selection="group"), "full",
                 id="units"),
    pytest.param(BSBRConfig(dense_below=0, block_size=B, top_k=2, far="drop"), "full", id="moba"),
    *(
        pytest.param(
            BSBRConfig(dense_below=0, block_size=B, retrieval_block_size=4, top_k_per_head=((0, 3), (9, 1))), mode,
            id=f"per head {mode}",
        )
        for mode in ("full", "offload")
    ),
]  # fmt: skip


def assert_same(found, expected):
    """The figures of the issue: no argmax changes, and no logit is further off than 1e-4."""
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() <= 1e-4


def read(logits, model, ids, sizes, cache=None, **inputs):
    cache, parts = BSBRCache(model.config) if cache is None else cache, []
    for part in ids.split(sizes, 1):
        parts.append(logits(model, part, past_key_values=cache, use_cache=True, **inputs))
    return torch.cat(parts, 1)


def test_going_back_in_rows_that_hold_padding_and_change_places(tiny, tokens, logits):
    converted, ids, more = convert(tiny("llama"), CONFIG), tokens(3, 40), tokens(3, 9, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 32:], mask[1, 20:] = 0, 0  # what is left of 27 slots is 27, 20 and 27 tokens
    cache, order = BSBRCache(converted.config), [2, 1, 0]
    logits(converted, ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.tensor(order))
    cache.crop(-13)
    mask = torch.cat([mask[order, :27], torch.ones_like(more)], 1)
    inputs = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, 27:] - 1}
    found = logits(converted, more, past_key_values=cache, use_cache=True, **inputs)
    for row, own in enumerate(order):
        text = torch.cat([ids[own, : 20 if own == 1 else 27], more[row]])[None]
        assert_same(found[row], logits(converted, text)[0, -9:])


@pytest.mark.parametrize("size", CHUNKS)
def test_prefill_in_chunks_of_any_size_equals_one_forward_pass(family, size, tiny, tokens, logits):
    converted, ids = convert(tiny(family), CONFIG), tokens(1, T)
    assert_same(read(logits, converted, ids, size), logits(converted, ids))


def test_decoding_from_the_split_points_at_block_edges_equals_one_forward_pass(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), CONFIG), tokens(1, T)
    whole = logits(converted, ids)
    for start in sorted({edge + step for edge in range(B, T, B) for step in (-1, 0, 1)}):
        cache = BSBRCache(converted.config)
        logits(converted, ids[:, :start], past_key_values=cache, use_cache=True)
        stop = min(T, start + CHUNKS[start % len(CHUNKS)])
        part = logits(converted, ids[:, start:stop], past_key_values=cache, use_cache=True)
        assert_same(part, whole[:, start:stop])


@pytest.mark.parametrize(("config", "mode"), CONFIGS)
@pytest.mark.parametrize("sizes", [[1] * 90, [17, 1, 1, 30, 2, 39], [64, 26], [9] * 10], ids=str)
def test_every_mode_and_setting_equals_one_forward_pass(config, mode, sizes, tiny, tokens, logits):
    converted, ids = convert(tiny("llama"), config), tokens(2, 90)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if name.endswith("calibration"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    cache = BSBRCache(converted.config, mode)
    assert_same(read(logits, converted, ids, sizes, cache), logits(converted, ids))


def test_left_padding_of_every_width_changes_nothing(family, tiny, tokens, logits):
    """At all positions, each row of a batch padded by another width, read in parts."""
    converted, length = convert(tiny(family), CONFIG), 5 * B + 3
    widths = range(2 * B + 4)
    rows, ids = len(widths), tokens(1, length)
    width = max(widths) + length
    padded, mask = torch.full((rows, width), 5), torch.zeros(rows, width, dtype=torch.long)
    for row, pad in enumerate(widths):
        padded[row, width - length - pad : width - pad] = ids
        mask[row, width - length - pad :] = 1
        padded[row, width - pad :] = tokens(1, max(1, pad), seed=row)[0, :pad]
    # row `pad` has pad tokens more at its end: its start is padded by what is left
    place, cache, parts, start = (mask.cumsum(1) - 1).clamp(min=0), BSBRCache(converted.config), [], 0
    for stop in (11, width - 20, width - 19, width - 9, width):
        parts.append(
            logits(
                converted, padded[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
                past_key_values=cache, use_cache=True,
            )
        )  # fmt: skip
        start = stop
    together = torch.cat(parts, 1)
    for row, pad in enumerate(widths):
        assert_same(together[row, -length - pad :], logits(converted, padded[row : row + 1, -length - pad :])[0])


def test_a_row_alone_and_among_random_neighbours(family, tiny, tokens, logits):
    converted, ids, mask = convert(tiny(family), CONFIG), tokens(8, 60), torch.ones(8, 60, dtype=torch.long)
    for row in range(1, 8):
        mask[row, : 7 * row - 3] = 0
    place, cache, parts = (mask.cumsum(1) - 1).clamp(min=0), BSBRCache(converted.config), []
    for start, stop in ((0, 40), *((at, at + 1) for at in range(40, 60))):
        parts.append(
            logits(
                converted, ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=place[:, start:stop],
                past_key_values=cache, use_cache=True,
            )
        )  # fmt: skip
    together = torch.cat(parts, 1)
    for row in range(8):
        alone = ids[row : row + 1, mask[row].bool()]
        single = read(logits, converted, alone, [1] * alone.shape[1])
        assert_same(together[row, mask[row].bool()], single[0])


WAYS = [
    {"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2},
]  # fmt: skip


@pytest.mark.parametrize(("config", "mode"), CONFIGS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_generate_with_every_mode_is_that_without_a_cache(config, mode, way, tiny, tokens):
    converted, ids = convert(tiny("llama", tie_word_embeddings=False), config), tokens(2, 45)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    outputs = []
    for settings in ({"use_cache": False}, {"past_key_values": BSBRCache(converted.config, mode)}):
        torch.manual_seed(0)
        outputs.append(
            converted.generate(ids, attention_mask=mask, max_new_tokens=20, eos_token_id=None, **way, **settings)
        )
    assert torch.equal(*outputs)


def test_generate_uses_a_bsbr_cache_by_itself(family, tiny, tokens):
    converted, ids = convert(tiny(family), CONFIG), tokens(1, 30)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    output = converted.generate(ids, return_dict_in_generate=True, **settings)
    assert isinstance(output.past_key_values, BSBRCache)
    assert output.past_key_values.get_seq_length() == 33
    for config in (AdditiveConfig(block_size=8), BSBRConfig(dense_below=0, block_size=8, state="token")):
        other = convert(tiny(family), config)
        made = {}
        other._prepare_cache_for_generation(other.generation_config, made, None, 1, 40)
        assert type(made[CACHE_ARGUMENT]) is DynamicCache


@pytest.mark.parametrize("mode", ["full", "offload", "states"])
def test_prompt_lookup_and_an_assistant_give_the_greedy_text(family, mode, tiny, tokens):
    converted = convert(tiny(family), STATES if mode == "states" else CONFIG)
    ids = tokens(1, 12).repeat(1, 4)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1}  # no token: older prompt lookup needs one
    greedy = converted.generate(ids, use_cache=False, **settings)
    for draft in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": converted}):
        cache = BSBRCache(converted.config, mode)
        drafted = converted.generate(ids, past_key_values=cache, **draft, **settings)
        assert torch.equal(drafted[:, : greedy.shape[1]], greedy)
        assert drafted.shape == greedy.shape or WRITES_MORE


@pytest.mark.parametrize("mode", ["full", "offload", "states"])
def test_a_chat_goes_on_with_one_cache(family, mode, tiny, tokens):
    converted = convert(tiny(family), STATES if mode == "states" else CONFIG)
    settings = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None}
    cache, text = BSBRCache(converted.config, mode), tokens(1, 21)
    for turn in range(4):
        expected = converted.generate(text, use_cache=False, **settings)
        assert torch.equal(converted.generate(text, past_key_values=cache, **settings), expected)
        text = torch.cat([expected, tokens(1, 10 + turn, seed=turn)], 1)


def test_one_prompt_can_be_read_once_and_continued_many_times(tiny, tokens, logits):
    converted, ids = convert(tiny("llama"), CONFIG), tokens(3, 60)
    ids[:, :40] = ids[:1, :40]
    whole, cache = logits(converted, ids), BSBRCache(converted.config)
    logits(converted, ids[:1, :40], past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(3)
    found = logits(converted, ids[:, 40:], past_key_values=copied, use_cache=True)
    assert_same(found, whole[:, 40:])
    copied.crop(torch.tensor(-20))  # as transformers 5.17 does; nothing of it may stay in the cache
    assert all(type(length) is int for layer in copied.layers for length in layer.blocks.lengths)
    copied.batch_select_indices(torch.tensor([False, True, True]))
    assert_same(logits(converted, ids[1:, 40:], past_key_values=copied, use_cache=True), whole[1:, 40:])
    assert_same(logits(converted, ids[:1, 40:], past_key_values=cache, use_cache=True), whole[:1, 40:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same(logits(converted, ids, past_key_values=cache, use_cache=True), whole)


def test_chunked_prefill_of_generate(family, tiny, tokens):
    converted, ids = convert(tiny(family), CONFIG), tokens(1, 50)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = converted.generate(ids, use_cache=False, **settings)
    for size in (7, 8, 20):
        assert torch.equal(converted.generate(ids, prefill_chunk_size=size, **settings), expected)


def test_bfloat16_and_autocast_stay_near(tiny, tokens, logits):
    converted, ids = convert(tiny("llama"), CONFIG), tokens(1, 60)
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = logits(converted, ids), read(logits, converted, ids, [30, *[1] * 30])
    assert (whole - parts).abs().mean() <= 0.1 * whole.abs().mean()


def test_the_first_call_has_gradients_and_later_ones_say_that_they_have_none(tiny, tokens):
    converted, ids = convert(tiny("llama"), CONFIG), tokens(1, 40)
    cache = BSBRCache(converted.config)
    weight = converted.model.layers[0].self_attn.k_proj.weight
    gradients = []
    for inputs in ({"use_cache": False}, {"past_key_values": cache}):
        loss = converted(ids, **inputs).logits.logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*gradients)
    with pytest.raises(NotImplementedError, match="no_grad"):
        converted(ids[:, :1], past_key_values=cache)


def test_what_a_cache_cannot_do_is_said_in_one_sentence(tiny, tokens, logits):
    llama, ids = tiny("llama"), tokens(2, 20)
    for config, mode, match in (
        (AdditiveConfig(block_size=8), "full", "DynamicCache"),
        (BSBRConfig(state="block"), "full", "state"),
        (CONFIG, "states", "top_k"),
        (CONFIG, "disk", "full, offload, states"),
    ):
        with pytest.raises(UserError, match=match) as refusal:
            BSBRCache(convert(llama, config).config, mode)
        assert "\n" not in str(refusal.value)
    converted = convert(llama, CONFIG)
    cache = BSBRCache(converted.config)
    logits(llama, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimeError, match="DynamicCache"):
        logits(llama, ids[:, :1], past_key_values=cache, use_cache=True)
    cache = BSBRCache(converted.config)
    logits(converted, ids, past_key_values=cache, use_cache=True)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(NotImplementedError, match="says something else"):
        logits(converted, ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="2 rows"):
        logits(converted, ids[:1, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        converted.generate_batch([[1, 2]])


def test_crop_takes_what_the_installed_transformers_gives(tiny, tokens, logits, monkeypatch):
    """The number of tokens to remove, below zero; older versions give the number to keep, too."""
    converted, ids = convert(tiny("llama"), CONFIG), tokens(1, 20)
    cache = BSBRCache(converted.config)
    logits(converted, ids, past_key_values=cache, use_cache=True)
    assert {layer.get_max_cache_shape() for layer in cache.layers} == {-1}  # which only older versions ask for
    cache.crop(-3)
    assert cache.get_seq_length() == 17
    monkeypatch.setattr("bsbr.hf.cache._CROPS_TO_LENGTH", False)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    monkeypatch.setattr("bsbr.hf.cache._CROPS_TO_LENGTH", True)
    for keep, left in ((30, 17), (12, 12), (-2, 10)):
        cache.crop(keep)
        assert cache.get_seq_length() == left
    alone = logits(converted, ids[:, :11])[:, -1]
    assert torch.allclose(
        logits(converted, ids[:, 10:11], past_key_values=cache, use_cache=True)[:, -1], alone, atol=1e-5
    )
