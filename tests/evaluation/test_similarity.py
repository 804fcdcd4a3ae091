"""Hidden-state similarity: identities, an independent CKA, and the published definition so named."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from bsbr.evaluation.similarity import (
    compare_states,
    cosine_between_tokens,
    layer_names,
    linear_cka,
    random_tokens,
    token_similarity,
)


def states(rows: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_states_against_themselves() -> None:
    found = token_similarity(states(), states())
    torch.testing.assert_close(found["cosine"], torch.ones(40, dtype=torch.float64), atol=1e-12, rtol=0)
    for metric in ("mse", "squared_error", "feature_kl_legacy"):
        assert torch.equal(found[metric], torch.zeros(40, dtype=torch.float64)), metric


def test_scaled_states_keep_their_direction_only() -> None:
    found = token_similarity(states(), 3 * states())
    torch.testing.assert_close(found["cosine"], torch.ones(40, dtype=torch.float64), atol=1e-6, rtol=0)
    relative = (found["squared_error"].sum() / found["squared_norm"].sum()).sqrt()
    assert relative.item() == pytest.approx(2, rel=1e-6)
    torch.testing.assert_close(found["mse"], found["squared_error"] / 6)


def test_legacy_kl_is_the_published_one() -> None:
    a, b = states(), states(seed=1)
    p, q = (torch.softmax(side, -1).double().numpy() + 1e-10 for side in (a, b))
    expected = [entropy(x / x.sum(), y / y.sum()) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(token_similarity(a, b)["feature_kl_legacy"].numpy(), expected, rtol=1e-5)


def test_one_huge_feature_hides_in_the_raw_cosine_only() -> None:
    shift = torch.tensor([1000.0, 0, 0, 0, 0, 0])
    found = token_similarity(states() + shift, states(seed=1) + shift)
    assert found["cosine"].min() > 0.999
    assert found["centred_cosine"].mean().abs() < 0.3


def test_cka_of_unrelated_states_is_about_zero() -> None:
    """The plain estimator gives about width / rows here; the debiased one must not."""
    values = [linear_cka(states(80, 60, seed), states(80, 60, seed + 100)) for seed in range(30)]
    assert abs(float(np.mean([value for value in values if value is not None]))) < 0.05


def test_cka_equals_its_definition_on_gram_matrices() -> None:
    x, y = states(30, 5), states(30, 5) + 0.5 * states(30, 5, seed=2)

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        n = len(a)
        k, m = (side.double() - side.double().mean(0) for side in (a, b))
        k, m = k @ k.T, m @ m.T
        k.fill_diagonal_(0)
        m.fill_diagonal_(0)
        cross = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
        return float(cross / (n * (n - 3)))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-5)


def test_cka_needs_more_tokens_than_features() -> None:
    assert linear_cka(states(6, 6), states(6, 6)) is None


def test_layers_are_named_and_embeddings_left_out() -> None:
    layers = [states(seed=seed) for seed in range(4)]
    masks = {"all": torch.ones(40, dtype=torch.bool), "exposed": torch.arange(40) >= 30}
    found = compare_states(layers, layers, masks)
    assert list(found["layers"]) == [str(name) for name in layer_names(layers)] == ["1", "2", "last"]
    assert found["layers"]["last"]["all"]["n"] == 40
    assert found["layers"]["last"]["exposed"]["n"] == 10
    assert found["tokens"]["cosine"].shape == (40,)
    with pytest.raises(ValueError, match="same layers"):
        compare_states(layers, layers[1:], masks)


def test_floor_compares_different_tokens() -> None:
    assert cosine_between_tokens(states(400)).mean().abs() < 0.1


def test_random_tokens_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    ids = random_tokens(50, 1000, seed=1, index=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ids.min() >= 0
    assert ids.max() < 50
    assert not torch.equal(ids, random_tokens(50, 1000, seed=1, index=3))
