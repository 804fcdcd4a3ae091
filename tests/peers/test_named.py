"""Attentions by name: each name gives what it says, and refuses what it cannot be."""

import pytest

from bsbr import BSBRConfig
from bsbr.errors import UserError
from bsbr.peers import PEERS, NSAConfig, make


@pytest.mark.parametrize("name", PEERS)
def test_every_name_gives_settings_that_survive_json(name):
    settings = make(name)
    assert type(settings).from_dict(settings.to_dict()) == settings
    assert settings.mixer == ("bsbr" if name in ("local", "moba") else name)


def test_names_are_what_they_say():
    assert make("local", {"block_size": 64}) == BSBRConfig(block_size=64, top_k=0, far="drop", dense_below=0)
    assert make("moba", {"top_k": 3}) == BSBRConfig(top_k=3, far="drop", dense_below=0)
    assert make("bsbr").dense_below == 0, "a model that is trained is sparse from the start"
    assert make("bsbr", {"dense_below": 9}).dense_below == 9


def test_the_seed_goes_where_there_is_one():
    assert make("nsa", {"top_k": 3}, seed=7) == NSAConfig(top_k=3, seed=7)
    assert make("nsa", {"seed": 5}, seed=7).seed == 5
    assert make("window", seed=7).to_dict() == {"window": 512}


def test_what_it_refuses():
    with pytest.raises(UserError, match="attention 'mamba' is not known: expected one of bsbr, full, window"):
        make("mamba")
    with pytest.raises(UserError, match="attention local: top_k is 0 by definition"):
        make("local", {"top_k": 3})
    with pytest.raises(UserError, match="attention window: unknown window setting 'size'"):
        make("window", {"size": 3})
    with pytest.raises(UserError, match="attention linear: the linear mixer has no settings, got 'size'"):
        make("linear", {"size": 3})
    with pytest.raises(UserError, match="attention nsa: top_k must be an integer >= 1"):
        make("nsa", {"top_k": 0})
