"""Agreement and divergences: identities, orderings, ties, and an independent implementation."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from bsbr.errors import UserError
from bsbr.evaluation.agreement import compare, read_teacher, top_tokens

SHAPES = [(1, 2), (3, 4), (40, 11), (64, 300)]


def pair(rows: int, vocabulary: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(rows, vocabulary, generator=generator)
    student = teacher + noise * torch.randn(rows, vocabulary, generator=generator)
    return teacher, student, torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_teacher_against_itself_differs_by_nothing(rows: int, vocabulary: int) -> None:
    logits, _, targets = pair(rows, vocabulary, 0.0)
    found = compare(read_teacher(logits, targets), logits)
    for metric in ("kl", "reverse_kl", "total_variation", "delta_p", "log_ratio"):
        assert torch.equal(found[metric], torch.zeros(rows, dtype=torch.float64)), metric
    assert float(found["js"].max()) < 1e-14
    for metric in (
        "top1_agreement",
        "any_overlap@5",
        "overlap@10",
        "same_order@10",
        "jaccard@5",
        "teacher_rank",
    ):
        assert torch.equal(found[metric], torch.ones(rows, dtype=torch.float64)), metric


@pytest.mark.parametrize("noise", [0.01, 0.5, 2.0, 20.0])
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_orderings_hold_at_every_position(rows: int, vocabulary: int, noise: float) -> None:
    teacher, student, targets = pair(rows, vocabulary, noise)
    found = compare(read_teacher(teacher, targets), student)
    for k in (5, 10):
        chain = [found[f"{name}@{k}"] for name in ("same_order", "same_set", "jaccard", "overlap", "any_overlap")]
        chain_of_first = [found["top1_agreement"], found[f"teacher_in_topk@{k}"], found[f"any_overlap@{k}"]]
        student_first = [found["top1_agreement"], found[f"student_in_topk@{k}"], found[f"any_overlap@{k}"]]
        for values in (chain, chain_of_first, student_first):
            for less, more in itertools.pairwise(values):
                assert bool((less <= more).all())
    for metric in ("kl", "reverse_kl", "js", "total_variation"):
        assert bool((found[metric] >= 0).all()), metric
    assert bool((found["js"] <= np.log(2) + 1e-12).all())
    assert bool((found["total_variation"] <= 1 + 1e-12).all())
    assert torch.equal(found["any_overlap@1"], found["top1_agreement"])
    assert torch.equal(found["teacher_rank"] <= 5, found["teacher_in_topk@5"] > 0)


def test_divergences_equal_an_independent_implementation() -> None:
    teacher, student, targets = pair(50, 700, 1.0)
    found = compare(read_teacher(teacher, targets), student)
    p, q = (np.exp(log_softmax(side.double().numpy(), axis=1)) for side in (teacher, student))
    m = (p + q) / 2
    rows, y = np.arange(50), targets.numpy()
    expected = {
        "kl": rel_entr(p, q).sum(1),
        "reverse_kl": rel_entr(q, p).sum(1),
        "js": (rel_entr(p, m).sum(1) + rel_entr(q, m).sum(1)) / 2,
        "total_variation": np.abs(p - q).sum(1) / 2,
        "delta_p": q[rows, y] - p[rows, y],
        "nll": -np.log(q[rows, y]),
        "mass@5": np.take_along_axis(q, np.argsort(-p, axis=1)[:, :5], 1).sum(1),
        "teacher_rank": 1 + (q > q[rows, p.argmax(1)][:, None]).sum(1),
    }
    for metric, values in expected.items():
        np.testing.assert_allclose(found[metric].numpy(), values, atol=1e-9, rtol=1e-9, err_msg=metric)


def test_agreement_equals_sets_of_python() -> None:
    teacher, student, targets = pair(60, 40, 1.5)
    found = compare(read_teacher(teacher, targets), student)
    for row in range(60):
        ranked = [sorted(range(40), key=lambda i, side=side: (-side[row, i].item(), i)) for side in (teacher, student)]
        for k in (5, 10):
            p, q = (ids[:k] for ids in ranked)
            shared = len(set(p) & set(q))
            assert found[f"overlap@{k}"][row] == shared / k
            assert found[f"jaccard@{k}"][row] == shared / (2 * k - shared)
            assert bool(found[f"any_overlap@{k}"][row]) == bool(shared)
            assert bool(found[f"teacher_in_topk@{k}"][row]) == (ranked[0][0] in q)
            assert bool(found[f"student_in_topk@{k}"][row]) == (ranked[1][0] in p)
            assert bool(found[f"same_order@{k}"][row]) == (p == q)


def test_ties_go_to_the_lower_id() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (200, 50), generator=generator).float()
    expected = [sorted(range(50), key=lambda i, row=row: (-row[i].item(), i))[:10] for row in logits]
    assert top_tokens(logits, 10).tolist() == expected
    ranks = compare(read_teacher(logits.flip(1), torch.zeros(200, dtype=torch.long)), logits)["teacher_rank"]
    first = top_tokens(logits.flip(1), 1)[:, 0].tolist()
    order = [sorted(range(50), key=lambda i, row=row: (-row[i].item(), i)) for row in logits]
    assert ranks.tolist() == [ids.index(token) + 1 for ids, token in zip(order, first, strict=True)]


def test_an_offset_of_the_logits_changes_nothing() -> None:
    teacher, student, targets = pair(20, 30, 0.5)
    shift = torch.arange(20.0)[:, None]
    plain = compare(read_teacher(teacher, targets), student)
    moved = compare(read_teacher(teacher + 8 * shift, targets), student - 4 * shift)
    torch.testing.assert_close(plain["kl"], moved["kl"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    teacher, student, targets = pair(4, 6, 0.1)
    student[2, 3] = value
    with pytest.raises(UserError, match="not finite"):
        compare(read_teacher(teacher, targets), student)
    with pytest.raises(UserError, match="original model"):
        read_teacher(student, targets)


def test_other_shapes_are_refused() -> None:
    teacher, student, targets = pair(4, 6, 0.1)
    with pytest.raises(ValueError, match="same tokens and vocabulary"):
        compare(read_teacher(teacher, targets), student[:, :5])
    with pytest.raises(ValueError, match=r"\[T\]"):
        read_teacher(teacher, targets[:2])
