"""What ranks tell each other in a step. World size 1 is an implementation, not an `if`."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dlrm_xla.specs import UserError


class Collectives(Protocol):
    """All ranks call the same methods in the same order with tensors of the same shapes.

    rank, world  this rank's number, from 0, and how many there are
    """

    rank: int
    world: int

    def all_to_all(self, values: Tensor) -> Tensor:
        """[world, ...] -> [world, ...]: piece w goes to rank w; piece w of the result came from rank w."""

    def all_gather(self, values: Tensor) -> Tensor:
        """[n, ...] -> [world x n, ...], rank after rank."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each. `values` may be overwritten."""

    def sum_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """all_reduce of many float32 tensors at the price of one."""


class Alone:
    """One rank: every exchange is with itself."""

    rank, world = 0, 1

    def all_to_all(self, values: Tensor) -> Tensor:
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        return values

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def sum_all(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors


class Together:
    """What collectives of several ranks share."""

    def sum_all(self, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        summed = self.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        pieces = summed.split([tensor.nelement() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


class TorchCollectives(Together):
    """torch.distributed over gloo (CPU) or nccl (CUDA); the process group is there already."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_to_all(self, values: Tensor) -> Tensor:
        values = _checked(values)
        received = values.new_empty(values.shape)
        dist.all_to_all_single(received, values)
        return received

    def all_gather(self, values: Tensor) -> Tensor:
        values = _checked(values)
        gathered = values.new_empty((self.world * values.shape[0], *values.shape[1:]))
        dist.all_gather_into_tensor(gathered, values)
        return gathered

    def all_reduce(self, values: Tensor) -> Tensor:
        values = _checked(values)
        dist.all_reduce(values)
        return values


def _checked(values: Tensor) -> Tensor:
    """gloo leaves a tensor on XLA as it is, without a word."""
    if values.device.type == "xla":
        raise UserError("--device=xla: torch.distributed does not reach tensors on XLA; start with xla_spawn, not torchrun (docs/distributed.md)")
    return values.contiguous()
