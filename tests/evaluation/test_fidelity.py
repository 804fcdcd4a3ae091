"""Predictions compared a part at a time are predictions compared at once; windows and ranges of positions."""

from types import SimpleNamespace

import pytest
import torch

from bsbr.errors import UserError
from bsbr.evaluation import fidelity
from bsbr.evaluation.agreement import compare, read_teacher
from bsbr.evaluation.fidelity import (
    METRICS,
    check_head,
    compare_predictions,
    position_buckets,
    predict,
    spread_windows,
    sum_by_position,
)


@pytest.fixture
def pair(tiny: SimpleNamespace) -> SimpleNamespace:
    original = tiny.model()
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(original=original, other=tiny.disturbed(original, 0.05), ids=ids)


def test_it_gives_what_the_whole_comparison_gives(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_ELEMENTS", {"cpu": 256 * 9})  # nine positions at a time
    targets = pair.ids[:, 6:].flatten()
    found = compare_predictions(predict(pair.original, pair.ids, 5), predict(pair.other, pair.ids, 5), targets)
    with torch.no_grad():
        p, q = (model(pair.ids).logits[:, 5:-1].flatten(0, 1) for model in (pair.original, pair.other))
    expected = compare(read_teacher(p, targets), q)
    for name in METRICS:
        assert found[name].dtype == torch.float64
        assert torch.allclose(found[name], expected[name], atol=1e-6), name
    assert float(found["kl"].mean()) > 1e-3


def test_a_model_is_at_no_distance_from_itself(pair: SimpleNamespace) -> None:
    mine = predict(pair.original, pair.ids, 0)
    found = compare_predictions(mine, mine, pair.ids[:, 1:].flatten())
    assert float(found["kl"].max()) < 1e-12
    assert float(found["top1_agreement"].min()) == 1


def test_numbers_that_are_none_are_refused(pair: SimpleNamespace) -> None:
    mine, broken = (predict(pair.original, pair.ids, 0) for _ in range(2))
    broken.hidden[3, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        compare_predictions(mine, broken, pair.ids[:, 1:].flatten())


def test_a_model_that_scales_its_logits_is_refused(pair: SimpleNamespace) -> None:
    check_head(pair.original)
    pair.original.register_forward_hook(lambda module, given, made: made | {"logits": made.logits * 0.5})
    with pytest.raises(UserError, match="after the head"):
        check_head(pair.original)


def test_windows_spread_over_a_document_and_never_overlap(tiny: SimpleNamespace) -> None:
    texts = ["".join(chr(97 + i % 26) for i in range(100)), "short"]
    long, short = spread_windows(tiny.tokenizer(), texts, 30, 5)
    assert short == []
    assert len(long) == 3
    whole = tiny.tokenizer()(texts[0], add_special_tokens=False)["input_ids"]
    starts = [11, 35, 58]
    assert [window.tolist() for window in long] == [whole[start : start + 30] for start in starts]


def test_ranges_of_positions_hold_their_own_positions() -> None:
    buckets = position_buckets(100, first=16, after=25)
    assert list(buckets) == ["25-100", "0-16", "16-32", "32-64", "64-100"]
    values = {"kl": torch.arange(99.0).repeat(2)}  # two windows of 100 tokens: 99 positions each
    sums = sum_by_position(values, 2, buckets)
    assert sums["16-32"] == {"n": 32, "kl": 2.0 * sum(range(16, 32))}
    assert sums["25-100"] == {"n": 148, "kl": 2.0 * sum(range(25, 99))}
    assert sum(sums[name]["n"] for name in list(buckets)[1:]) == 198
