"""Where a sequence stands in a batch, and beside what, changes nothing."""

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.peers import AdditiveConfig

CONFIGS = [
    pytest.param(BSBRConfig(dense_below=0, block_size=8, top_k=1), id="bsbr"),
    pytest.param(BSBRConfig(block_size=8, top_k=0, state="block", dense_below=12), id="states"),
    pytest.param(AdditiveConfig(block_size=8), id="additive"),
]


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_padding_changes_nothing_at_real_tokens(family, config, tiny, tokens, logits):
    converted = convert(tiny(family), config)
    ids = tokens(4, 60)
    mask = torch.ones(4, 60, dtype=torch.long)
    mask[0, :13] = 0  # left
    mask[1, 41:] = 0  # right
    mask[2, :5] = mask[2, 50:] = 0  # both
    together = logits(converted, ids, attention_mask=mask, position_ids=positions(mask))
    for row in range(4):
        alone = logits(converted, ids[row, mask[row].bool()][None])[0]
        assert (together[row, mask[row].bool()] - alone).abs().max() <= 2e-5
    assert torch.isfinite(together).all()


def test_padding_of_every_row_and_an_empty_row(tiny, tokens, logits):
    """Collators pad to a multiple, so that the last column may be real nowhere."""
    converted, ids = convert(tiny("llama"), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(3, 60)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, 50:] = mask[1, 43:] = mask[2] = 0
    together = logits(converted, ids, attention_mask=mask)
    for row, length in ((0, 50), (1, 43)):
        assert (together[row, :length] - logits(converted, ids[row : row + 1, :length])[0]).abs().max() <= 2e-5
    assert torch.isfinite(together).all()


def test_what_stands_in_the_padding_does_not_matter(tiny, tokens, logits):
    converted, ids = convert(tiny("gpt2"), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(2, 50)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = mask[1, 44:] = 0
    other = torch.where(mask.bool(), ids, 5)
    pair = [logits(converted, x, attention_mask=mask, position_ids=positions(mask)) for x in (ids, other)]
    assert torch.equal(pair[0][mask.bool()], pair[1][mask.bool()])


def test_a_mask_of_ones_is_no_mask(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(2, 50)
    assert torch.equal(logits(converted, ids, attention_mask=torch.ones_like(ids)), logits(converted, ids))


def test_batch_neighbours_do_not_matter(family, tiny, tokens, logits):
    converted, ids = convert(tiny(family), BSBRConfig(dense_below=0, block_size=8, top_k=1)), tokens(3, 50)
    together = logits(converted, ids)
    for row in range(3):
        assert (together[row] - logits(converted, ids[row : row + 1])[0]).abs().max() <= 2e-5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gpt_neox"])  # OPT never packs, BSBR or not
def test_packed_documents_are_as_if_alone(family, config, tiny, tokens, logits):
    converted, ids = convert(tiny(family), config), tokens(2, 80)
    lengths = [[30, 1, 49], [17, 40, 23]]
    place = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = logits(converted, ids, position_ids=place, use_cache=False)
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            span = slice(start, start + length)
            alone = logits(converted, ids[row : row + 1, span])[0]
            assert (packed[row, span] - alone).abs().max() <= 2e-5
            start += length
