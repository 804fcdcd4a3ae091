"""The cache of a converted model: transformers' interface around `bsbr.ops.block_cache`."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from bsbr.config import BSBRConfig
from bsbr.errors import UserError
from bsbr.hf.families import NAME
from bsbr.hf.masked_call import read_mask
from bsbr.hf.mixers import is_converted, layer_settings, read_settings
from bsbr.ops.block_cache import Mode, check_mode
from bsbr.ops.shared_cache import block_cache

CACHE_ARGUMENT = ALL_CACHE_NAMES[0]
"""What the installed transformers calls the argument of a model and of `generate` that takes a cache."""

_LAYER = "_bsbr_layer"
"""Attribute of a key tensor: the cache layer that gave it out."""

_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters
"""Older versions of transformers name the tokens to keep, where later ones name, below zero, those to remove."""


class BSBRCache(Cache):
    """A cache of ready summaries: a decoded token reads blocks, not the whole past.

    `generate` of a converted model makes one by itself. Layers that are not converted keep transformers' own.

    Args:
        config: the converted model's config.
        mode: "full" keeps all keys and values on the device; "offload" keeps those of past blocks on the host and
            fetches what is retrieved; "states" keeps summaries and the last blocks only, for `top_k` 0 or
            `selection="recent"`.
    Raises:
        UserError: the mode does not exist or does not fit the settings, or the mixer keeps no such cache.

    Example:
        >>> from transformers import GPT2Config
        >>> config = GPT2Config(n_layer=2, n_head=2, n_embd=8)
        >>> config.bsbr = BSBRConfig(top_k=2).to_dict()
        >>> len(BSBRCache(config, "offload"))
        2
    """

    def __init__(self, config: PreTrainedConfig, mode: Mode = "full") -> None:
        _, settings = read_settings(getattr(config, NAME, None))
        if not isinstance(settings, BSBRConfig):
            raise UserError(f"a BSBRCache is for BSBR attention, not for {type(settings).__name__}: use DynamicCache")
        try:
            check_mode(settings, mode)
        except ValueError as error:
            raise UserError(str(error)) from error
        stock: list[Any] = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                layer
                if layer.is_sliding or not is_converted(config, index)
                else BSBRLayer(layer_settings(config, index)[1], mode)
                for index, layer in enumerate(stock)
            ]
        )

    def reserve(self, tokens: int) -> None:
        """Make room for rows of this many tokens: a CUDA graph of a step is right while no buffer moves.

        Call it when the cache holds tokens already.

        Args:
            tokens: of each row, those that are there included.
        """
        for layer in self._block_layers():
            layer.blocks.reserve(tokens)

    def replayed(self) -> None:
        """Note that a CUDA graph of a step of one token was replayed; not for the first replay after its capture.

        A graph runs no Python, so this is what counts the token and, at the end of a block, summarises it.
        """
        for layer in self._block_layers():
            layer.replayed()

    def _block_layers(self) -> list["BSBRLayer"]:
        layers = [layer for layer in self.layers if isinstance(layer, BSBRLayer)]
        if len(layers) != len(self.layers):
            raise UserError("layers with a sliding window cannot be replayed in a CUDA graph")
        return layers

    def num_bytes(self) -> dict[str, int]:
        """Return the memory of the whole cache in bytes, by kind: "device" and "host"."""
        used = {"device": 0, "host": 0}
        for layer in self.layers:
            if isinstance(layer, BSBRLayer):
                for place, count in layer.blocks.num_bytes().items():
                    used[place] += count
            else:
                tensors = getattr(layer, "keys", None), getattr(layer, "values", None)
                used["device"] += sum(x.nbytes for x in tensors if x is not None)
        return used


class BSBRLayer(CacheLayerMixin):
    """One layer: `update` only hands new keys and values on, with a reference to the layer; the attention function
    adds them, since it alone knows the queries and which tokens are padding.

    Args:
        settings: of the attention.
        mode: as for `BSBRCache`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, settings: BSBRConfig, mode: Mode) -> None:
        super().__init__()
        self.blocks = block_cache(settings, mode)
        self._slots = 0
        self._given_out = False
        self._mask: Tensor | None = None  # of the last call; all layers share it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers are made when the first tokens come."""
        self.is_initialized = True

    @torch.compiler.disable  # its bookkeeping is by side effect, which a compiled graph would replay out of order
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values to the attention function.

        Args:
            key_states: [B, H, Q, D]; value_states: [B, H, Q, Dv].
            args, kwargs: what transformers passes to other layers.
        Returns:
            The same, the keys with a reference to this layer.
        Raises:
            RuntimeError: the keys of the last call never came back, so the attention of this model is not ours.
        """
        if self._given_out:
            raise RuntimeError(
                "a BSBRCache works only with attn_implementation bsbr: use DynamicCache with another attention"
            )
        self.lazy_initialization(key_states, value_states)
        key = key_states.view_as(key_states)
        setattr(key, _LAYER, self)
        self._given_out = True
        return key, value_states

    @torch.compiler.disable
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, calibration: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Add the new tokens and attend from them.

        Args:
            q: [B, Q, HQ, D]; k: [B, Q, H, D]; v: [B, Q, H, Dv].
            mask: as made by `bsbr.hf.attention.bsbr_mask` for all slots, or None where all hold a token.
            scale: factor on q.k.
            calibration: [HQ, 5], or None.
            sinks: [HQ], or None.
        Returns:
            o, [B, Q, HQ, Dv]; 0 for padding.
        Raises:
            ValueError: another number of rows than before.
            NotImplementedError: gradients are wanted, or the mask says something else about past tokens than before.
        """
        self._given_out = False
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) and self._slots:
            raise NotImplementedError("a BSBRCache holds no gradients: use torch.no_grad(), or DynamicCache to train")
        (rows, queries), held = q.shape[:2], self.blocks.lengths or [0] * q.shape[0]
        if len(held) != rows:
            raise ValueError(f"the cache holds {len(held)} rows, got {rows}: use a cache for each batch")
        call = read_mask(mask, rows, self._slots, queries)
        if call.past != held:
            raise NotImplementedError(
                "the attention mask says something else about tokens that the cache holds than it did when they came; "
                "without a mask, generate takes every pad token for padding, even one it wrote: give attention_mask"
            )
        self._slots, self._mask = self._slots + queries, mask
        if call.order is None:
            return self.blocks.attend(q, k, v, scale=scale, calibration=calibration, sinks=sinks)
        row = torch.arange(rows, device=q.device)[:, None]
        part = self.blocks.attend(
            *(x[row, call.order] for x in (q, k, v)), scale=scale, calibration=calibration, counts=call.counts,
            sinks=sinks,
        )  # fmt: skip
        o = part.new_zeros(*q.shape[:3], v.shape[3])
        o[row, call.order] = part
        return o

    def fill(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take in a text whose attention is known already, as another cache holds it.

        Args:
            key_states: [B, H, T, D]; value_states: [B, H, T, Dv].
        """
        self.reset()
        self.blocks.fill(key_states.transpose(1, 2), value_states.transpose(1, 2))
        self._slots = key_states.shape[2]

    def replayed(self) -> None:
        """Note that a CUDA graph of a step of one token was replayed."""
        if self._mask is not None:
            raise NotImplementedError("a replayed step takes no mask: use rows of one length without padding")
        self._slots += 1
        self.blocks.replayed()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the slots after a call, padding included, and the first of them."""
        return self._slots + query_length, 0

    def get_seq_length(self) -> int:
        """Return the slots so far, padding included."""
        return self._slots

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: `get_max_length`, as older versions of transformers call it."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.blocks.reset()
        self._slots, self._given_out, self._mask = 0, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: their number, negative or 0; where transformers takes a number to keep, also that.
        Raises:
            ValueError: the number is positive, or mode "states" has dropped what it would go back to.
        """
        if _CROPS_TO_LENGTH and tokens_to_remove >= 0:
            tokens_to_remove = min(0, tokens_to_remove - self._slots)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        slots = max(0, self._slots + int(tokens_to_remove))  # a tensor from transformers 5.17
        if slots == self._slots:
            return
        if self._mask is None:
            gone = [self._slots - slots] * len(self.blocks.lengths)
        else:
            gone = (self._mask[:, 0, 0, slots : self._slots] > 0).sum(1).tolist()
        self.blocks.crop([length - count for length, count in zip(self.blocks.lengths, gone, strict=True)])
        self._slots = slots

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was."""
        if self._slots:
            self.blocks.select(beam_idx)
            if self._mask is not None:
                self._mask = self._mask[beam_idx.to(self._mask.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.reorder_cache(torch.arange(len(self.blocks.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: numbers, or True and False for each."""
        if self._slots:
            self.reorder_cache(torch.arange(len(self.blocks.lengths))[torch.as_tensor(indices).cpu()])

    def offload(self) -> None:
        """Nothing: mode "offload" does it block by block."""

    def prefetch(self) -> None:
        """Nothing: blocks are fetched once they are chosen."""


def keeps_summaries(config: PreTrainedConfig) -> bool:
    """Say whether a model's attention can be decoded from a BSBRCache.

    Args:
        config: the converted model's.
    Returns:
        False for peers, and for states that need past queries or the state of each block.

    Example:
        >>> config = PreTrainedConfig(bsbr=BSBRConfig(state="token").to_dict())
        >>> keeps_summaries(config)
        False
    """
    _, settings = read_settings(getattr(config, NAME, None))
    return isinstance(settings, BSBRConfig) and settings.state in ("global", "none")


def layer_of(key: Tensor) -> BSBRLayer | None:
    """Return the cache layer that gave a key tensor out.

    Args:
        key: the keys an attention function got.
    Returns:
        The layer, or None where they are from elsewhere.
    """
    return getattr(key, _LAYER, None)
