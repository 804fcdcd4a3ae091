"""Costs are those of attentions worked by hand, and of what is really kept."""

import re
from pathlib import Path

import pytest
import torch

from bsbr import BSBRConfig
from bsbr.ops.block_cache import BlockCache
from bsbr.peers import PEERS, AdditiveConfig, Shape, cost, make

SHAPE = Shape(hidden_size=64, heads=8, key_heads=2, width=16)
PAIR = 4 * 8 * 16
"""Operations of one key for all heads: a score and a sum, of 16 products each."""


def test_softmax_attentions_by_hand():
    full, window = cost(make("full"), SHAPE, 100), cost(make("window", {"window": 10}), SHAPE, 100)
    assert full.state_bytes == 2 * 2 * 16 * 100 * 2
    assert full.flops_per_token == PAIR * 50.5
    assert window.state_bytes == 2 * 2 * 16 * 10 * 2
    assert window.flops_per_token == pytest.approx(PAIR * (sum(range(1, 10)) + 91 * 10) / 100)
    assert cost(make("window", {"window": 100}), SHAPE, 100) == full
    assert cost(make("full"), SHAPE, 100, bytes_per_number=4).state_bytes == 2 * full.state_bytes
    local = cost(make("local", {"block_size": 20}), SHAPE, 100)
    assert local.flops_per_token == PAIR * 10.5
    assert local.state_bytes == 2 * 2 * 16 * 20 * 2
    assert cost(make("value_only"), SHAPE, 100) == (0, 0, 0)


def test_blocks_by_hand():
    """4 tokens in blocks of 2, one block read: keys 1, 2, 3, 4 in all, and one past block at the last two tokens."""
    moba = cost(make("moba", {"block_size": 2, "top_k": 1}), SHAPE, 4)
    assert moba.flops_per_token == PAIR * 2.5 + 2 * 8 * 16 * 0.5
    bsbr = cost(make("bsbr", {"block_size": 2, "top_k": 1}), SHAPE, 4)
    summaries, states = 2 * 8 * 3 * 16 * 0.5, 2 * 16**2 * (8 + 2)
    assert bsbr.flops_per_token == PAIR * 2.5 + summaries + states
    nsa = cost(make("nsa", {"block_size": 2, "top_k": 1, "window": 2}), SHAPE, 4)
    pooled, gates = 4 * 2 * 16, 2 * 3 * 8 * 64
    assert nsa.flops_per_token == PAIR * (2.5 + (1 + 2 + 2 + 2) / 4 + 0.5) + pooled + gates
    assert nsa.state_bytes == 2 * 2 * 16 * (4 + 2) * 2
    dense = cost(BSBRConfig(block_size=2, top_k=1, dense_below=4), SHAPE, 4)
    assert dense.flops_per_token == pytest.approx(PAIR * 2.5 + 2 * 16**2 * 2), "keys, and states for later"


def test_states_of_constant_size():
    for name, numbers in (("linear", 2 * 16 * 17), ("gated_delta", 2 * 16 * 16)):
        short, long = (cost(make(name), SHAPE, tokens) for tokens in (1000, 100_000))
        assert short == long
        recent = 3 * (8 + 2 * 2) * 16 * 2 if name == "gated_delta" else 0
        assert short.state_bytes == 4 * numbers + recent
    linear = cost(make("linear"), SHAPE, 1000)
    assert linear.flops_per_token == 2 * 16 * 17 * (8 + 2), "each query head reads, each key head writes"


@pytest.mark.parametrize("far", ["moments", "mean", "drop"])
def test_bsbr_keeps_what_its_cache_keeps(far):
    """Of whole blocks: the cache has room for one more of each sum of states, and keeps its last blocks apart."""
    config = BSBRConfig(block_size=8, retrieval_block_size=4, top_k=2, far=far, dense_below=0)
    cache = BlockCache(config)
    k = torch.randn(1, 64, 2, 16)
    cache.attend(torch.randn(1, 64, 8, 16), k, k, scale=0.25)
    kept = {name: x.nbytes for name, x in cache._summaries._tensors.items()}
    expected = sum(x for name, x in kept.items() if name != "states") + kept.get("states", 0) // 2 + 2 * k.nbytes
    assert cost(config, SHAPE, 64, bytes_per_number=4).state_bytes == expected


def test_states_of_blocks_cost_more_than_one():
    costs = [
        cost(BSBRConfig(block_size=8, top_k=0, dense_below=0, state=state), SHAPE, 512).flops_per_token
        for state in ("none", "global", "block", "token")
    ]
    assert costs == sorted(set(costs))


def test_the_additive_form_by_hand():
    """Two blocks of 2: R and H are made of every second token, and one state is read by the last two."""
    found = cost(AdditiveConfig(block_size=2), SHAPE, 4)
    state, meta = 2 * 16**2 * (8 + 2), 4 * 64 * 8 * 16 / 2
    scores_and_mixing = 2 * 8 * (16 + 16**2) * 0.5 / 2
    assert found.flops_per_token == PAIR * 1.5 + state + meta + scores_and_mixing
    assert found.parameters == 2 * (8 * 16 * 64 + 8 * 16)
    packed = cost(AdditiveConfig(block_size=2, compression=4), SHAPE, 4)
    assert packed.parameters == found.parameters + 2 * 16 * 256 + 16 + 256
    assert packed.state_bytes < found.state_bytes


def test_others_are_refused():
    with pytest.raises(ValueError, match="no cost is known of dict"):
        cost({}, SHAPE, 4)


def test_the_table_of_the_documentation_is_what_the_function_says():
    page = Path(__file__).parents[2] / "docs" / "peers.md"
    number = r" \| ([\d.,]+)"
    rows = re.findall(rf"^\| `(\w+)`(.*?){5 * number} \|$", page.read_text(), re.MULTILINE)
    words = {"block_size": r"blocks of (\d+)", "top_k": r"`top_k` (\d+)", "window": r"(?:of|window of) (\d+)$"}
    assert len(rows) == len(PEERS)
    for name, text, *shown in rows:
        found = {key: re.search(word, text) for key, word in words.items()}
        known = PEERS[name].config.__dataclass_fields__.keys() - PEERS[name].fixed
        settings = {key: int(match[1]) for key, match in found.items() if match and key in known}
        short, long = (cost(make(name, settings), Shape(512, 8, 4, 64), tokens) for tokens in (4096, 32768))
        numbers = [f"{round(x.state_bytes / 1024):,}" for x in (short, long)]
        numbers += [f"{x.flops_per_token / 1e6:.2f}" for x in (short, long)]
        assert shown == [*numbers, f"{short.parameters:,}"], name
