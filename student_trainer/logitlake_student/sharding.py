"""A student whose weights, gradients and optimiser state are spread over the ranks (PyTorch's FSDP2), and a state that
does not show it.

What a checkpoint holds is whole, by the names of the parameters: one process, ranks with a copy each and ranks with a
part each go on from one another's.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from logitlake_student.models.parts import decoder, vision_parameters

__all__ = ["copy_whole", "load_optimizer_state", "optimizer_state", "shard", "whole"]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(step: nn.Module, student: Any, device: str) -> None:
    """Spreads `step`, whose student is `student`, over all ranks, layer by layer.

    The vision tower never trains and is not called by a rank whose samples hold no image, so each rank keeps all of it.
    """
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in decoder(student).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(step, mesh=mesh, ignored_params=set(vision_parameters(student)))


@torch.no_grad()
def whole(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, those that are spread over the ranks put together. Every rank calls it.

    A tensor that goes by two names is one tensor in the result, too.
    """
    made: dict[int, Tensor] = {}
    result = {}
    for name, tensor in named:
        if id(tensor) not in made:
            made[id(tensor)] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        result[name] = made[id(tensor)]
    return result


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)`, of which each rank takes its part."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def optimizer_state(step: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by the parameters' names. Every rank calls it; only the first is sure to get it."""
    return get_optimizer_state_dict(step, optimizer, options=_WHOLE)


def load_optimizer_state(step: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes it up again. Every rank calls it with the same state."""
    set_optimizer_state_dict(step, optimizer, state, options=StateDictOptions(full_state_dict=True))
