"""What must not be read is not read: some of the cases of the long run."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from tests.long.isolation import rows_of_a_batch
from tests.long.poison import RUNS
from tests.ops.poison import filled_memory


@pytest.mark.parametrize("name", RUNS)
def test_numbers_that_are_none_change_nothing_where_nobody_may_look(name):
    for seed in range(12):
        row = RUNS[name][0](seed)
        assert not row["wrong"], f"case {seed}: {row}"
        assert not row.get("vanished"), f"case {seed}: {row}"


def test_a_row_of_a_batch_changes_no_bit_of_another():
    for seed in range(20):
        row = rows_of_a_batch(seed)
        assert not row["wrong"], f"case {seed}: {row}"


def test_filled_memory_shows_what_reads_it():
    """The negative control: an output that is never written would be seen."""
    with filled_memory():
        assert torch.empty(4, 4).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
        x = torch.randn(1, 9, 1, 8)
        assert bsbr_attention(x, x, x, BSBRConfig(block_size=4, top_k=1, dense_below=0)).isfinite().all()
    assert not torch.are_deterministic_algorithms_enabled()
