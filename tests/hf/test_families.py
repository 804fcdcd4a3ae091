"""What a converted model of every family can do; the outcomes are the table of docs/families.md."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bsbr import BSBRConfig, convert, revert
from bsbr.hf import BSBRCache
from bsbr.hf.modeling import FAMILIES
from tests.hf.coverage import NAMES, PAGE, PROPERTIES, REASONS, render

B = 8
SPARSE = BSBRConfig(dense_below=0, block_size=B, top_k=2)
EVERYTHING = BSBRConfig(dense_below=0, block_size=B, top_k=100)


@pytest.fixture(params=list(NAMES))
def family(request):
    """Each tested family; a test that does not apply to it is skipped with its reason."""
    reason = REASONS.get((request.param, request.function.__name__))
    if reason:
        pytest.skip(reason)
    return request.param


def assert_same(found, expected, largest=1e-4):
    """No argmax changes, and no logit is further off."""
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (found - expected).abs().max() <= largest


def places(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def read(logits, model, ids, stops, mask=None):
    """Logits of a text that is read in parts with a BSBRCache."""
    cache, parts, start = BSBRCache(model.config), [], 0
    for stop in stops:
        padded = {}
        if mask is not None:
            padded = {"attention_mask": mask[:, :stop], "position_ids": places(mask)[:, start:stop]}
        parts.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **padded))
        start = stop
    return torch.cat(parts, 1)


def test_reading_every_block_equals_the_original(family, tiny, tokens, logits):
    model, ids = tiny(family), tokens(3, 77)
    converted, mask = convert(model, EVERYTHING), torch.ones_like(ids)
    assert_same(logits(converted, ids), logits(model, ids))
    mask[0, :9] = mask[1, 60:] = 0
    padded = {"attention_mask": mask, "position_ids": places(mask)}
    assert_same(logits(converted, ids, **padded)[mask.bool()], logits(model, ids, **padded)[mask.bool()])
    assert (logits(convert(model, SPARSE), ids) - logits(model, ids)).abs().max() > 1e-3


def test_generate_is_that_without_a_cache(family, tiny, tokens):
    model, ids = convert(tiny(family, tie_word_embeddings=False), SPARSE), tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    for way in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        outputs = []
        for cache in ({"use_cache": False}, {}, {"past_key_values": DynamicCache(config=model.config)}):
            torch.manual_seed(0)
            outputs.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None, **way, **cache)
            )
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    assert len(outputs[0][:, 37:].unique()) > 4, "a text of one token would prove nothing"


def test_left_padding_and_neighbours_change_nothing(family, tiny, tokens, logits):
    """Rows of a batch padded by 0 to 2 B + 3 random tokens, each with another text, read at once and in parts."""
    model, length = convert(tiny(family), SPARSE), 5 * B + 3
    widths = range(2 * B + 4)
    ids, width = tokens(len(widths), max(widths) + length), max(widths) + length
    mask = torch.ones_like(ids)
    for row, pad in enumerate(widths):
        mask[row, :pad] = 0
    together = logits(model, ids, attention_mask=mask, position_ids=places(mask))
    parts = read(logits, model, ids, (11, width - 20, width - 19, width - 9, width), mask)
    for row, pad in enumerate(widths):
        alone = logits(model, ids[row : row + 1, pad:])[0]
        assert_same(together[row, pad:], alone)
        assert_same(parts[row, pad:], alone)
    assert_same(logits(model, ids[:8, max(widths) :])[3], logits(model, ids[3:4, max(widths) :])[0])


def test_beam_search_is_that_without_a_cache(family, tiny, tokens):
    model, ids = convert(tiny(family, tie_word_embeddings=False), SPARSE), tokens(2, 30)
    settings = {"max_new_tokens": 10, "eos_token_id": None, "num_beams": 3}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_prefill_in_chunks_is_one_forward_pass(family, tiny, tokens, logits):
    model, ids = convert(tiny(family), SPARSE), tokens(2, 60)
    whole = logits(model, ids)
    for size in (1, B - 1, B, B + 1):
        assert_same(read(logits, model, ids, [*range(size, 60, size), 60]), whole)


def test_save_load_and_revert(family, tiny, tokens, logits, tmp_path):
    model, ids = tiny(family), tokens(1, 50)
    converted = convert(model, SPARSE)
    converted.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted)
    assert torch.equal(logits(loaded, ids), logits(converted, ids))
    assert torch.equal(logits(revert(loaded), ids), logits(model, ids))


def test_lora_trains_saves_and_reloads(family, tiny, tokens, logits, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    converted, ids = convert(tiny(family), SPARSE), tokens(2, 40)
    before = logits(converted, ids)
    base = copy.deepcopy(converted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([x for x in adapted.parameters() if x.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = logits(adapted.eval(), ids)
    assert (after - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(copy.deepcopy(converted), tmp_path), ids), after)


def test_bfloat16_is_as_good_as_the_original(family, tiny, tokens, logits):
    """The error against float32 in root mean square, which rounding alone makes; a router may choose otherwise."""
    model, ids = tiny(family), tokens(4, 60)
    exact, mask = logits(model, ids), torch.ones_like(ids)
    mask[0, :1] = 0  # the mixer's own way, not PyTorch's attention
    errors = []
    for one in (copy.deepcopy(model).bfloat16(), copy.deepcopy(convert(model, EVERYTHING)).bfloat16()):
        found = logits(one, ids, attention_mask=mask, position_ids=places(mask))
        assert found.dtype == torch.bfloat16
        errors.append((found.float() - exact)[1:].square().mean().sqrt())
    assert errors[1] <= 2 * errors[0]
    assert logits(copy.deepcopy(convert(model, SPARSE)).bfloat16(), ids).isfinite().all()


def test_gradients_are_those_of_the_original(family, tiny, tokens):
    model, ids = copy.deepcopy(tiny(family)), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, 44:] = 0
    gradients = []
    for one in (model, convert(model, EVERYTHING), convert(model, SPARSE)):
        one.zero_grad()
        one(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        gradients.append({name: x.grad.clone() for name, x in one.named_parameters() if x.grad is not None})
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name
    ours = [name for name in gradients[2] if name.endswith("calibration")]
    assert ours
    assert all(gradients[2][name].any() for name in ours)
    assert all(x.isfinite().all() for x in gradients[2].values())


def test_the_table_is_of_these_families_and_tests():
    """The page is what the tests say: a family, property or reason that is new must be written into it."""
    assert set(NAMES) == set(FAMILIES)
    assert set(PROPERTIES) <= set(globals())
    expected = {(family, test): REASONS.get((family, test), "yes") for family in NAMES for test in PROPERTIES}
    assert PAGE.read_text() == render(expected), "run python -m tests.hf.coverage"
