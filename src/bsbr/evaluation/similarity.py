"""How near the hidden states of two models are, layer by layer, on real text and on random tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bsbr.evaluation.buckets import sum_by_bucket

LAST = "last"
HISTOGRAM_METRICS = ("cosine", "mse", "feature_kl_legacy")


def layer_names(hidden_states: Sequence[Tensor]) -> list[int | str]:
    """Name what a Hugging Face model returns as hidden states.

    Args:
        hidden_states: the embeddings, then the output of each layer; the last has passed the final norm.
    Returns:
        1, 2, ... for the layers after which the next one follows, and "last" for the state after the final
        norm. The embeddings, which no attention has touched, are left out.

    Example:
        >>> layer_names([torch.zeros(1)] * 4)
        [1, 2, 'last']
    """
    return [*range(1, len(hidden_states) - 1), LAST]


def token_similarity(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    """Compare two sets of hidden states token by token.

    `feature_kl_legacy` is what the original public implementation (JacobFV/bsbr) called KL divergence: the
    KL of softmaxes over the hidden features, with 1e-10 added. It is no divergence between predictions.

    Args:
        teacher, student: states of the same tokens, [T, D].
    Returns:
        float64 vectors [T]: `cosine`; `centred_cosine` (after taking off the teacher's mean state, as a few
        huge features make the raw one look high); `mse` over the features; `squared_error` and
        `squared_norm`, whose sums give the relative L2 distance; `feature_kl_legacy`.

    Example:
        >>> same = token_similarity(torch.eye(3), torch.eye(3))
        >>> same["cosine"].tolist(), same["mse"].tolist()
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    a, b = teacher.float(), student.float()
    error = (a - b).square()
    mean = a.mean(0)
    p, q = (_legacy_softmax(state) for state in (a, b))
    return {
        "cosine": _cosine(a, b),
        "centred_cosine": _cosine(a - mean, b - mean),
        "mse": error.mean(-1).double(),
        "squared_error": error.sum(-1).double(),
        "squared_norm": a.square().sum(-1).double(),
        "feature_kl_legacy": (p * (p.log() - q.log())).sum(-1).double(),
    }


def cosine_between_tokens(states: Tensor) -> Tensor:
    """Cosine of each token's state with that of a token half the text away: the floor to read a cosine
    against.

    Args:
        states: [T, D].
    Returns:
        [T], float64.
    """
    return _cosine(states.float(), states.float().roll(len(states) // 2, 0))


def linear_cka(teacher: Tensor, student: Tensor) -> float | None:
    """Debiased linear CKA: 1 for states equal up to rotation and scale, 0 in expectation for unrelated ones.

    Source: Kornblith et al. (arXiv 1905.00414) with the unbiased HSIC of Song et al. (2012), computed from
    features, so that no T x T matrix appears.

    Args:
        teacher, student: states of the same tokens, [T, D].
    Returns:
        The similarity; None where there are not more tokens than features, as it means nothing there.

    Example:
        >>> states = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(states, 3 * states.flip(1)), 6)
        1.0
    """
    if len(teacher) <= max(teacher.shape[1], student.shape[1], 4):
        return None
    x, y = (state.float() - state.float().mean(0) for state in (teacher, student))
    own = _unbiased_hsic(x, x) * _unbiased_hsic(y, y)
    return float(_unbiased_hsic(x, y) / own.sqrt()) if own > 0 else None


def compare_states(teacher: Sequence[Tensor], student: Sequence[Tensor], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare all layers of two models on one window, as sums that add up over windows.

    Args:
        teacher, student: hidden states as Hugging Face returns them, without the batch, each [T, D].
        masks: buckets of positions, [T] bool each, one of them "all".
    Returns:
        "layers": layer name to bucket to {"n": tokens, metric: sum}, with "linear_cka" of the window (not a
        sum) under "all"; "tokens": metric to the last layer's vector [T], for distributions.
    Raises:
        ValueError: the models have different layers.
    """
    if len(teacher) != len(student):
        raise ValueError(f"models must have the same layers, got {len(teacher)} and {len(student)} hidden states")
    layers: dict[str, dict[str, dict[str, float]]] = {}
    last: dict[str, Tensor] = {}
    for name, a, b in zip(layer_names(teacher), teacher[1:], student[1:], strict=True):
        values = token_similarity(a, b)
        layers[str(name)] = sum_by_bucket(values, masks)
        cka = linear_cka(a, b)
        if cka is not None:
            layers[str(name)]["all"]["linear_cka"] = cka
        if name == LAST:
            last = {metric: values[metric] for metric in HISTOGRAM_METRICS}
    return {"layers": layers, "tokens": last}


def random_tokens(vocabulary: int, length: int, *, seed: int, index: int) -> Tensor:
    """Uniform random token ids: the inputs of the published similarity figures, here with a seed.

    Args:
        vocabulary: ids run from 0 to vocabulary - 1.
        length: tokens.
        seed, index: the same two give the same ids.
    Returns:
        [length], int64.

    Example:
        >>> random_tokens(10, 4, seed=0, index=1).equal(random_tokens(10, 4, seed=0, index=1))
        True
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randint(0, vocabulary, (length,), generator=generator)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    dot, norm_a, norm_b = (x.sum(-1).double() for x in (a * b, a.square(), b.square()))
    return dot / (norm_a * norm_b).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _legacy_softmax(states: Tensor) -> Tensor:
    p = states.softmax(-1) + 1e-10
    return p / p.sum(-1, keepdim=True)


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al.'s estimator for K = x x^T and L = y y^T with their diagonals struck out; x, y [n, D]."""
    n = len(x)
    x_diagonal, y_diagonal = x.square().sum(-1).double(), y.square().sum(-1).double()
    trace = (x.T @ y).double().square().sum() - (x_diagonal * y_diagonal).sum()
    x_rows, y_rows = (x @ x.sum(0)).double() - x_diagonal, (y @ y.sum(0)).double() - y_diagonal
    pairs = x_rows.sum() * y_rows.sum() / ((n - 1) * (n - 2))
    return (trace + pairs - 2 * (x_rows * y_rows).sum() / (n - 2)) / (n * (n - 3))
