"""A cache fed part by part attends as the reference does on the whole text, whatever happened to the cache before."""

import random
from dataclasses import replace

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import block_cache as block_cache_module
from bsbr.ops import reference_attention
from bsbr.ops.block_cache import BlockCache, check_mode
from bsbr.ops.shared_cache import block_cache
from bsbr.ops.summaries import uncalibrated
from tests.ops.cases import error_bound, random_case


def cached_case(seed, **settings):
    """A random problem whose queries are all there, with a state that a cache keeps."""
    case = random_case(seed)
    if case.config.state in ("block", "token"):
        case.config = replace(case.config, state="global")
    if "top_k" in settings:
        case.config = replace(case.config, top_k_per_head=None)
    case.config = replace(case.config, **settings)
    tokens, heads = case.k.shape[1], case.q.shape[2]
    generator = torch.Generator().manual_seed(seed + 1)
    spread = case.q.std() if case.q.numel() > 1 else 1.0
    case.q = torch.randn(len(case.q), tokens, heads, case.q.shape[3], generator=generator, dtype=torch.float64) * spread
    case.q_start, case.lengths, case.options = 0, None, {"q_start": 0, "lengths": None}
    return case


def parts(tokens, draw):
    """Cut a text: a part of any length first, then mostly single tokens and short parts."""
    sizes = [draw.randint(0, tokens)]
    while sum(sizes) < tokens:
        sizes.append(min(tokens - sum(sizes), draw.choice([1, 1, 1, 2, 3, 9, 40, 170])))
    return [size for size in sizes if size]


def feed(cache, case, tensors, sizes):
    outputs, start = [], 0
    for size in sizes:
        part = [x[:, start : start + size] for x in tensors]
        outputs.append(cache.attend(*part, scale=part[0].shape[-1] ** -0.5, calibration=case.calibration))
        start += size
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_in_float64_every_part_equals_the_reference(mode):
    for seed in range(60):
        case, draw = cached_case(seed), random.Random(seed)
        tensors = case.q, case.k, case.v
        expected = reference_attention(*tensors, case.config, calibration=case.calibration)[0]
        actual = feed(block_cache(case.config, mode), case, tensors, parts(case.k.shape[1], draw))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, c=case: f"{c.config}: {m}")


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 3, "selection": "recent"}], ids=str)
def test_states_alone_are_enough_without_retrieval(settings):
    for seed in range(40):
        case, draw = cached_case(seed, dense_below=0, **settings), random.Random(seed)
        tensors = case.q, case.k, case.v
        expected = reference_attention(*tensors, case.config, calibration=case.calibration)[0]
        cache = block_cache(case.config, "states")
        actual = feed(cache, case, tensors, parts(case.k.shape[1], draw))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, c=case: f"{c.config}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_stay_within_the_forward_error_bound(dtype):
    """Without retrieval or with all of it, since a choice of blocks may differ where masses nearly tie."""
    for seed in range(40):
        case, draw = cached_case(seed, top_k=random.Random(seed).choice([0, 1000])), random.Random(seed)
        tensors = case.tensors(dtype)
        expected, _, chosen = reference_attention(*tensors, case.config, calibration=case.calibration)
        actual = feed(block_cache(case.config), case, tensors, parts(case.k.shape[1], draw))
        assert actual.dtype == dtype
        excess = (actual.double() - expected).abs() / error_bound(case, *tensors, chosen)
        assert excess.max() <= 1, f"case {seed}: {excess.max():.3g} times the bound, {case.config}"


@pytest.mark.parametrize("mode", ["full", "offload", "states"])
def test_rows_of_different_lengths_do_not_know_of_each_other(mode):
    for seed in range(60):
        draw = random.Random(seed)
        settings = {"top_k": 0, "dense_below": 0} if mode == "states" else {}
        case = cached_case(seed, **settings)
        rows, tokens = len(case.q), case.k.shape[1]
        cache, done, tensors = block_cache(case.config, mode), [0] * rows, (case.q, case.k, case.v)
        expected = reference_attention(*tensors, case.config, calibration=case.calibration)[0]
        while min(done) < tokens:
            longest = draw.choice([1, 1, 2, 3, 9, 40, 170])
            counts = [min(draw.randint(0, longest), tokens - length) for length in done]
            width = max(1, *counts)
            part = [x.new_full((rows, width, *x.shape[2:]), torch.nan) for x in tensors]
            for row, count in enumerate(counts):
                for new, x in zip(part, tensors, strict=True):
                    new[row, :count] = x[row, done[row] : done[row] + count]
                    new[row, count:] = draw.random()
            o = cache.attend(*part, scale=case.q.shape[-1] ** -0.5, calibration=case.calibration, counts=counts)
            for row, count in enumerate(counts):
                own = expected[row, done[row] : done[row] + count]
                torch.testing.assert_close(
                    o[row, :count], own, rtol=1e-9, atol=1e-9, msg=lambda m, c=case: f"{c.config}: {m}"
                )
                assert not o[row, count:].any()
            done = [length + count for length, count in zip(done, counts, strict=True)]
            assert cache.lengths == done


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_going_back_and_on_again_leaves_no_trace(mode):
    for seed in range(60):
        draw, case = random.Random(seed), cached_case(seed)
        tensors, tokens = (case.q, case.k, case.v), case.k.shape[1]
        expected = reference_attention(*tensors, case.config, calibration=case.calibration)[0]
        cache = block_cache(case.config, mode)
        for _ in range(6):
            length = cache.lengths[0] if cache.lengths else 0
            stop = draw.randint(length, tokens)
            junk = [x[:, : stop - length].flip(1) * 1.5 for x in tensors]
            if stop > length:
                cache.attend(*junk, scale=0.5)
                cache.crop([length] * len(case.q))
            size = min(tokens - length, draw.choice([1, 1, 5, 60]))
            if size:
                part = [x[:, length : length + size] for x in tensors]
                o = cache.attend(*part, scale=case.q.shape[-1] ** -0.5, calibration=case.calibration)
                torch.testing.assert_close(
                    o,
                    expected[:, length : length + size],
                    rtol=1e-8,
                    atol=1e-8,
                    msg=lambda m, c=case: f"{c.config}: {m}",
                )


def test_states_go_back_within_the_last_two_blocks_and_no_further():
    config = BSBRConfig(block_size=8, top_k=0, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 60, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = reference_attention(q, k, v, config)[0]
    for length in range(48, 60):
        cache = BlockCache(config, "states")
        cache.attend(q, k, v, scale=8**-0.5)
        cache.crop([length])
        o = cache.attend(*(x[:, length:] for x in (q, k, v)), scale=8**-0.5)
        torch.testing.assert_close(o, expected[:, length:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match='cache "full"'):
        cache.crop([39])
    cache.crop([49])
    with pytest.raises(ValueError, match='cache "full"'):  # the second last is the last now
        cache.crop([47])


def test_rows_can_be_copied_dropped_and_exchanged():
    case = cached_case(5, block_size=8, retrieval_block_size=4, top_k=2, dense_below=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 90, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    cache, order = block_cache(case.config), torch.tensor([1, 0, 1])
    cache.attend(q[:, :50], k[:, :50], v[:, :50], scale=0.25, counts=[50, 37])
    cache.select(order)
    assert cache.lengths == [37, 50, 37]
    starts = [37, 50, 37]
    part = [
        torch.stack([x[row, start : start + 20] for row, start in zip(order, starts, strict=True)]) for x in (q, k, v)
    ]
    o = cache.attend(*part, scale=0.25)
    for index, (row, start) in enumerate(zip(order.tolist(), starts, strict=True)):
        alone = [x[row : row + 1, : start + 20] for x in (q, k, v)]
        expected = reference_attention(*alone, case.config, scale=0.25)[0][0, start:]
        torch.testing.assert_close(o[index], expected, rtol=1e-9, atol=1e-9)


def test_memory_of_states_alone_does_not_hold_the_tokens():
    config = BSBRConfig(block_size=64, top_k=0, dense_below=0)
    q = torch.zeros(1, 4096, 1, 32)
    used = {}
    for mode in ("full", "states"):
        cache = BlockCache(config, mode)
        cache.attend(q, q, q, scale=1.0)
        used[mode] = sum(cache.num_bytes().values())
    tokens = 2 * q.nbytes
    assert used["full"] <= 1.1 * tokens
    assert used["states"] <= 0.07 * tokens  # 128 tokens' keys and values, and 3 / 128 of the rest


def test_a_mode_that_cannot_work_is_refused_in_one_sentence():
    for settings, mode, match in (
        ({"top_k": 1}, "states", "top_k 1"),
        ({"top_k": 0}, "states", "dense_below 4096"),
        ({"state": "block"}, "full", "state"),
        ({"state": "token"}, "full", "state"),
        ({}, "disk", "full, offload, states"),
    ):
        with pytest.raises(ValueError, match=match) as refusal:
            check_mode(BSBRConfig(**settings), mode)
        assert "\n" not in str(refusal.value)


def test_tensors_made_in_inference_mode_can_be_used_outside():
    config = BSBRConfig(block_size=4, top_k=1, dense_below=0)
    q = torch.randn(1, 40, 2, 8)
    cache = BlockCache(config)
    with torch.inference_mode():
        cache.attend(q[:, :21], q[:, :21], q[:, :21], scale=0.3)
        cache.select(torch.tensor([0, 0]))
    both = q.repeat(2, 1, 1, 1)[:, 21:]
    cache.attend(both, both, both, scale=0.3)


def test_scalars_of_uncalibrated_heads_are_made_once(monkeypatch):
    """Made in each step, they would be two launches more in a CUDA graph."""
    made = []
    monkeypatch.setattr(block_cache_module, "uncalibrated", lambda *given: made.append(given) or uncalibrated(*given))
    cache, q = BlockCache(BSBRConfig(block_size=4, top_k=1, dense_below=0)), torch.randn(1, 20, 2, 8)
    outputs = [cache.attend(*[q[:, at : at + 1]] * 3, scale=0.3) for at in range(20)]
    assert made == [(2, torch.float32, torch.device("cpu"))]
    expected = reference_attention(q, q, q, cache.config, scale=0.3)[0]
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=0, atol=1e-5)


def test_a_window_that_keeps_no_older_tokens_goes_back_by_a_block():
    config = BSBRConfig(dense_below=0, block_size=8, retrieval_block_size=4, top_k=5, selection="recent")
    q, k, v = torch.randn(3, 1, 90, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference_attention(q, k, v, config)[0]
    for stop in range(33, 80):
        back = (stop // 8 - 1) * 8  # as far as the block before
        cache = BlockCache(config, "states")
        cache.attend(*(x[:, :stop] for x in (q, k, v)), scale=0.5)
        cache.crop([back])
        found = cache.attend(*(x[:, back:] for x in (q, k, v)), scale=0.5)
        torch.testing.assert_close(found, expected[:, back:], rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="cannot go back further"):
            cache.crop([back - 8])
