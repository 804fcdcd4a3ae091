"""The settings of a synthetic task, refused in one line where no example of it can exist."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

BLANK, ASK, OPEN, LINK = range(4)
"""Token ids with a meaning of their own: nothing, a question, the start of a fact, the start of a fact by name."""

_MARKS = 4

KNOBS = ("pairs", "queries", "hops", "digits")
"""Numbers that some tasks have and others have not."""


class Examples(NamedTuple):
    """Examples of a task, for a model that predicts the next token."""

    tokens: np.ndarray
    """Token ids, [n, length + 1], int64: a model reads all but the last."""
    answer: np.ndarray
    """Number of the answer that the next token belongs to, [n, length], int64, from 1 in each example; 0 where the
    next token is not asked for. An answer is right when all of its tokens are."""
    distance: np.ndarray
    """Tokens from the place where an answer stood to the place where it is asked for, at the answer's first token,
    [n, length], int64; 0 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is generated: with a number of examples and a seed, every token of them.

    Raises:
        ValueError: a field is out of range, the task has no such knob, or no example of that length exists.

    Example:
        >>> TaskConfig(task="passkey", length=64).digits
        5
    """

    task: str
    """Name of a row of `bsbr.data.tasks.TASKS`."""
    length: int = 512
    """Tokens that the model reads."""
    vocab: int = 1024
    """Token ids: four marks, and thirds of the rest for keys, values and filler."""
    pairs: int | None = None
    """Facts in an example; None means the task's own number."""
    queries: int | None = None
    """Facts asked for; None means the task's own number."""
    hops: int | None = None
    """Names between a value and the question for it; None means the task's own number."""
    digits: int | None = None
    """Tokens of a value; None means the task's own number."""
    distance: tuple[int, int] | None = None
    """Least and most tokens from the fact's value to the question for it; None means wherever it falls."""
    straddle: int | None = None
    """A block size: the asked fact is cut by an edge of such blocks. None means wherever it falls."""

    def __post_init__(self) -> None:
        from bsbr.data.tasks import TASKS

        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}: not known. Choose one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        for name in KNOBS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, task.knobs.get(name))
            elif name not in task.knobs:
                own = ", ".join(task.knobs) or "none"
                raise ValueError(f"task {self.task} has no {name}: leave it out. Its own are: {own}")
        for name in ("length", "vocab", *task.knobs):
            _check_integer(name, getattr(self, name), 1)
        if self.words < 1:
            raise ValueError(f"vocab = {self.vocab}: too small, four marks and three kinds of words need at least 7")
        if self.distance is not None or self.straddle is not None:
            self._check_place(task.places)
        fault = task.impossible(self)
        if fault:
            raise ValueError(f"task {self.task} at length {self.length}: {fault}")

    def _check_place(self, places: bool) -> None:
        if not places:
            raise ValueError(f"task {self.task} has no single fact to place: leave distance and straddle out")
        if self.straddle is not None:
            _check_integer("straddle", self.straddle, 1)
        if self.distance is not None:
            object.__setattr__(self, "distance", tuple(self.distance))
            low, high = self.distance
            if not 1 <= low <= high:
                raise ValueError(f"distance = {self.distance}: must be two numbers, 1 <= least <= most")

    @property
    def words(self) -> int:
        """Words of each kind: keys, values, filler."""
        return (self.vocab - _MARKS) // 3

    @property
    def keys(self) -> int:
        """Id of the first key."""
        return _MARKS

    @property
    def values(self) -> int:
        """Id of the first value."""
        return _MARKS + self.words

    @property
    def filler(self) -> int:
        """Id of the first word of filler."""
        return _MARKS + 2 * self.words

    def knob(self, name: str) -> int:
        """Return a number that this task has.

        Args:
            name: one of `KNOBS`.
        Returns:
            The number, the task's own where none was given.
        """
        value = getattr(self, name)
        assert isinstance(value, int), name
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskConfig":
        """Make a config from what `to_dict` gave, or JSON made of it.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown task setting {unknown[0]!r}: expected some of {', '.join(sorted(known))}")
        given = dict(values)
        if given.get("distance") is not None:
            given["distance"] = tuple(given["distance"])
        return cls(**given)


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value!r}: must be an integer of at least {least}")
