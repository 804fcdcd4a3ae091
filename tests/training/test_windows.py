"""The order of the training windows."""

import numpy as np
import pytest

from bsbr.training.windows import WindowOrder


@pytest.mark.parametrize("num_tokens", [17, 31, 32, 33, 1000, 1023])
def test_windows_stay_inside_the_stream_and_do_not_overlap_in_an_epoch(num_tokens: int) -> None:
    order = WindowOrder(num_tokens, window=16, seed=3)
    for epoch in range(20):
        starts = np.sort(order.starts(epoch * order.per_epoch, order.per_epoch))
        assert starts[0] >= 0
        assert starts[-1] + 16 < num_tokens
        assert (np.diff(starts) == 16).all()


def test_any_split_into_batches_reads_the_same_windows() -> None:
    whole = WindowOrder(1000, window=16, seed=3).starts(0, 500)
    parts = WindowOrder(1000, window=16, seed=3)
    np.testing.assert_array_equal(np.concatenate([parts.starts(i, 7) for i in range(0, 497, 7)]), whole[:497])
    np.testing.assert_array_equal(parts.starts(123, 200), whole[123:323])


def test_seeds_and_epochs_differ_and_the_global_random_state_does_not_matter() -> None:
    np.random.seed(0)
    first = WindowOrder(1000, window=16, seed=1).starts(0, 120)
    np.random.seed(1)
    np.testing.assert_array_equal(WindowOrder(1000, window=16, seed=1).starts(0, 120), first)
    assert (WindowOrder(1000, window=16, seed=2).starts(0, 120) != first).any()
    assert (first[:60] != first[60:]).any()


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="one window needs 17"):
        WindowOrder(16, window=16, seed=0)
