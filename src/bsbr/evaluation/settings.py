"""What an evaluation measures, checked when it is made."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bsbr.evaluation.speed import SpeedSettings

SPEED_ONLY = ("converted_sparse", "value_only")
SPEED_FIRST = ("converted", "converted_sparse", "additive", "value_only")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Settings of a run; everything here is written into the result files.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> SuiteConfig(window=1024).resolved_stride
        512
    """

    window: int = 2048
    """Tokens that go through the models at once in the quality part."""

    stride: int | None = None
    """Tokens between window starts in long documents; None means half a window."""

    documents: int = 20
    """Documents taken of each text."""

    document_tokens: int | None = None
    """Tokens taken of each document; None means one window."""

    bos: bool = False
    """Put a BOS token before each document."""

    context: int | None = 256
    """Short context that the gain from long context is measured against; None leaves it out."""

    similarity_documents: int = 20
    """Documents of the first text whose hidden states are compared."""

    random_samples: int = 4
    """Windows of random tokens whose hidden states are compared."""

    noise_documents: int = 2
    """Documents on which the original is compared with itself in another batch and in bfloat16."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Sequence lengths timed; empty leaves the speed part out."""

    fixed_tokens: int = 2048
    """Tokens per batch of the published speed protocol; 0 leaves it out."""

    speed: SpeedSettings = field(default_factory=SpeedSettings)
    """How contenders are timed."""

    measure_memory: bool = True
    """Measure peak memory beside time."""

    quality_variants: tuple[str, ...] | None = None
    """Variants in the quality part; None: all but those made for speed alone; empty leaves the part out."""

    speed_variants: tuple[str, ...] | None = None
    """Variants timed against the original; None means the usual ones that are there."""

    exposed_from: int | None = None
    """First position said to be exposed to the approximation; None reads it from the converted model."""

    trained_positions: int | None = None
    """Positions the original was trained on, where its positions were extended: lengths beyond are marked."""

    seed: int = 0
    """Of random tokens and resampling."""

    device: str = "cpu"
    """Where the models are."""

    def __post_init__(self) -> None:
        for name, least in (
            ("window", 2),
            ("documents", 1),
            ("similarity_documents", 0),
            ("random_samples", 0),
            ("noise_documents", 0),
            ("fixed_tokens", 0),
            ("seed", 0),
        ):
            _check(name, getattr(self, name), least)
        for name, least in (
            ("stride", 1),
            ("document_tokens", 2),
            ("context", 1),
            ("exposed_from", 0),
            ("trained_positions", 1),
        ):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), least)
        for length in self.lengths:
            _check("lengths", length, 1)
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must differ from each other, got {self.lengths}")
        if self.resolved_stride >= self.window:
            raise ValueError(
                f"stride must be below window {self.window}, got {self.stride}: "
                "at an equal stride the first token of a window would have no context"
            )

    @property
    def resolved_stride(self) -> int:
        """Tokens between window starts."""
        return self.stride or max(1, self.window // 2)

    @property
    def resolved_document_tokens(self) -> int:
        """Tokens taken of each document."""
        return self.document_tokens or self.window

    def to_dict(self) -> dict[str, Any]:
        """Return the settings with every default spelt out, as JSON can hold them.

        Returns:
            A dict of the fields.
        """
        return asdict(self) | {
            "stride": self.resolved_stride,
            "document_tokens": self.resolved_document_tokens,
            "lengths": list(self.lengths),
        }


def _check(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
