"""From a padded or packed batch to rows that start at position 0, and back.

The mask that `bsbr.hf.attention.bsbr_mask` makes is one int32 number for every key, [B, 1, 1, KV]: the document it
belongs to, counted from 1; 0 for padding; -1 for a slot of a static cache that nothing was written to yet.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Documents that are worked on in one call, each moved to a row of its own that starts at position 0."""

    keys: Tensor
    """Where the key at each position of each document stood, row * KV + slot, [R, L]; 0 after its end."""
    queries: Tensor
    """Where the query at each position from q_start stood, row * Q + query; B * Q where there is none, [R, Tq]."""
    lengths: Tensor
    """Tokens of each document, [R]."""
    q_start: int
    """Position of the first query."""


class Layout(NamedTuple):
    """How one batch falls into documents."""

    kv_length: int
    """Slots that hold a key or padding; a static cache has more."""
    groups: list[Group]
    """The documents; none where everything is padding."""


def layout(mask: Tensor, num_queries: int) -> Layout:
    """Find the documents of a batch and where their queries are.

    Rows of packed documents are grouped by length to the next power of two, so that a short document never takes
    more than twice its room; other batches are one group.

    Args:
        mask: [B, 1, 1, KV], int32, as described above.
        num_queries: Q; the queries are the last Q written slots.
    Returns:
        The layout. It is kept with the mask, since every layer of a model asks for it.
    """
    kept: dict[int, Layout] = getattr(mask, "_bsbr_layouts", {})
    if num_queries not in kept:
        kept[num_queries] = _layout(mask[:, 0, 0], num_queries)
        mask._bsbr_layouts = kept  # type: ignore[attr-defined]
    return kept[num_queries]


def _layout(document: Tensor, num_queries: int) -> Layout:
    batch, kv_length = document.shape[0], int((document[0] >= 0).sum())
    document = document[:, :kv_length]
    row, slot = (document > 0).nonzero(as_tuple=True)  # the real tokens, in order
    if not len(row):
        return Layout(kv_length, [])
    name = document[row, slot]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (name[1:] != name[:-1])
    index = first.cumsum(0) - 1  # document of each token
    start = first.nonzero()[:, 0]
    lengths = torch.diff(start, append=start.new_tensor([len(row)]))
    position = torch.arange(len(row), device=row.device) - start[index]
    query = slot - (kv_length - num_queries)  # negative for tokens that were there before
    asked = lengths.new_zeros(len(start)).index_add(0, index, (query >= 0).long()) > 0
    shelf = (lengths - 1).clamp(min=1).double().log2().floor() if len(start) > batch else torch.zeros_like(lengths)
    groups = []
    for chosen in [asked & (shelf == size) for size in shelf[asked].unique()]:
        renumbered = chosen.cumsum(0) - 1
        mine = chosen[index]
        groups.append(
            _group(
                renumbered[index[mine]], position[mine], lengths[chosen], row[mine] * kv_length + slot[mine],
                torch.where(query[mine] >= 0, row[mine] * num_queries + query[mine], batch * num_queries),
                batch * num_queries,
            )
        )  # fmt: skip
    return Layout(kv_length, groups)


def _group(index: Tensor, position: Tensor, lengths: Tensor, key: Tensor, query: Tensor, nowhere: int) -> Group:
    """Spread the tokens of some documents over rows."""
    shape = (len(lengths), int(lengths.max()))
    keys = key.new_zeros(shape)
    keys[index, position] = key
    queries = query.new_full(shape, nowhere)
    queries[index, position] = query
    q_start = int(position[query < nowhere].min())
    return Group(keys, queries[:, q_start:], lengths, q_start)


def attend_by_document(
    plan: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None,
    attend: Callable[[Group, Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Attend within each document.

    Args:
        plan: from `layout`.
        q: [B, Q, HQ, D]; k: [B, KV, H, D]; v: [B, KV, H, Dv]; hidden: [B, Q, hidden] or None.
        attend: computes o [R, Tq, HQ, Dv] of one group from its q, k, v and hidden states.
    Returns:
        o, [B, Q, HQ, Dv]; 0 for padded queries.
    """
    k, v = (x[:, : plan.kv_length].flatten(0, 1) for x in (k, v))
    flat_q = q.flatten(0, 1)
    flat_hidden = None if hidden is None else hidden.flatten(0, 1)
    o = q.new_zeros(len(flat_q) + 1, q.shape[2], v.shape[-1])  # the last row takes what nobody asked for
    for group in plan.groups:
        read = group.queries.clamp(max=len(flat_q) - 1)
        part = attend(
            group, flat_q[read], k[group.keys], v[group.keys], None if flat_hidden is None else flat_hidden[read]
        )
        o = o.to(part.dtype).index_copy(0, group.queries.flatten(), part.flatten(0, 1))
    return o[:-1].unflatten(0, q.shape[:2])
