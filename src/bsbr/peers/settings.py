"""What all peers share: how their settings are kept, and the sizes of the attention they stand in."""

from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, Self


class Shape(NamedTuple):
    """The sizes of one attention module."""

    hidden_size: int
    """Width of the hidden states."""
    heads: int
    """Query heads."""
    key_heads: int
    """Key and value heads; divides `heads`."""
    width: int
    """Width of a head."""


class PeerConfig:
    """Base of the settings of a peer, which are frozen dataclasses: they survive JSON and refuse unknown keys.

    Example:
        >>> from bsbr.peers import WindowConfig
        >>> WindowConfig.from_dict(WindowConfig(window=64).to_dict())
        WindowConfig(window=64)
    """

    mixer: ClassVar[str]
    """Name of the peer."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a config from a dict, refusing keys it does not know.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {name for name in cls.__dataclass_fields__ if name != "mixer"}  # type: ignore[attr-defined]
        unknown = sorted(set(values) - known)
        if unknown and not known:
            raise ValueError(f"the {cls.mixer} mixer has no settings, got {unknown[0]!r}")
        if unknown:
            raise ValueError(f"unknown {cls.mixer} setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        return cls(**values)

    def _require(self, **least: int) -> None:
        """Refuse fields that are no integers of at least so much."""
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be an integer >= {bound}, got {value!r}")
