"""The attentions BSBR is compared with are what their names say, and causal."""

import pytest
import torch

from bsbr.peers import (
    AdditiveConfig,
    ValueOnlyConfig,
    additive_attention,
    full_attention,
    gated_delta_attention,
    linear_attention,
    local_attention,
    moba_attention,
    value_only_attention,
    window_attention,
)
from tests.peers.cases import draw, plain


def additive(q, k, v, **options):
    """With retrievers and hashes made of the queries and keys at block ends, as a model makes them of hidden states."""
    past = (k.shape[1] - 1) // 8
    last = slice(7, past * 8, 8)
    repeated = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return additive_attention(q, k, v, q[:, last], repeated[:, last], block_size=8, **options)


PEERS = {
    "full": full_attention,
    "local": lambda q, k, v: local_attention(q, k, v, block_size=8),
    "moba": lambda q, k, v: moba_attention(q, k, v, block_size=8, top_k=1),
    "value_only": lambda q, k, v: value_only_attention(q, v),
    "additive": additive,
    "window": lambda q, k, v: window_attention(q, k, v, window=5),
    "linear": linear_attention,
    "gated_delta": lambda q, k, v: gated_delta_attention(q, k / 4, v, -k[..., 0].abs(), v[..., 0].sigmoid()),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 37, 66])
def test_peers_are_causal_to_the_bit(peer, tokens):
    q, k, v = draw(tokens)
    before = PEERS[peer](q, k, v)
    assert before.shape == q.shape
    for position in range(tokens):
        for index in range(3):
            inputs = [q.clone(), k.clone(), v.clone()]
            inputs[index][:, position] += 1
            moved = (PEERS[peer](*inputs) != before).flatten(2).any(-1).any(0)
            assert not moved[:position].any()
        assert moved[position]


def test_full_local_and_moba_are_softmax_attention_where_they_read():
    q, k, v = draw(37)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    block = torch.arange(37) // 8
    own = block == block[:, None]
    assert torch.allclose(full_attention(q, k, v), plain(q, k, v, causal), atol=1e-6)
    assert torch.allclose(full_attention(q[:, 30:], k, v, q_start=30), plain(q, k, v, causal)[:, 30:], atol=1e-6)
    assert torch.allclose(local_attention(q, k, v, block_size=8), plain(q, k, v, causal & own), atol=1e-6)
    assert torch.allclose(moba_attention(q, k, v, block_size=8, top_k=9), plain(q, k, v, causal), atol=1e-6)
    one = moba_attention(q, k, v, block_size=8, top_k=1)
    assert torch.allclose(one[:, :16], plain(q, k, v, causal)[:, :16], atol=1e-6)
    assert not torch.allclose(one[:, 24:], plain(q, k, v, causal)[:, 24:], atol=1e-3)
    means = k[:, :32].unflatten(1, (4, 8)).mean(2).repeat_interleave(2, 2)
    scores = torch.einsum("bthd,bnhd->bhtn", q, means).masked_fill(block[:, None] <= torch.arange(4), -torch.inf)
    best = scores.argmax(-1)[..., None] == block  # [rows, heads, 37, 37]
    assert torch.allclose(one, plain(q, k, v, causal & (own | best)), atol=1e-6)


def test_value_only_repeats_its_own_value():
    q, _, v = draw(5)
    assert torch.equal(value_only_attention(q, v), v[:, :, [0, 0, 1, 1]])


def test_additive_is_its_formula():
    """softmax(Q K^T M_in) V + Q (softmax(R H^T M_out) F), written out token by token."""
    q, k, v = (x.double() for x in draw(29))
    meta = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = additive_attention(q, k, v, *meta, block_size=8)
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    for token in range(29):
        own = token // 8
        read = slice(own * 8, token + 1)
        weights = torch.einsum("bhd,bthd->bht", q[:, token], k[:, read]).mul(6**-0.5).softmax(-1)
        expected = torch.einsum("bht,bthd->bhd", weights, v[:, read])
        if own:
            share = torch.einsum("bhd,bnhd->bhn", meta[0, :, own - 1], meta[1, :, :own]).mul(6**-0.5).softmax(-1)
            states = torch.stack(
                [torch.einsum("bthd,bthe->bhde", k[:, b * 8 : b * 8 + 8], v[:, b * 8 : b * 8 + 8]) for b in range(own)]
            )
            expected = expected + torch.einsum("bhd,bhn,nbhde->bhe", q[:, token], share, states)
        assert torch.allclose(actual[:, token], expected)


def test_additive_compression_that_loses_nothing_changes_nothing():
    q, k, v = draw(29)
    turn = torch.linalg.qr(torch.randn(36, 36, generator=torch.Generator().manual_seed(1)))[0]
    packed = additive(q, k, v, compress=(turn, torch.zeros(36)), decompress=(turn.T, torch.zeros(36)))
    assert torch.allclose(packed, additive(q, k, v), atol=1e-3)


def test_additive_refuses_what_does_not_fit():
    q, k, v = draw(17)
    with pytest.raises(ValueError, match="17 tokens in blocks of 8 need 2 retrievers and hashes, got 3 and 3"):
        additive_attention(q, k, v, q[:, :3], q[:, :3], block_size=8)
    for bad in ({"block_size": 0}, {"compression": 0}, {"seed": -1}, {"block_size": True}):
        with pytest.raises(ValueError, match="must be an integer"):
            AdditiveConfig(**bad)
    with pytest.raises(ValueError, match="unknown additive setting 'top_k'"):
        AdditiveConfig.from_dict({"top_k": 1})
    with pytest.raises(ValueError, match="has no settings"):
        ValueOnlyConfig.from_dict({"top_k": 1})
    config = AdditiveConfig(block_size=4, compression=2, seed=9)
    assert AdditiveConfig.from_dict(config.to_dict()) == config
