"""Curves for TensorBoard, where it is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsbr.errors import UserError


class Board:
    """Writes scalars by step; a run that is resumed goes on in the same folder.

    Args:
        folder: where TensorBoard looks.
    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--log-to tensorboard: not installed. pip install tensorboard, or leave it out") from None
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step.

        Args:
            step: finished steps.
            figures: name to value.
        """
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
