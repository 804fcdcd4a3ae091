"""The cache of a layer whose key heads read different numbers of blocks."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.block_cache import BlockCache, Mode, check_mode
from bsbr.ops.shares import Share, join_shares, shares_of, take_share
from bsbr.ops.triton.problem import why_not_decode


def block_cache(config: BSBRConfig, mode: Mode = "full") -> "BlockCache | SharedCache":
    """Make the cache of a layer.

    Args:
        config: the layer's settings.
        mode: "full", "offload" or "states".
    Returns:
        An empty cache.

    Example:
        >>> type(block_cache(BSBRConfig(top_k_per_head=(2, 4)))).__name__
        'SharedCache'
    """
    return BlockCache(config, mode) if config.top_k_per_head is None else SharedCache(config, mode)


class SharedCache:
    """Several `BlockCache`s, each for the key heads that read the same number of blocks; used like one.

    Where kernels decode it is one for all heads: they take a number for each.

    Args:
        config: the settings, with a `top_k_per_head`.
        mode: as for `BlockCache`.
    """

    def __init__(self, config: BSBRConfig, mode: Mode = "full") -> None:
        check_mode(config, mode)
        self.config, self.mode = config, mode
        self._begin(shares_of(config))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self._caches[0].lengths

    def reset(self) -> None:
        """Forget everything."""
        for cache in self._caches:
            cache.reset()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        calibration: Tensor | None = None,
        counts: Sequence[int] | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Add tokens to each row and attend from them.

        Args:
            q, k, v, scale, calibration, counts, sinks: as for `BlockCache.attend`.
        Returns:
            o, [B, T, HQ, Dv].
        Raises:
            ValueError: there are not as many key heads as the settings have numbers.
        """
        if k.shape[2] != len(self.config.top_k_per_head or ()):
            raise ValueError(f"top_k_per_head must have {k.shape[2]} numbers, got {self.config.top_k_per_head}")
        if not self.lengths:
            whole = replace(self.config, top_k=self.config.max_top_k)
            kernels = self.mode == "full" and sinks is None
            if kernels and why_not_decode(q[:, :1], k[:, :1], v[:, :1], whole) is None:
                self._begin([Share(tuple(range(k.shape[2])), whole)])
            else:
                self._begin(shares_of(self.config))
        parts = []
        for share, cache in zip(self._shares, self._caches, strict=True):
            own = [take_share(x, share.heads, k.shape[2]) for x in (q, k, v)]
            scalars = None if calibration is None else take_share(calibration, share.heads, k.shape[2], 0)
            logits = None if sinks is None else take_share(sinks, share.heads, k.shape[2], 0)
            parts.append(cache.attend(*own, scale=scale, calibration=scalars, counts=counts, sinks=logits))
        return join_shares(parts, [share.heads for share in self._shares])

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Take in a text whose attention is known already.

        Args:
            k: keys, [B, T, H, D]; v: values, [B, T, H, Dv].
        """
        self._begin(shares_of(self.config))
        for share, cache in zip(self._shares, self._caches, strict=True):
            cache.fill(*(take_share(x, share.heads, k.shape[2]) for x in (k, v)))

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this many tokens.

        Args:
            tokens: of each row, those that are there included.
        """
        for cache in self._caches:
            cache.reserve(tokens)

    def replayed(self) -> None:
        """Note that a CUDA graph of a step of one token was replayed."""
        for cache in self._caches:
            cache.replayed()

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget the end of each row.

        Args:
            lengths: tokens that each row keeps.
        Raises:
            ValueError: the blocks that are cut into have been dropped.
        """
        for cache in self._caches:
            cache.crop(lengths)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order.

        Args:
            rows: [R] row numbers; one may come more than once.
        """
        for cache in self._caches:
            cache.select(rows)

    def _begin(self, shares: list[Share]) -> None:
        """Start with an empty cache for each share."""
        self._shares = shares
        self._caches = [BlockCache(share.config, self.mode) for share in shares]

    def num_bytes(self) -> dict[str, int]:
        """Return the memory the caches take, by kind: "device" and "host"."""
        used = {"device": 0, "host": 0}
        for cache in self._caches:
            for place, count in cache.num_bytes().items():
                used[place] += count
        return used
