"""The order in which training reads a token stream: shuffled windows, a function of seed and count alone."""

import numpy as np


class WindowOrder:
    """Starts of training windows in one token stream, epoch after epoch, without padding.

    Each epoch cuts the stream into windows of `window` tokens (plus the one token that the last position
    predicts), beginning at a random offset so that the cuts move, and shuffles them. Window number i of the
    run is the same whatever was asked before, so the data position of a checkpoint is one integer.

    Args:
        num_tokens: tokens in the stream.
        window: tokens a window predicts.
        seed: chooses offsets and order.
    Raises:
        ValueError: the stream is shorter than one window and its next token.

    Example:
        >>> order = WindowOrder(num_tokens=100, window=16, seed=0)
        >>> order.per_epoch
        5
        >>> sorted(np.diff(np.sort(order.starts(0, 5))).tolist())
        [16, 16, 16, 16]
    """

    def __init__(self, num_tokens: int, window: int, seed: int) -> None:
        if num_tokens < window + 1:
            raise ValueError(f"{num_tokens} tokens: one window needs {window + 1}. Give more text or lower context")
        self.window = window
        self.seed = seed
        # One window less than fits, so that every offset below the window length leaves the same number.
        self.per_epoch = max(1, (num_tokens - window) // window)
        self._offsets = min(window, num_tokens - self.per_epoch * window)
        self._epoch = -1
        self._epoch_starts = np.empty(0, dtype=np.int64)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Starts of the windows number `first` to `first + count - 1` of the run.

        Args:
            first: number of the first window, from 0.
            count: how many; they may cross epochs.
        Returns:
            Positions in the stream, [count], int64; each window reads `window + 1` tokens from there.
        """
        parts = []
        while count > 0:
            epoch, position = divmod(first, self.per_epoch)
            part = self._starts_of_epoch(epoch)[position : position + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            offset = generator.integers(self._offsets)
            self._epoch_starts = offset + self.window * generator.permutation(self.per_epoch).astype(np.int64)
            self._epoch = epoch
        return self._epoch_starts
