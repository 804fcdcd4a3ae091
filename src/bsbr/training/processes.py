"""One process or several: who we are, how weights are shared out, and how what is spread is made whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsbr.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, as `accelerate launch` and `torchrun` number them."""

    rank: int = 0
    """Number of this process."""
    world: int = 1
    """How many there are."""

    @property
    def first(self) -> bool:
        """This one writes files and speaks."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Rows of a batch of `count` that are this process's."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def agree(self, value: float, device: torch.device) -> float:
        """Return the first process's value on every process."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, 0)
        return shared.item()

    def anyone(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set on any process."""
        if self.world == 1:
            return flag
        shared = torch.tensor([float(flag)], device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over processes, for tensors that no weight depends on."""
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the other processes of a run, if there are any, and leave them at the end.

    Args:
        device: what they compute on; decides between gloo and NCCL.
    Yields:
        This process among them.
    Raises:
        UserError: a launcher's environment variables are not complete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        raise UserError(f"several processes: {error}. Start them with accelerate launch or torchrun") from error
    try:
        yield Processes(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU where several processes share a machine.

    Args:
        device: as the user named it.
    Returns:
        The device; on CUDA with the number the launcher gave.
    """
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def spread(model: nn.Module, processes: Processes, device: torch.device) -> None:
    """Share out weights, gradients and optimizer state over the processes, with FSDP2.

    Source: `torch.distributed.fsdp.fully_shard`: each block is a unit, the rest another.

    Args:
        model: the same on every process; changed in place.
        processes: all of them.
        device: of the model.
    """
    if processes.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of every process; all processes must ask. Without several it is the tensor."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def fill(place: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over processes."""
    place.copy_(like(value, place))


def like(value: Tensor, place: Tensor) -> Tensor:
    """Return a whole tensor on another's device and, where that is spread over processes, spread the same way."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(place, DTensor) and value.shape == place.shape:
        return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)
    return value.to(place.device, copy=True)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda modules: len(list(modules)))) if lists else []
