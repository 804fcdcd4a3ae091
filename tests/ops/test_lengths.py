"""Longer texts, checked row by row, a needle in each one's past; the long run does the same from 46,340 tokens on."""

import pytest
import torch

from bsbr.config import BSBRConfig
from bsbr.ops import bsbr_attention
from tests.ops.cases import skip_unless_able
from tests.ops.needles import draw_text, row_ratio, rows_to_check

CONFIG = BSBRConfig(dense_below=0, block_size=128, top_k=4)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_rows_of_a_long_text_stay_within_the_forward_error_bound(backend):
    rows = rows_to_check(3001, 128, (), 12, 0)
    text = draw_text(3001, 2, 1, 16, CONFIG, rows, torch.float32)
    skip_unless_able(backend, text.q, CONFIG)
    o = bsbr_attention(text.q, text.k, text.v, CONFIG, block_indices=text.chosen.clamp(min=0), backend=backend)
    for row in rows:
        for head in (0, 1):
            assert row_ratio(text, row, head, CONFIG, o) <= 1, (row, head)


def test_a_needle_that_is_left_out_is_noticed():
    """The negative control: where a query reads another block than the one its needle is in, the bound is passed."""
    row = 3000
    text = draw_text(3001, 2, 1, 16, CONFIG, [row], torch.float32)
    chosen = text.chosen.clamp(min=0).clone()
    needle = (text.v[0, :, 0, 0] == 30).nonzero()[0, 0] // 128
    chosen[0, row] = torch.where(chosen[0, row] == needle, needle + 1, chosen[0, row])
    o = bsbr_attention(text.q, text.k, text.v, CONFIG, block_indices=chosen, backend="chunked")
    assert row_ratio(text, row, 0, CONFIG, o) > 1
