"""Memory that was never written holds NaN: what reads it shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fill whatever PyTorch hands out uninitialised with NaN, or with the largest integer, while this lasts."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
