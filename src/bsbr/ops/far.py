"""The far field: every past block that a query does not read, as one entry of a softmax, forward and backward.

Shapes: Z key heads of all rows, G query heads of each, S queries, N past blocks, C local blocks; scores are
block-major, [Z, G, N, S]. Queries come unscaled, in float32 or better.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bsbr.config import BSBRConfig
from bsbr.ops.exponentials import exp_
from bsbr.ops.summaries import Summaries, log_mass


class FarField(NamedTuple):
    """What the far field is made of; a NamedTuple, so that autograd sees each tensor."""

    mean_k: Tensor
    """[Z, N, D]."""
    var_k: Tensor
    """[Z, N, D]."""
    mean_v: Tensor
    """[Z, N, Dv]."""
    states: Tensor | None
    """Read states of each local block, [Z, 1 or G, C, D, Dv]; for state="token" those of the blocks, [Z, N, D, Dv]."""
    calibration: Tensor
    """[Z, G, 5]."""
    scale: float
    """Factor on q.k."""


def read_states(
    config: BSBRConfig, summaries: Summaries, q_last: Tensor | None, calibration: Tensor, scale: float
) -> Tensor | None:
    """Compute what the queries of each local block read of the first-order states.

    Source: docs/method.md; "global" is the mean over past blocks, "block" BSBR's softmax(R H^T) F with the closed
    form of R and H, taken at the last query of the previous local block.

    Args:
        config: the settings.
        summaries: of the complete retrieval blocks.
        q_last: for state="block", last queries of local blocks 0 to C - 2, [Z, G, C - 1, D].
        calibration: [Z, G, 5].
        scale: factor on q.k.
    Returns:
        [Z, 1 or G, C, D, Dv], the first local block reading zeros; the block states for "token"; None for "none".
    """
    states, per_block = summaries.states, config.block_size // config.unit
    if config.state == "none":
        return None
    if config.state == "token":
        return states
    if config.state == "global":
        num_blocks = states.shape[1]
        counts = torch.arange(per_block, num_blocks + 1, per_block, device=states.device)[:, None]
        mean = (torch.arange(num_blocks, device=states.device) < counts) / counts.to(states.dtype)  # [C - 1, N]
        read = torch.einsum("cn,zndv->zcdv", mean, states)[:, None]
    else:
        assert q_last is not None
        score = _masses(config, q_last, summaries.mean_k, summaries.var_k, calibration, scale)
        past = torch.arange(q_last.shape[2], device=score.device)  # the block after the one whose last query it is
        score = score.masked_fill(_not_past(score.shape[2], past + 1, per_block), -math.inf)
        read = torch.einsum("zgnc,zndv->zgcdv", score.softmax(-2), states)
    return torch.cat([torch.zeros_like(read[:, :, :1]), read], 2)


def scores(config: BSBRConfig, field: FarField, q: Tensor, blocks: range) -> Tensor:
    """Estimate the log-mass of each past block for each query.

    Args:
        config: the settings.
        field: summaries; only the blocks that are past for the last query are scored.
        q: queries of consecutive local blocks, equally many of each, [Z, G, S, D].
        blocks: these local blocks.
    Returns:
        [Z, G, N, S], -inf where a block is not past.
    """
    per_block = config.block_size // config.unit
    count = blocks[-1] * per_block
    mass = _masses(config, q, field.mean_k[:, :count], field.var_k[:, :count], field.calibration, field.scale)
    rows = q.shape[2] // len(blocks)
    if mass.is_cuda:  # one launch for all local blocks
        own = torch.arange(blocks.start, blocks.stop, device=mass.device).repeat_interleave(rows)
        return mass.masked_fill_(_not_past(count, own, per_block), -math.inf)
    for i, block in enumerate(blocks[:-1]):
        mass[:, :, block * per_block :, i * rows : (i + 1) * rows] = -math.inf
    return mass


def merge_far(
    config: BSBRConfig, field: FarField, q: Tensor, mass: Tensor, blocks: range, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to the far field and merge the result into what the queries have so far.

    Args:
        config: the settings.
        field: summaries, states and calibration.
        q: [Z, G, S, D].
        mass: scores with -inf also where a block is read exactly, [Z, G, N, S]; overwritten.
        blocks: local blocks of the queries.
        o: output so far, [Z, G, S, Dv]; lse: its log-sum-exp, [Z, G, S].
    Returns:
        o and lse over the former keys and the far field together, o in the dtype of lse.
    """
    gamma, beta = field.calibration[..., None, None, 3:].unbind(-1)
    beta = field.scale * beta  # the state is read with the scaled query
    top = mass.amax(-2).clamp_(min=torch.finfo(mass.dtype).min)  # an empty field stays finite
    weights = exp_(mass.sub_(top.unsqueeze(-2)))
    total = weights.sum(-2)  # [Z, G, S]
    value = weights.mT @ (gamma * field.mean_v[:, None, : mass.shape[2]])
    if config.state == "token":
        value.addcmul_(_token_output(field, q, weights), beta)
    elif config.state != "none":
        _add_state_output(field, q * (beta * total.unsqueeze(-1)), blocks, value)
    merged_lse = torch.logaddexp(lse, top + total.log())
    merged = o * exp_(lse - merged_lse).unsqueeze(-1)
    return merged.addcmul_(value, exp_(top - merged_lse).unsqueeze(-1)), merged_lse


class FarGradients(NamedTuple):
    """Gradients of a FarField, summed over the queries seen so far, and of their queries."""

    mean_k: Tensor
    var_k: Tensor
    mean_v: Tensor
    states: Tensor | None
    calibration: Tensor


def zero_gradients(field: FarField) -> FarGradients:
    """Start the sums that `far_backward` adds to."""
    return FarGradients(*(None if x is None else torch.zeros_like(x) for x in field[:5]))  # type: ignore[arg-type]


def far_backward(
    config: BSBRConfig,
    field: FarField,
    gradients: FarGradients,
    q: Tensor,
    weights: Tensor,
    do: Tensor,
    delta: Tensor,
    blocks: range,
) -> Tensor:
    """Differentiate the far field's share of the whole softmax, adding to `gradients`.

    Source: the softmax gradient dm = p (dp - delta) with p and delta of the whole softmax; an entry's value is
    gamma mean_v + beta q^T F.

    Args:
        config, field, q, blocks: as given to `merge_far`.
        gradients: sums to add to, in place.
        weights: probability of each entry in the whole softmax, [Z, G, N, S]; 0 where it is no entry.
        do: gradient of o, [Z, G, S, Dv].
        delta: sum of do * o of the whole softmax, [Z, G, S].
    Returns:
        Gradient of q, [Z, G, S, D].
    """
    count = weights.shape[2]
    mean_k, var_k, mean_v = (x[:, None, :count] for x in field[:3])
    _, mean_scale, var_scale, gamma, beta = field.calibration[..., None, None].unbind(2)
    beta = field.scale * beta  # the state is read with the scaled query
    sums = gradients.calibration

    dvalue = mean_v @ do.mT  # [Z, G, N, S]
    sums[..., 3] += (weights * dvalue).sum((-1, -2))
    gradients.mean_v[:, :count] += (gamma * (weights @ do)).sum(1)
    dweights = gamma * dvalue
    dq = torch.zeros_like(q)
    if config.state == "token":
        dweights += beta * _token_backward(field, gradients, q, weights, do, beta, dq)
    elif config.state != "none":
        dstate = _state_backward(field, gradients, q, weights.sum(-2), do, blocks, beta, dq)
        dweights += beta * dstate.unsqueeze(-2)

    dmass = dweights.sub_(delta.unsqueeze(-2)).mul_(weights)
    sums[..., 0] += dmass.sum((-1, -2))
    dlinear = field.scale * (dmass @ q)  # [Z, G, N, D]
    sums[..., 1] += (dlinear * mean_k).sum((-1, -2))
    gradients.mean_k[:, :count] += (mean_scale * dlinear).sum(1)
    dq += dmass.mT @ (field.scale * mean_scale * mean_k)
    if config.far == "moments":
        dsquare = field.scale**2 * (dmass @ (q * q))
        sums[..., 2] += (dsquare * var_k).sum((-1, -2)) / 2
        gradients.var_k[:, :count] += (var_scale / 2 * dsquare).sum(1)
        dq += q * (dmass.mT @ (field.scale**2 * var_scale * var_k))
    return dq


def _masses(config: BSBRConfig, q: Tensor, mean_k: Tensor, var_k: Tensor, calibration: Tensor, scale: float) -> Tensor:
    return log_mass(q, mean_k, var_k if config.far == "moments" else None, config.unit, calibration, scale)


def _not_past(count: int, blocks: Tensor, per_block: int) -> Tensor:
    """[N, S]: retrieval block n has not ended before the query's local block begins."""
    return torch.arange(count, device=blocks.device)[:, None] >= blocks * per_block


def _folded(x: Tensor, blocks: range) -> Tensor:
    """View queries by local block, [Z, G, S, D] -> [Z, G, C, m, D]."""
    return x.unflatten(2, (len(blocks), -1))


def _add_state_output(field: FarField, q: Tensor, blocks: range, o: Tensor) -> None:
    """Add to o what the queries read of their local block's state."""
    assert field.states is not None
    states = field.states[:, :, blocks.start : blocks.stop].expand(-1, q.shape[1], -1, -1, -1)
    _folded(o, blocks).flatten(0, 2).baddbmm_(_folded(q, blocks).flatten(0, 2), states.flatten(0, 2))


def _state_backward(
    field: FarField,
    gradients: FarGradients,
    q: Tensor,
    far_weight: Tensor,
    do: Tensor,
    blocks: range,
    beta: Tensor,
    dq: Tensor,
) -> Tensor:
    """Add to the gradients of the read states, beta and q; return do . (q^T F), [Z, G, S]."""
    assert field.states is not None
    assert gradients.states is not None
    folded_q, folded_do, own = _folded(q, blocks), _folded(do, blocks), slice(blocks.start, blocks.stop)
    states = field.states[:, :, own]
    dread = folded_do @ states.mT  # [Z, G, C, m, D]
    along = (folded_q * dread).sum(-1).flatten(2)
    gradients.calibration[..., 4] += field.scale * (far_weight * along).sum(-1)
    weight = beta * far_weight.unsqueeze(-1)  # [Z, G, S, 1]
    dq += weight * dread.flatten(2, 3)
    dstates = folded_q.mT @ _folded(weight * do, blocks)  # [Z, G, C, D, Dv]
    gradients.states[:, :, own] += dstates.sum(1, keepdim=True) if states.shape[1] == 1 else dstates
    return along


def _token_output(field: FarField, q: Tensor, weights: Tensor) -> Tensor:
    """Sum over blocks of p_b q^T F_b, one block at a time so that nothing of size S x N x D exists."""
    assert field.states is not None
    o = q.new_zeros(*q.shape[:-1], field.mean_v.shape[-1])
    for block in range(weights.shape[2]):
        o += weights[:, :, block, :, None] * (q @ field.states[:, None, block])
    return o


def _token_backward(
    field: FarField, gradients: FarGradients, q: Tensor, weights: Tensor, do: Tensor, beta: Tensor, dq: Tensor
) -> Tensor:
    """Add to the gradients of the block states, beta and q; return do . (q^T F_b), [Z, G, N, S]."""
    assert field.states is not None
    assert gradients.states is not None
    along = torch.empty_like(weights)
    for block in range(weights.shape[2]):
        dread = do @ field.states[:, None, block].mT  # [Z, G, S, D]
        along[:, :, block] = (q * dread).sum(-1)
        weight = beta * weights[:, :, block, :, None]
        dq += weight * dread
        gradients.states[:, block] += (q.mT @ (weight * do)).sum(1)
    gradients.calibration[..., 4] += field.scale * (weights * along).sum((-1, -2))
    return along
