"""Every attention that can be trained, by the name that the command line knows it by."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.peers.additive import AdditiveConfig
from bsbr.peers.full import FullConfig
from bsbr.peers.gated_delta import GatedDeltaConfig
from bsbr.peers.linear import LinearConfig
from bsbr.peers.nsa import NSAConfig
from bsbr.peers.settings import PeerConfig
from bsbr.peers.value_only import ValueOnlyConfig
from bsbr.peers.window import WindowConfig


class Named(NamedTuple):
    """One row of `PEERS`."""

    config: type[BSBRConfig] | type[PeerConfig]
    """Class of the settings."""
    fixed: dict[str, Any]
    """Settings that make it what its name says; they cannot be given."""
    words: str
    """What it is."""
    start: dict[str, Any] = {}  # noqa: RUF012
    """Settings that training starts from where they differ from the class's own."""


_SPARSE = {"dense_below": 0}
"""A model that is trained has no reason to read short texts exactly."""

PEERS: dict[str, Named] = {
    "bsbr": Named(BSBRConfig, {}, "own block, retrieved blocks and a summary of all others under one softmax", _SPARSE),
    "full": Named(FullConfig, {}, "softmax attention over the whole past"),
    "window": Named(WindowConfig, {}, "softmax attention over the latest keys"),
    "local": Named(BSBRConfig, _SPARSE | {"top_k": 0, "far": "drop"}, "softmax attention inside the own block"),
    "moba": Named(BSBRConfig, {"far": "drop"}, "own block and the blocks of best mean key, nothing else", _SPARSE),
    "nsa": Named(NSAConfig, {}, "compressed blocks, selected blocks and a window, with learned gates"),
    "linear": Named(LinearConfig, {}, "one running sum of keys and values, read through elu(x) + 1"),
    "gated_delta": Named(GatedDeltaConfig, {}, "Gated DeltaNet: a state with learned decay and the delta rule"),
    "additive": Named(AdditiveConfig, {}, "the original additive BSBR with learned retrieval, causality repaired"),
    "value_only": Named(ValueOnlyConfig, {}, "no mixing of tokens: the floor"),
}
"""The attentions by name."""


def make(name: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0) -> BSBRConfig | PeerConfig:
    """Make the settings of an attention from its name, as `bsbr.convert` and `bsbr.hf.build_model` take them.

    BSBR and MoBA start from `dense_below=0`, other than a conversion: a model that is trained learns the sparse
    attention at every position.

    Args:
        name: one of `PEERS`.
        settings: fields of its config; those left out have their defaults.
        seed: of random projections, where it has any and `settings` names none.
    Returns:
        The config.
    Raises:
        UserError: no such name, or settings it does not accept.

    Example:
        >>> make("moba", {"block_size": 64, "top_k": 4}).far
        'drop'
        >>> make("gated_delta", seed=3)
        GatedDeltaConfig(seed=3)
    """
    if name not in PEERS:
        raise UserError(f"attention {name!r} is not known: expected one of {', '.join(PEERS)}")
    row, given = PEERS[name], dict(settings or {})
    for setting in given:
        if setting in row.fixed:
            raise UserError(f"attention {name}: {setting} is {row.fixed[setting]!r} by definition. Leave it out")
    if hasattr(row.config, "seed"):
        given = {"seed": seed} | given
    try:
        return row.config.from_dict(row.start | given | row.fixed)
    except ValueError as error:
        raise UserError(f"attention {name}: {error}") from error
