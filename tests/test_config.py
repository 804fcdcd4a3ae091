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
        ({"far": "nearby"}, "moments, mean, drop"),
        ({"state": "all"}, "global, block, token, none"),
        ({"selection": "token"}, "head, group"),
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


def test_a_config_survives_json_and_refuses_unknown_keys():
    config = BSBRConfig(block_size=64, retrieval_block_size=16, top_k=4, far="mean")
    assert BSBRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="'blok_size'"):
        BSBRConfig.from_dict({"blok_size": 64})
