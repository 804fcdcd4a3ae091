"""The model trained is the one transformers computes, and its held-out loss is what the words say."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from bsbr.training.build import build_model
from bsbr.training.language_model import document_positions, held_out_loss, token_nll
from bsbr.training.recipe import PretrainConfig


def _tiny(seed: int = 0):
    recipe = PretrainConfig(layers=2, heads=2, hidden=16, context=8, batch_tokens=8, tokens=8, seed=seed)
    return build_model(recipe, 20)


def test_token_nll_is_the_loss_of_the_models_own_forward() -> None:
    model = _tiny()
    windows = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = model(windows[:, :-1]).logits
    expected = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(3, 8)
    torch.testing.assert_close(token_nll(model, windows), expected)


def test_the_seed_alone_chooses_the_weights() -> None:
    before = torch.random.get_rng_state()
    first, second, other = _tiny(1), _tiny(1), _tiny(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_the_default_recipe_fits_the_size_limit() -> None:
    recipe = PretrainConfig(tokens=1)
    with torch.device("meta"):
        model = build_model(recipe, recipe.vocab)
    assert sum(p.numel() for p in model.parameters()) * 2 <= 14_300_000


def test_held_out_loss_counts_each_text_token_once() -> None:
    model = _tiny()
    stream = torch.randint(1, 20, (30,), generator=torch.Generator().manual_seed(1))
    stream[5] = 0
    lengths = torch.arange(20)
    found = held_out_loss(model, stream.int(), lengths, context=8)
    nll = torch.cat([token_nll(model, stream[None, s : s + 9])[0] for s in (0, 8, 16)])
    scored = stream[1:25] != 0
    assert found.windows == 3
    assert found.num_tokens == 23
    assert found.num_bytes == int(stream[1:25].sum())
    assert found.nll == pytest.approx(nll[scored].mean().item(), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nll[scored].sum().item() / math.log(2) / found.num_bytes)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_held_out_loss_does_not_depend_on_the_batch() -> None:
    model, lengths = _tiny(), torch.ones(20, dtype=torch.int64)
    stream = torch.randint(20, (100,), generator=torch.Generator().manual_seed(2))
    one = held_out_loss(model, stream, lengths, context=8, batch_windows=1)
    many = held_out_loss(model, stream, lengths, context=8, batch_windows=64)
    assert one.nll == pytest.approx(many.nll, rel=1e-6)
    assert held_out_loss(model, stream, lengths, context=8, max_windows=5).windows == 5


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess() -> None:
    model = _tiny()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    found = held_out_loss(model, torch.arange(20).repeat(3), torch.ones(20, dtype=torch.int64), context=8)
    assert found.nll == pytest.approx(math.log(20), rel=1e-6)


def test_too_little_held_out_text_is_refused() -> None:
    with pytest.raises(ValueError, match="one window needs 9"):
        held_out_loss(_tiny(), torch.zeros(8, dtype=torch.int64), torch.ones(20), context=8)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", [None, "bsbr"])
def test_packed_documents_are_as_good_as_alone(architecture, attention) -> None:
    from bsbr.training.build import parse_attention

    settings = attention and parse_attention("bsbr:block_size=4,top_k=1,dense_below=0")
    recipe = PretrainConfig(
        architecture=architecture, attention=settings, layers=2, heads=2, hidden=16, context=24, batch_tokens=24,
        tokens=8,
    )  # fmt: skip
    model = build_model(recipe, 20)
    windows = torch.randint(1, 20, (1, 25), generator=torch.Generator().manual_seed(0))
    windows[0, [0, 9]] = 0
    packed = token_nll(model, windows, document_positions(windows[:, :-1]))
    first, second = token_nll(model, windows[:, :10]), token_nll(model, windows[:, 9:])
    torch.testing.assert_close(packed, torch.cat([first, second], 1), atol=2e-6, rtol=1e-5)
    joined = token_nll(model, windows)
    assert (joined[:, 10:] - packed[:, 10:]).abs().max() > 1e-4


def test_held_out_documents_can_be_kept_apart() -> None:
    model, lengths = _tiny(), torch.ones(20, dtype=torch.int64)
    stream = torch.randint(1, 20, (17,), generator=torch.Generator().manual_seed(2))
    stream[4] = 0
    apart, joined = (held_out_loss(model, stream, lengths, context=8, separate=x).nll for x in (True, False))
    assert apart != joined
    parts = held_out_loss(model, stream, lengths, context=8).nll_by_part
    assert len(parts) == 8
    assert sum(parts) / 8 == pytest.approx(joined)
