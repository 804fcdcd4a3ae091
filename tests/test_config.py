"""A config is checked when it is made, and survives JSON."""

import json

import pytest

from bsbr.config import BSBRConfig


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"block_size": 2.5}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"block_size": "128"}, "block_size"),
        ({"retrieval_block_size": 48}, "divide block_size 128"),
        ({"retrieval_block_size": -1}, "retrieval_block_size"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k_per_head": ()}, "one for each key head, got"),
        ({"top_k_per_head": 3}, "one for each key head, got 3"),
        ({"top_k_per_head": (1, 2.5)}, "each number of top_k_per_head must be an integer >= 0, got 2.5"),
        ({"top_k_per_head": ((1, -1), None)}, "each number of top_k_per_head must be an integer >= 0, got -1"),
        ({"top_k_per_head": (((1,),),)}, "deeper tuples"),
        ({"far": "nearby"}, "moments, mean, drop"),
        ({"state": "all"}, "global, block, token, none"),
        ({"selection": "token"}, "head, group, recent"),
        ({"dense_below": -5}, "dense_below"),
        ({"far": "drop", "state": "global"}, 'state="none"'),
    ],
)
def test_a_bad_value_says_what_was_wanted(values, match):
    with pytest.raises(ValueError, match=match):
        BSBRConfig(**values)


def test_defaults_follow_each_other():
    assert BSBRConfig(block_size=64).unit == 64
    assert BSBRConfig().state == "global"
    assert BSBRConfig(far="drop").state == "none"


def test_a_layer_reads_its_own_numbers_of_blocks():
    config = BSBRConfig(top_k=2, top_k_per_head=((1, 3), None))
    assert [config.of_layer(layer).top_k_per_head for layer in (0, 1)] == [(1, 3), None]
    assert [config.of_layer(layer).max_top_k for layer in (0, 1)] == [3, 2]
    assert config.max_top_k == 3
    with pytest.raises(ValueError, match="for 2 layers, layer 2 has none"):
        config.of_layer(2)
    every = BSBRConfig(top_k_per_head=(1, 3))
    assert every.of_layer(7) is every


def test_a_config_survives_json_and_refuses_unknown_keys():
    config = BSBRConfig(block_size=64, retrieval_block_size=16, top_k=4, far="mean", top_k_per_head=((1, 2), None))
    assert BSBRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="'blok_size'"):
        BSBRConfig.from_dict({"blok_size": 64})
