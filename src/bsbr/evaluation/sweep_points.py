"""What a sweep measures: which methods, at which token budgets, in which units of retrieval."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from bsbr.config import BSBRConfig
from bsbr.evaluation.fidelity import position_buckets
from bsbr.evaluation.speed import SpeedSettings

METHODS = ("converted", "uncalibrated", "moba", "window", "oracle", "random")
"""What is measured at every point, in the order of the tables."""

TIMED = ("converted", "uncalibrated", "moba", "window")
"""Methods that are timed; oracle and random choice are controls. Calibration costs no work, but heads that it lets read
different numbers of blocks are not one call on every backend."""


class Point(NamedTuple):
    """How many tokens a query retrieves, and in which units."""

    unit: int
    """Tokens of a retrieval block."""
    top_k: int
    """Retrieval blocks a query reads."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a sweep; everything here is written into the result file.

    Raises:
        ValueError: a field is out of range, or a budget and a unit do not fit together.

    Example:
        >>> SweepConfig(budgets=(64, 128), units=(32, 64)).points
        (Point(unit=32, top_k=2), Point(unit=64, top_k=1), Point(unit=32, top_k=4), Point(unit=64, top_k=2))
    """

    attention: BSBRConfig = field(default_factory=lambda: BSBRConfig(dense_below=0))
    """Block size, far field, state and selection of every point."""

    budgets: tuple[int, ...] = (128, 256, 512)
    """Tokens of past blocks that a query reads exactly, beside its own block."""

    units: tuple[int, ...] = (128,)
    """Retrieval block sizes."""

    lengths: tuple[int, ...] = (2048,)
    """Tokens of the windows."""

    windows: int = 1
    """Windows taken of each document."""

    documents: int = 6
    """Documents of each text; those shorter than a window are passed over."""

    after: int | None = None
    """First position of the main figures; None means a quarter of the window."""

    batch_tokens: int = 8192
    """Tokens that go through a model at once, in whole windows of one document."""

    speed: SpeedSettings = field(default_factory=lambda: SpeedSettings(rounds=3, budget_s=60.0, least_rounds=2))
    """How methods are timed."""

    seed: int = 0
    """Of the random choice and of resampling."""

    device: str = "cpu"
    """Where the models are."""

    time_device: str | None = None
    """Where they are timed; None means where they are, "none" nowhere."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("documents", 1), ("batch_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.attention.far == "drop":
            raise ValueError('a sweep compares with far="drop" itself (MoBA): use far="moments" or "mean"')
        for unit in self.units:
            for budget in self.budgets:
                if budget < 1 or budget % unit:
                    raise ValueError(f"a budget of {budget} tokens is no multiple of the retrieval block of {unit}")
            self.settings("converted", Point(unit, 1))  # refuses a unit that does not divide the block
        for length in self.lengths:
            least = self.attention.block_size + max(self.budgets)
            if length <= least:
                raise ValueError(f"a window of {length} tokens is read exactly: more than {least} are needed")
            if self.after is not None and not 0 <= self.after < length - 1:
                raise ValueError(f"after must lie within the window of {length}, got {self.after}")

    @property
    def points(self) -> tuple[Point, ...]:
        """Every budget in every unit."""
        return tuple(Point(unit, budget // unit) for budget in self.budgets for unit in self.units)

    def settings(self, method: str, point: Point) -> BSBRConfig:
        """Return the attention of a method at a point, apart from calibration and choice of blocks."""
        drops = method in ("moba", "window")
        return BSBRConfig(
            block_size=self.attention.block_size,
            retrieval_block_size=point.unit,
            top_k=point.top_k,
            far="drop" if drops else self.attention.far,
            state="none" if drops else self.attention.state,
            selection=self.attention.selection,
            dense_below=0,
        )

    def buckets(self, length: int) -> dict[str, tuple[int, int]]:
        """Return the ranges of positions of a window, the main one first."""
        after = length // 4 if self.after is None else self.after
        return position_buckets(length, first=self.attention.block_size, after=after)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them."""
        return asdict(self) | {"attention": self.attention.to_dict()}


def keys_read(config: BSBRConfig, low: int, high: int) -> float:
    """Share of the keys up to each query's own position that are read exactly, over a range of positions.

    Args:
        config: the settings; `dense_below` is not looked at.
        low, high: first position, and one past the last.
    Returns:
        Keys read over keys there, between 0 and 1; entries for blocks that are not read do not count as keys.

    Example:
        >>> keys_read(BSBRConfig(block_size=4, top_k=1), 8, 12)
        0.6190476190476191
    """
    size, most = config.block_size, config.top_k * config.unit
    read = sum(min(t // size * size, most) + t % size + 1 for t in range(low, high))
    return read / sum(t + 1 for t in range(low, high))
