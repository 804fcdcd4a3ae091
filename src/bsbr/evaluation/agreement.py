"""How near two next-token predictions are, position by position: divergences and top-k agreement."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bsbr.errors import UserError

TOP_K = (1, 5, 10)
_STEP_ELEMENTS = 1 << 16  # rows x vocabulary of one step: its few float64 copies stay in the cache


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What is needed of the original's predictions to compare others with them, computed once."""

    logits: Tensor
    """Predictions of the next token, [T, V], float32."""

    lse: Tensor
    """Natural log of their summed exponentials, [T], float64."""

    targets: Tensor
    """True next tokens, [T], int64."""

    top: Tensor
    """Tokens by falling logit, ties by rising id, [T, min(10, V)], int64."""

    margin: Tensor
    """Probability of the first token less that of the second, [T], float64."""

    nll: Tensor
    """-ln p of the true token, [T], float64."""

    confidence: Tensor
    """Probability of the first token, [T], float64."""


def read_teacher(logits: Tensor, targets: Tensor) -> Teacher:
    """Prepare the original's predictions for comparison.

    Args:
        logits: predictions of the next token at T positions, [T, V], any float type.
        targets: the tokens that came next, [T], int64.
    Returns:
        The teacher side of `compare`.
    Raises:
        ValueError: the shapes do not fit.
        UserError: a logit is NaN or infinite.
    """
    _check(logits, targets, "the original model")
    logits = logits.float()
    top = top_tokens(logits, max(TOP_K))
    lse = log_normaliser(logits)
    first = (logits.gather(1, top[:, :2]).double() - lse[:, None]).exp()
    return Teacher(
        logits=logits,
        lse=lse,
        targets=targets,
        top=top,
        margin=first[:, 0] - first[:, 1] if first.shape[1] > 1 else first[:, 0],
        nll=lse - logits.gather(1, targets[:, None])[:, 0].double(),
        confidence=first[:, 0],
    )


def log_normaliser(logits: Tensor) -> Tensor:
    """Natural log of the summed exponentials of each row, in float64 without a float64 copy of the whole.

    Args:
        logits: [T, V], any float type.
    Returns:
        [T], float64.

    Example:
        >>> round(log_normaliser(torch.zeros(1, 8)).exp().item(), 12)
        8.0
    """
    return torch.cat([rows.double().logsumexp(-1) for rows in logits.split(_rows_per_step(logits))])


def compare(teacher: Teacher, logits: Tensor) -> dict[str, Tensor]:
    """Compare a student's predictions with the original's at every position.

    Sources: the KL statistics of llama.cpp's `perplexity --kl-divergence`; the any-overlap agreement of the
    original public implementation (JacobFV/bsbr), named as such, with the strict readings beside it.

    1. p and q are float64 softmaxes of the float32 logits, with no added epsilon.
    2. Divergences sum over the full vocabulary in float64, in nats.
    3. Top-k sets P (teacher) and Q (student) take ties by the lower token id; a and c are their first tokens.

    Args:
        teacher: from `read_teacher`.
        logits: the student's predictions at the same positions, [T, V].
    Returns:
        float64 vectors [T]: `nll`; `kl`, `reverse_kl`, `js`, `total_variation`; `delta_p` (q - p of the true
        token), `log_ratio` (ln p - ln q of it); `top1_agreement` (a = c); for each k
        `any_overlap@k` (P and Q meet), `teacher_in_topk@k` (a in Q), `student_in_topk@k` (c in P),
        `overlap@k` (shared / k), `jaccard@k`, `same_set@k`, `same_order@k`, `mass@k` (q of P);
        `teacher_rank` (rank of a in q, from 1); `confidence` (largest q), `correct` (c is the true token).
    Raises:
        ValueError: the shapes do not fit.
        UserError: a logit is NaN or infinite.

    Example:
        >>> logits, targets = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2])
        >>> same = compare(read_teacher(logits, targets), logits)
        >>> same["kl"].item(), same["top1_agreement"].item()
        (0.0, 1.0)
    """
    if logits.shape != teacher.logits.shape:
        raise ValueError(
            f"logits must be {list(teacher.logits.shape)} as the original's, got {list(logits.shape)}: "
            "give both models the same tokens and vocabulary"
        )
    _check(logits, teacher.targets, "the changed model")
    logits = logits.float()
    steps = _rows_per_step(logits)
    parts = [_divergences(teacher, logits, slice(i, i + steps)) for i in range(0, logits.shape[0], steps)]
    result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result.update(_agreement(teacher, logits))
    return result


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """The k tokens of the highest logits, ties by the lower id first.

    Args:
        logits: [T, V].
        k: wanted tokens; all of them where V is smaller.
    Returns:
        Token ids by falling logit, [T, min(k, V)].

    Example:
        >>> top_tokens(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).tolist()
        [[1, 2]]
    """
    vocabulary = logits.shape[1]
    k = min(k, vocabulary)
    # topk leaves the order of equal values open; one more value than wanted shows ties at the edge as well.
    values, ids = logits.topk(min(k + 1, vocabulary), dim=-1)
    tied = (values[:, 1:] == values[:, :-1]).any(-1).nonzero()[:, 0]
    ids = ids[:, :k]
    if len(tied):
        ids = ids.clone()
        ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


def _divergences(teacher: Teacher, logits: Tensor, rows: slice) -> dict[str, Tensor]:
    target = teacher.targets[rows, None]
    lp = teacher.logits[rows].double() - teacher.lse[rows, None]
    lq = logits[rows].double()
    lq = lq - lq.logsumexp(-1, keepdim=True)
    p, q = lp.exp(), lq.exp()
    true_lp, true_lq = lp.gather(1, target)[:, 0], lq.gather(1, target)[:, 0]
    entropy_p, entropy_q = (p * lp).sum(-1), (q * lq).sum(-1)  # negative entropies
    both = p + q
    # With m = (p + q) / 2: sum of m ln m = sum of (p + q) ln(p + q) / 2 - ln 2.
    mixed = (both * both.log()).sum(-1) / 2 - math.log(2)
    result = {
        "nll": -true_lq,
        # Rounding may leave -1e-16 where the two are equal: a divergence is never negative.
        "kl": (entropy_p - (p * lq).sum(-1)).clamp_min(0),
        "reverse_kl": (entropy_q - (q * lp).sum(-1)).clamp_min(0),
        "js": ((entropy_p + entropy_q) / 2 - mixed).clamp_min(0),
        "total_variation": (p.sum(-1) - torch.minimum(p, q).sum(-1)).clamp_min(0),
        "delta_p": true_lq.exp() - true_lp.exp(),
        "log_ratio": true_lp - true_lq,
        "confidence": q.amax(-1),
    }
    for k in TOP_K[1:]:
        result[f"mass@{k}"] = q.gather(1, teacher.top[rows, :k]).sum(-1)
    return result


def _agreement(teacher: Teacher, logits: Tensor) -> dict[str, Tensor]:
    top_p, top_q = teacher.top, top_tokens(logits, max(TOP_K))
    shared = top_p[:, :, None] == top_q[:, None, :]  # [T, k, k]
    result = {
        "top1_agreement": shared[:, 0, 0],
        "correct": top_q[:, 0] == teacher.targets,
        "teacher_rank": _ranks(logits, top_p[:, 0], shared[:, 0]),
    }
    for k in TOP_K:
        size = min(k, top_p.shape[1])
        both = shared[:, :k, :k].sum((1, 2)).double()
        result[f"any_overlap@{k}"] = both > 0
        if k == 1:
            continue
        result[f"teacher_in_topk@{k}"] = shared[:, 0, :k].any(-1)
        result[f"student_in_topk@{k}"] = shared[:, :k, 0].any(-1)
        result[f"overlap@{k}"] = both / size
        result[f"jaccard@{k}"] = both / (2 * size - both)
        result[f"same_set@{k}"] = both == size
        result[f"same_order@{k}"] = (top_p[:, :k] == top_q[:, :k]).all(-1)
    return {name: value.double() for name, value in result.items()}


def _rows_per_step(logits: Tensor) -> int:
    return max(8, _STEP_ELEMENTS // logits.shape[1])


def _ranks(logits: Tensor, tokens: Tensor, in_top: Tensor) -> Tensor:
    """Rank of each token by falling logit, from 1; `in_top` [T, k] says where it stands among the first k."""
    ranks = in_top.long().argmax(-1) + 1
    far = (~in_top.any(-1)).nonzero()[:, 0]
    # Almost every token stands among the first: only the others are counted over the vocabulary.
    if len(far):
        row, token = logits[far], tokens[far, None]
        own, ids = row.gather(1, token), torch.arange(logits.shape[1], device=logits.device)
        ranks[far] = 1 + ((row > own) | ((row == own) & (ids < token))).sum(-1)
    return ranks


def _check(logits: Tensor, targets: Tensor, whose: str) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [T, V] and targets [T], got {list(logits.shape)} and {list(targets.shape)}")
    if not bool(torch.isfinite(logits.amax(-1) - logits.amin(-1)).all()):
        raise UserError(
            f"logits of {whose} are not finite: expected numbers, got NaN or infinity. "
            "Check its weights, or use --dtype float32"
        )
