"""Groups of heads that are worked on together, on a CPU each by one thread; nothing here changes what is computed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

_ROWS = {"cpu": 1 << 14, "cuda": 1 << 18}
"""Query rows worked on at once: enough to fill dense calls, few enough to bound memory."""

Group = tuple[slice, slice]
"""Batch rows and key heads that are worked on together."""

Result = TypeVar("Result")


def head_groups(batch: int, key_heads: int, rows_per_head: int, workers: int, device: str = "cpu") -> list[Group]:
    """Cut batch rows and key heads into groups that are worked on together.

    Args:
        batch: rows.
        key_heads: key heads of a row.
        rows_per_head: query rows that belong to one key head.
        workers: groups that run at the same time; there should be enough for all.
        device: type of the device.
    Returns:
        (rows, key heads) of each group: several whole rows, or several heads of one row.

    Example:
        >>> head_groups(2, 4, 8192, 1)[0]
        (slice(0, 1, None), slice(0, 2, None))
    """
    most = _ROWS.get(device, _ROWS["cpu"])
    wanted = max(1, min(most // max(1, rows_per_head), -(-batch * key_heads // workers)))
    rows, heads = (wanted // key_heads, key_heads) if wanted >= key_heads else (1, wanted)
    return [
        (slice(b, min(b + rows, batch)), slice(h, min(h + heads, key_heads)))
        for b in range(0, batch, rows)
        for h in range(0, key_heads, heads)
    ]


def cut_heads(q: Tensor, k: Tensor) -> list[Group]:
    """Return the groups of heads of a call, enough for every thread on a CPU.

    Args:
        q: queries, [B, Tq, HQ, D].
        k: keys, [B, T, H, D].
    Returns:
        (rows, key heads) of each group.

    Example:
        >>> cut_heads(torch.zeros(1, 40000, 4, 8), torch.zeros(1, 40000, 2, 8))
        [(slice(0, 1, None), slice(0, 1, None)), (slice(0, 1, None), slice(1, 2, None))]
    """
    rows_per_head = q.shape[2] // k.shape[2] * q.shape[1]
    return head_groups(k.shape[0], k.shape[2], rows_per_head, _threads(q), q.device.type)


def each_group(work: Callable[[int, Group], Result], q: Tensor, k: Tensor) -> list[Result]:
    """Run `work` for each group of heads: on a CPU in parallel, one thread each.

    Most steps are too small to be worth splitting, but whole groups are independent. Gradients and autocast are off
    in every thread, and inference mode is what it is in the caller's.

    Args:
        work: called with a group's number and the group.
        q: queries, [B, Tq, HQ, D].
        k: keys, [B, T, H, D].
    Returns:
        What `work` returns for each group.
    """
    inference = torch.is_inference_mode_enabled()

    def quietly(index: int, group: Group) -> Result:
        with (
            torch.inference_mode(inference),  # these three settings are each thread's own
            torch.no_grad(),
            torch.autocast(q.device.type, enabled=False),
        ):
            return work(index, group)

    threads, groups = _threads(q), cut_heads(q, k)
    if threads == 1 or len(groups) == 1:
        return [quietly(index, group) for index, group in enumerate(groups)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(quietly, range(len(groups)), groups))
    finally:
        torch.set_num_threads(threads)


def _threads(q: Tensor) -> int:
    return torch.get_num_threads() if q.device.type == "cpu" else 1


def by_head(x: Tensor, k: Tensor) -> Tensor:
    """View what belongs to queries by key head.

    Args:
        x: [B, Tq, HQ, ...].
        k: keys, [B, T, H, D].
    Returns:
        [B, H, G, Tq, ...].
    """
    return x.unflatten(2, (k.shape[2], -1)).movedim(1, 3)


def take_heads(
    group: Group, q: Tensor, k: Tensor, v: Tensor, calibration: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gather what a group of heads works on.

    Args:
        group: rows and key heads.
        q, k, v, calibration: of all rows and heads.
    Returns:
        q [Z, G, Tq, D], k [Z, T, D], v [Z, T, Dv] and calibration [Z, G, 5].
    """
    own_q = by_head(q, k)[group].flatten(0, 1).contiguous()
    own_k, own_v = (x.transpose(1, 2)[group].flatten(0, 1).contiguous() for x in (k, v))
    scalars = calibration.unflatten(0, (k.shape[2], -1))[group[1]]
    return own_q, own_k, own_v, scalars.repeat(group[0].stop - group[0].start, 1, 1)
