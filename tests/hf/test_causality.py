"""No output knows what comes later: one token is changed, and all earlier outputs stay bit-identical."""

import pytest
import torch

from bsbr import BSBRConfig, convert
from bsbr.peers import AdditiveConfig

CONFIGS = [
    pytest.param(BSBRConfig(dense_below=0, block_size=8, top_k=1), 47, id="default"),
    pytest.param(
        BSBRConfig(dense_below=0, block_size=8, retrieval_block_size=4, top_k=3, far="mean", selection="group"),
        41,
        id="units",
    ),
    pytest.param(BSBRConfig(block_size=8, top_k=1, far="drop", dense_below=20), 37, id="drop"),
    pytest.param(BSBRConfig(dense_below=0, block_size=8, top_k=0, state="block"), 47, id="states"),
    pytest.param(BSBRConfig(dense_below=0, block_size=16, top_k=1, state="token"), 51, id="token"),
    pytest.param(AdditiveConfig(block_size=8, compression=4), 47, id="additive"),
]
LONG = [
    pytest.param(BSBRConfig(dense_below=0, block_size=32, top_k=2), id="default"),
    pytest.param(BSBRConfig(dense_below=0, block_size=32, retrieval_block_size=8, top_k=5), id="units"),
    pytest.param(BSBRConfig(dense_below=0, block_size=32, top_k=0), id="states"),
    pytest.param(BSBRConfig(dense_below=45, block_size=32, top_k=1, far="drop", selection="group"), id="drop"),
    pytest.param(AdditiveConfig(block_size=32), id="additive"),
]


@pytest.mark.parametrize(("config", "length"), CONFIGS)
def test_no_token_moves_an_earlier_output(family, config, length, tiny, tokens, logits):
    """Row t of a batch has token t changed; every row is compared with the same row of an unchanged batch."""
    converted, ids = convert(tiny(family), config), tokens(1, length).repeat(length, 1)
    changed = ids - torch.eye(length, dtype=torch.long)
    moved = (logits(converted, changed) != logits(converted, ids)).any(-1)  # [changed token, output]
    later = torch.ones(length, length, dtype=torch.bool).triu()
    assert not moved[~later].any(), f"(token, earlier output) {(moved & ~later).nonzero().tolist()}"
    assert moved.diagonal().all()
    assert moved[later].float().mean() > 0.9, "later outputs depend on the token"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("config", LONG)
def test_every_pair_of_300_tokens(family, config, tiny, tokens, logits):
    """The same over ten blocks, ten changed tokens at a time."""
    converted, ids = convert(tiny(family), config), tokens(1, 300)
    before = logits(converted, ids.repeat(10, 1))
    for first in range(0, 300, 10):
        changed = ids.repeat(10, 1)
        changed[torch.arange(10), torch.arange(first, first + 10)] -= 1
        moved = (logits(converted, changed) != before).any(-1)
        for row, token in enumerate(range(first, first + 10)):
            assert not moved[row, :token].any(), f"token {token} changed an earlier output"
            assert moved[row, token]
