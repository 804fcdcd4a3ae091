"""Models that read blocks chosen from outside: by their true mass, at random, or the latest. Controls of a choice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from bsbr.config import BSBRConfig
from bsbr.hf.attention import NAME, bsbr_attention_forward, bsbr_mask
from bsbr.hf.mixers import Call, attend, layer_settings
from bsbr.hf.modeling import attention_modules
from bsbr.hf.sharing import share
from bsbr.ops.routing import past_blocks, recent_blocks, select_blocks
from bsbr.ops.schedule import dense_until
from bsbr.ops.shares import join_shares, shares_of, take_share

_ROUTED = "bsbr_routed"
"""Name under which transformers finds block sparse attention with blocks chosen from outside."""

_CHOICE = "_bsbr_choice"
"""Attribute of an attention module that holds what chooses its blocks."""

_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Scores held at once: a CPU's cache and a GPU's memory bound it, so that memory stays linear in the tokens."""


class Choice(Protocol):
    """Chooses the past blocks of every query."""

    def __call__(self, q: Tensor, k: Tensor, config: BSBRConfig, *, scale: float, layer: int) -> Tensor:
        """Choose.

        Args:
            q: queries from position 0 on, [B, T, HQ, D].
            k: keys, [B, T, H, D]; H divides HQ.
            config: the settings; `dense_below` is not looked at.
            scale: factor on q.k.
            layer: index of the layer.
        Returns:
            Indices of retrieval blocks, [B, T, HQ, top_k] int64, ascending; -1 where fewer are past.
        """


def route(model: PreTrainedModel, choice: Choice) -> PreTrainedModel:
    """Give a converted model another way to choose its blocks; all else, its calibration too, stays as it is.

    Args:
        model: converted with a BSBRConfig.
        choice: chooses the blocks.
    Returns:
        A model on the same weights, for forward passes over whole sequences, without padding and without a cache.

    Example:
        >>> import bsbr
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=64)).eval()
        >>> model = bsbr.convert(model, BSBRConfig(block_size=16, top_k=1, dense_below=0))
        >>> ids = torch.arange(64)[None] % 16
        >>> route(model, Oracle())(ids, use_cache=False).logits.shape
        torch.Size([1, 64, 16])
    """
    copied = share(model)
    for layer, module in enumerate(attention_modules(copied)):
        setattr(module, _CHOICE, partial(choice, layer=layer))
    copied.set_attn_implementation(_ROUTED)
    return copied


@dataclass(frozen=True)
class Oracle:
    """The blocks of largest true mass: the sum of exp(q.k) over their keys, which only exact attention knows."""

    def __call__(self, q: Tensor, k: Tensor, config: BSBRConfig, *, scale: float, layer: int) -> Tensor:
        """Choose; see `Choice`."""

        def scores(start: int, stop: int, blocks: int) -> Tensor:
            return true_log_mass(q[:, start:stop], k[:, : blocks * config.unit], config.unit, scale)

        return _choose(q, k.shape[2], config, scores)


@dataclass(frozen=True)
class Random:
    """Past blocks drawn without looking, each as likely as another: the floor of any choice."""

    seed: int = 0
    """Of the draw; the layer is added, the text is not looked at."""

    def __call__(self, q: Tensor, k: Tensor, config: BSBRConfig, *, scale: float, layer: int) -> Tensor:
        """Choose; see `Choice`."""
        generator = torch.Generator(device=q.device).manual_seed((self.seed << 16) + layer)
        rows, group = q.shape[0] * k.shape[2], q.shape[2] // k.shape[2]

        def scores(start: int, stop: int, blocks: int) -> Tensor:
            return torch.rand(rows, group, blocks, stop - start, generator=generator, device=q.device)

        return _choose(q, k.shape[2], config, scores)


@dataclass(frozen=True)
class OneDraw:
    """Past blocks drawn once for a text, without looking: all layers, heads and queries read these.

    With other blocks for each query, tokens that happen to read a fact pass it on in the next layer, and few layers
    are enough for every token to know it. Here, with `far="drop"`, nothing leaves blocks that are neither drawn nor,
    as long as too few of those drawn are past, the first of the text.
    """

    seed: int = 0
    """Of the draw; the text is not looked at."""

    def __call__(self, q: Tensor, k: Tensor, config: BSBRConfig, *, scale: float, layer: int) -> Tensor:
        """Choose; see `Choice`."""
        past = past_blocks(torch.arange(q.shape[1], device=q.device), config)
        block = torch.arange(int(past[-1]), device=q.device)
        generator = torch.Generator(device=q.device).manual_seed(self.seed)
        rank = torch.rand(len(q), len(block), generator=generator, device=q.device)
        place = rank.argsort(1).argsort(1)  # of each block in the draw
        worth = torch.where(place < config.top_k, 1, -block)

        def scores(start: int, stop: int, blocks: int) -> Tensor:
            each = worth[:, None, :blocks, None].expand(-1, q.shape[2] // k.shape[2], -1, stop - start)
            return each.repeat_interleave(k.shape[2], 0).float()

        return _choose(q, k.shape[2], config, scores)


@dataclass(frozen=True)
class Recent:
    """The blocks just before the own one: with `far="drop"`, a local window of the same token budget."""

    def __call__(self, q: Tensor, k: Tensor, config: BSBRConfig, *, scale: float, layer: int) -> Tensor:
        """Choose; see `Choice`."""
        return recent_blocks(q, config)


def true_log_mass(q: Tensor, k: Tensor, unit: int, scale: float) -> Tensor:
    """Compute the exact log of the softmax mass of each block for each query: what summaries only estimate.

    Args:
        q: queries, [B, S, HQ, D].
        k: keys of whole blocks, [B, N * unit, H, D].
        unit: tokens of a block.
        scale: factor on q.k.
    Returns:
        [B * H, G, N, S] float32 (float64 for float64 input), as `bsbr.ops.routing.select_blocks` takes scores.

    Example:
        >>> true_log_mass(torch.zeros(1, 3, 2, 4), torch.ones(1, 16, 1, 4), 8, 0.5).exp().unique()
        tensor([8.])
    """
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    heads_q = q.to(dtype).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * H, G, S, D]
    heads_k = k.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
    scores = (heads_k @ heads_q.mT).mul_(scale)  # [B * H, G, N * unit, S]
    return scores.unflatten(2, (-1, unit)).logsumexp(3)


def _choose(q: Tensor, key_heads: int, config: BSBRConfig, scores: Callable[[int, int, int], Tensor]) -> Tensor:
    """Take the `top_k` past blocks of largest score, from scores(start, stop, blocks) [B * H, G, blocks, S]."""
    rows, length, heads, _ = q.shape
    past = past_blocks(torch.arange(length, device=q.device), config)
    chosen = torch.arange(config.top_k, device=q.device).expand(length, -1)
    chosen = chosen.masked_fill(chosen >= past[:, None], -1)  # right where no more than top_k are past
    chosen = chosen[None, :, None].repeat(rows, 1, heads, 1)
    for start, stop in _segments(q, config):
        blocks = int(past[stop - 1])
        found = scores(start, stop, blocks)
        found.masked_fill_(torch.arange(blocks, device=q.device)[:, None] >= past[start:stop], -torch.inf)
        index = select_blocks(found, config.top_k, config.selection).sort(2).values  # [B * H, G, top_k, S]
        chosen[:, start:stop] = index.unflatten(0, (rows, key_heads)).permute(0, 4, 1, 2, 3).flatten(2, 3)
    return chosen


def _segments(q: Tensor, config: BSBRConfig) -> Iterator[tuple[int, int]]:
    """Runs of the queries that have a choice."""
    first, length = dense_until(replace(config, dense_below=0)), q.shape[1]
    room = _ELEMENTS["cuda" if q.is_cuda else "cpu"] // (q.shape[0] * q.shape[2] * length)
    for start in range(first if config.top_k else length, length, max(1, room)):
        yield start, min(start + max(1, room), length)


def _attend_routed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Block sparse attention, as transformers calls it, with the blocks that the module's choice names."""
    mixer, settings = layer_settings(module.config, module.layer_idx)  # type: ignore[arg-type]
    choice = getattr(module, _CHOICE, None)
    if choice is None or key.shape[2] <= mixer.exact_until(settings):  # a sliding window, or nothing to choose
        return bsbr_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise NotImplementedError("a routed model takes whole sequences: no padding, use_cache=False")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = kwargs["scaling"]
    call = Call(q, k, v, None, scale, 0, None, 0.0, block_indices=_choose_by_share(choice, q, k, settings, scale))
    return attend(call, mixer, settings, getattr(module, NAME, None)).to(query.dtype).contiguous(), None


def _choose_by_share(choice: Choice, q: Tensor, k: Tensor, settings: BSBRConfig, scale: float) -> Tensor:
    """What a module's choice names, [B, T, HQ, max_top_k]; heads with the same number of blocks choose together."""
    if settings.top_k_per_head is None:
        return choice(q, k, settings, scale=scale)  # type: ignore[call-arg]
    parts, heads = [], []
    for own in shares_of(settings):
        mine = [take_share(x, own.heads, k.shape[2]) for x in (q, k)]
        found = choice(mine[0], mine[1], own.config, scale=scale)  # type: ignore[call-arg]
        parts.append(torch.nn.functional.pad(found, (0, settings.max_top_k - own.config.top_k), value=-1))
        heads.append(own.heads)
    return join_shares(parts, heads)


AttentionInterface.register(_ROUTED, _attend_routed)
AttentionMaskInterface.register(_ROUTED, bsbr_mask)
