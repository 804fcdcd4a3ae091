"""Blocks chosen from outside: the right ones, strictly past, and the model that reads them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.evaluation import routing
from bsbr.evaluation.routing import OneDraw, Oracle, Random, Recent, route, true_log_mass
from bsbr.ops import bsbr_attention
from bsbr.peers import full_attention

CHOICES = (Oracle(), Random(), OneDraw(), Recent())
CONFIGS = (
    BSBRConfig(block_size=8, top_k=2, dense_below=0),
    BSBRConfig(block_size=8, retrieval_block_size=4, top_k=3, dense_below=0),
    BSBRConfig(block_size=8, retrieval_block_size=4, top_k=3, dense_below=0, selection="group"),
    BSBRConfig(block_size=8, retrieval_block_size=4, top_k=3, dense_below=0, selection="recent"),
)


def tensors(length: int = 43, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, length, 4, 6, generator=generator)
    return 3 * q, torch.randn(2, length, 2, 6, generator=generator)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_blocks_are_distinct_ascending_and_past(choice: routing.Choice, config: BSBRConfig) -> None:
    q, k = tensors()
    chosen = choice(q, k, config, scale=0.4, layer=1)
    assert chosen.shape == (2, 43, 4, config.top_k)
    for t in range(43):
        past = t // 8 * (8 // config.unit)
        for row in chosen[:, t].flatten(0, 1).tolist():
            real = [block for block in row if block >= 0]
            assert len(real) == min(past, config.top_k)
            assert real == sorted(set(real)) == row[: len(real)]
            assert all(block < past for block in real)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_the_oracle_takes_the_blocks_of_largest_softmax_mass(config: BSBRConfig) -> None:
    q, k = tensors()
    chosen = Oracle()(q, k, config, scale=0.4, layer=0)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 0.4
    for t in (24, 30, 41, 42):
        past = t // 8 * (8 // config.unit)
        mass = scores[:, :, t, : past * config.unit].exp().unflatten(-1, (past, -1)).sum(-1)
        best = mass.topk(config.top_k, -1).indices.sort(-1).values
        assert torch.equal(chosen[:, t], best)


def test_no_choice_looks_at_later_tokens() -> None:
    q, k = tensors()
    config = CONFIGS[1]
    for choice in CHOICES:
        before = choice(q, k, config, scale=0.4, layer=0)
        changed_q, changed_k = q.clone(), k.clone()
        changed_q[:, 33:] += 1
        changed_k[:, 33:] -= 5
        after = choice(changed_q, changed_k, config, scale=0.4, layer=0)
        assert torch.equal(before[:, :33], after[:, :33])


def test_memory_is_bounded_by_segments_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = tensors()
    whole = Oracle()(q, k, CONFIGS[1], scale=0.4, layer=0)
    seen = []

    def watched(q: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(q.shape[1])
        return true_log_mass(q, *rest)

    monkeypatch.setattr(routing, "_ELEMENTS", {"cpu": 2 * 4 * 43 * 5})
    monkeypatch.setattr(routing, "true_log_mass", watched)
    assert torch.equal(Oracle()(q, k, CONFIGS[1], scale=0.4, layer=0), whole)
    assert max(seen) == 5


def test_random_blocks_follow_the_seed_and_cover_the_past_evenly() -> None:
    q, k = tensors(400)
    config = BSBRConfig(block_size=8, top_k=2, dense_below=0)
    one, same, other = (Random(seed)(q, k, config, scale=1.0, layer=0) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, Random(0)(q, k, config, scale=1.0, layer=1))
    counts = one[:, 392:].flatten().bincount(minlength=49)  # 2 x 8 x 4 queries, 2 of 49 blocks each
    assert int(counts.sum()) == 128
    assert int((counts > 0).sum()) > 35


def test_a_window_is_the_blocks_just_before(tiny: SimpleNamespace) -> None:
    q, k = tensors(43)
    config = BSBRConfig(block_size=8, top_k=2, dense_below=0, far="drop")
    chosen = Recent()(q, k, config, scale=1.0, layer=0)
    assert chosen[0, 42, 0].tolist() == [3, 4]
    assert chosen[0, 9, 0].tolist() == [0, -1]
    o = bsbr_attention(q, k, k, config, scale=1.0, block_indices=chosen)
    dense = full_attention(q[:, 24:43], k[:, 24:43], k[:, 24:43], scale=1.0)
    assert torch.allclose(o[:, 42], dense[:, -1], atol=1e-5)


def test_a_routed_model_differs_only_by_its_choice(tiny: SimpleNamespace) -> None:
    original = tiny.model()
    config = BSBRConfig(block_size=8, top_k=2, dense_below=0)
    ids = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    converted = convert(original, config)

    def own_choice(q: torch.Tensor, k: torch.Tensor, settings: BSBRConfig, *, scale: float, layer: int) -> torch.Tensor:
        from bsbr.ops import reference_attention

        return reference_attention(q, k, k, settings, scale=scale)[2]

    plain = logits(converted)
    assert torch.allclose(logits(route(converted, own_choice)), plain, atol=1e-4)
    assert not torch.allclose(logits(route(converted, Recent())), plain, atol=1e-2)
    assert torch.equal(logits(converted), plain)  # the model that was routed is untouched
    everything = convert(original, dataclasses.replace(config, top_k=8))
    assert torch.allclose(logits(route(everything, Random())), logits(original), atol=1e-4)
    with pytest.raises(NotImplementedError, match="whole sequences"):
        route(converted, Oracle())(ids, attention_mask=torch.tensor([[1] * 60, [0] * 3 + [1] * 57]), use_cache=False)
