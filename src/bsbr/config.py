"""The settings of the attention, checked when they are made."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

Far = Literal["moments", "mean", "drop"]
State = Literal["global", "block", "token", "none"]
Selection = Literal["head", "group", "recent"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "far": ("moments", "mean", "drop"),
    "state": ("global", "block", "token", "none"),
    "selection": ("head", "group", "recent"),
}


@dataclass(frozen=True, kw_only=True)
class BSBRConfig:
    """Block sparse attention with block retrieval: what is read exactly, what by summary.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.

    Example:
        >>> BSBRConfig(block_size=128, top_k=2).retrieval_block_size
        128
    """

    mixer: ClassVar[str] = "bsbr"

    block_size: int = 128
    """Tokens of the local field's block: attention inside it is exact and causal."""

    retrieval_block_size: int | None = None
    """Tokens of one unit of retrieval and summary; divides `block_size`. None means equal to it."""

    top_k: int = 8
    """Past retrieval blocks each query reads exactly; 0 reads summaries only."""

    top_k_per_head: tuple[Any, ...] | None = None
    """The same number for each key head on its own, as calibration spreads them: integers, or for a whole model one
    tuple of them for each layer. None, also in place of a layer's, means `top_k` for each head."""

    far: Far = "moments"
    """What stands for the past blocks not read: mean and variance of keys, the mean alone, or nothing."""

    state: State | None = None
    """Which first-order state corrects the far field. None means "global" for moments, else "none"."""

    selection: Selection = "head"
    """Each query head chooses its own blocks, the heads that share a key head choose together, or every query reads the
    latest `top_k` past blocks: a window, beside which a cache needs no older keys and values."""

    dense_below: int = 4096
    """Queries at positions below this use exact attention over their whole past; 0 switches it off. The default is
    where two CPU cores at GPT-2's shape and `top_k` 4 to 8 surely gain (docs/log.md)."""

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("top_k", 0), ("dense_below", 0)):
            _check_integer(name, getattr(self, name), least)
        if self.top_k_per_head is not None:
            object.__setattr__(self, "top_k_per_head", _as_counts(self.top_k_per_head))
        if self.retrieval_block_size is None:
            object.__setattr__(self, "retrieval_block_size", self.block_size)
        _check_integer("retrieval_block_size", self.retrieval_block_size, 1)
        if self.block_size % self.unit:
            raise ValueError(
                f"retrieval_block_size must divide block_size {self.block_size}, got {self.unit}: "
                "try block_size / 2 or block_size / 4"
            )
        if self.state is None:
            object.__setattr__(self, "state", "global" if self.far == "moments" else "none")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.far == "drop" and self.state != "none":
            raise ValueError(f'far="drop" leaves no far field for state={self.state!r} to correct: use state="none"')

    @property
    def max_top_k(self) -> int:
        """Past retrieval blocks that a query of any head reads at most, as an int."""
        rows = [self.top_k if row is None else row for row in self.top_k_per_head or (None,)]
        return max(max(row) if isinstance(row, tuple) else row for row in rows)

    def of_layer(self, layer: int) -> "BSBRConfig":
        """Return a model's settings as they are in one of its layers.

        Args:
            layer: number of the layer.
        Returns:
            The settings, with that layer's numbers in `top_k_per_head`.
        Raises:
            ValueError: there are numbers for fewer layers.

        Example:
            >>> BSBRConfig(top_k=2, top_k_per_head=((1, 3), None)).of_layer(0).top_k_per_head
            (1, 3)
        """
        rows = self.top_k_per_head
        if rows is None or not any(isinstance(row, tuple) for row in rows):
            return self
        if layer >= len(rows):
            raise ValueError(f"top_k_per_head has numbers for {len(rows)} layers, layer {layer} has none")
        return replace(self, top_k_per_head=rows[layer])

    @property
    def unit(self) -> int:
        """Tokens of one retrieval block, as an int."""
        return self.retrieval_block_size or self.block_size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold.

        Returns:
            A dict of the fields, with defaults resolved.

        Example:
            >>> BSBRConfig.from_dict(BSBRConfig(top_k=2).to_dict()).top_k
            2
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BSBRConfig":
        """Make a config from a dict, refusing keys it does not know.

        Args:
            values: field names and values, as from `to_dict`.
        Returns:
            The checked config.
        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {name for name in cls.__dataclass_fields__ if name != "mixer"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown BSBR setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        return cls(**values)


def _as_counts(values: Any) -> tuple[Any, ...]:
    """Tuples of integers, or of such tuples and None, from what JSON has as lists."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"top_k_per_head must be integers, one for each key head, got {values!r}")
    if any(isinstance(row, list | tuple) for row in values):
        if any(isinstance(row, list | tuple) and any(isinstance(x, list | tuple) for x in row) for row in values):
            raise ValueError(
                "top_k_per_head must be integers, or for each layer a tuple of integers, got deeper tuples"
            )
        return tuple(None if row is None else _as_counts(row) for row in values)
    for count in values:
        _check_integer("each number of top_k_per_head", count, 0)
    return tuple(values)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
