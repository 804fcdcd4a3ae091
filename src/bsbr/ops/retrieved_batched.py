"""The retrieved field on a GPU: many tiles in one call, where `bsbr.ops.retrieved` takes block after block.

A block is a few tiles, far too little for a GPU, and a loop over blocks leaves it waiting for the next launch. Here the
keys of each tile are gathered beside its queries, and as many tiles as memory allows are one batched product.
"""

from collections.abc import Iterator

from torch import Tensor

_ELEMENTS = 1 << 26
"""Elements of the largest tensor made for the tiles of one call."""


def attend_tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    tile_block: Tensor,
    o: Tensor,
    top: Tensor,
    total: Tensor,
) -> None:
    """Attend each row of each tile to the tile's block.

    Args:
        q: queries, [Q, D].
        keys: keys whose products with queries are powers of two, [blocks, D, unit]; values: [blocks, unit, Dv].
        query: the query of each row, [tiles * rows].
        tile_block: the block of each tile, [tiles].
        o: sum of values by weights relative to the largest, [tiles * rows, Dv]; written.
        top: largest score, [tiles * rows, 1]; total: sum of the weights, the same; both written.
    """
    for tile, row in _parts(query, tile_block, keys):
        block, shape = tile_block[tile], (tile.stop - tile.start, -1)
        weights = q[query[row]].unflatten(0, shape) @ keys[block]  # [tiles, rows, unit]
        best = weights.amax(2, keepdim=True)
        weights.sub_(best).exp2_()
        top[row], total[row] = best.flatten(0, 1), weights.sum(2).view(-1, 1)
        o[row] = (weights @ values[block]).flatten(0, 1)


def attend_tiles_backward(
    do: Tensor,
    q: Tensor,
    keys: Tensor,
    blocks_k: Tensor,
    blocks_v: Tensor,
    query: Tensor,
    tile_block: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Differentiate the tiles' share of a softmax, but for the scale of the scores.

    Args:
        do: gradient of the output of each query, [Q, Dv]; q: queries, [Q, D].
        keys: as given to `attend_tiles`; blocks_k: the plain keys, [blocks, unit, D]; blocks_v: [blocks, unit, Dv].
        query, tile_block: as given to `attend_tiles`.
        lse: logarithm to base 2 of the whole softmax of each row, [tiles * rows, 1]; inf where nobody uses it.
        delta: sum of do * o of each row, [tiles * rows, 1].
        dq: [tiles * rows, D]; dk: [blocks, unit, D]; dv: [blocks, unit, Dv]; the first is written, the others added to.
    """
    for tile, row in _parts(query, tile_block, keys):
        block, shape = tile_block[tile], (tile.stop - tile.start, -1)
        own_q, own_do = (x[query[row]].unflatten(0, shape) for x in (q, do))
        weights = (own_q @ keys[block]).sub_(lse[row].unflatten(0, shape)).exp2_()
        dscores = (own_do @ blocks_v[block].mT).sub_(delta[row].unflatten(0, shape)).mul_(weights)
        # sorted by block, unlike `index_add_`: the same sums in the same order every time
        dv.index_put_((block,), weights.mT @ own_do, accumulate=True)
        dk.index_put_((block,), dscores.mT @ own_q, accumulate=True)
        dq[row] = (dscores @ blocks_k[block]).flatten(0, 1)


def _parts(query: Tensor, tile_block: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """Runs of tiles, and the rows they are made of."""
    rows, (width, unit) = len(query) // max(1, len(tile_block)), keys.shape[1:]
    step = max(1, _ELEMENTS // max(rows * width, rows * unit, width * unit))
    for start in range(0, len(tile_block), step):
        stop = min(start + step, len(tile_block))
        yield slice(start, stop), slice(start * rows, stop * rows)
