"""FSDP2: ranks share weights, gradients and what the optimiser keeps of them, and gather the weights for each step.

From a step's first pass to the end of its last backward pass every rank has all weights, as with DDP, and gradients are
averaged over ranks once. So what is saved is memory between steps: with W ranks, what a parameter takes of it is
16 / W bytes (weight, gradient, two moments) and 8 while passes are made, where DDP takes 16.

Gathering block by block, and again in the backward pass, would save more. But ranks make different passes, since one
whose batch lacks a modality makes fewer, and a collective in each would wait for others that never come; and a step
makes several passes through each block, every one of which would send the block's weights twice and its gradients once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class Sharded(nn.Module):
    """A module of whose parameters each rank keeps a part; a call of it is one of the module with all of them.

    Parameters are DTensors, split along their first dimension, but for the time of `gathered` and from a call until its
    backward pass is done, when they are plain tensors. Gradients are means over ranks, in the parameters' precision.

    Attributes:
        module: with its names and everything else as it was.
    """

    def __init__(self, module: nn.Module, device: str) -> None:
        """All ranks make it together, of modules that are alike.

        Args:
            module: on its device.
            device: type of that device.
        """
        super().__init__()
        self.module = module
        # As one group, which is gathered once however many passes are made.
        fully_shard(self, mesh=init_device_mesh(device, (dist.get_world_size(),)), reshard_after_forward=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outcome."""
        # In one piece: FSDP would move every tensor that it finds to the device, also those that say which rows of a
        # batch are whose and are read on the CPU.
        return super().__call__(partial(self.module, *args, **kwargs))

    def forward(self, call: Any) -> Any:
        """What FSDP wraps: the weights are there."""
        return call()


def bare_of(model: nn.Module) -> Any:
    """The module itself, however ranks share it."""
    return model.module if isinstance(model, Sharded | DistributedDataParallel) else model


def gather(model: nn.Module) -> None:
    """Get all weights, until the coming backward pass is done; all ranks call it. Nothing where they are there."""
    if isinstance(model, FSDPModule):
        model.unshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it the module itself can be used, and all weights are there; all ranks enter it."""
    gather(model)
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes within it add up gradients on each rank; the next one after it averages the sums."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        set_sync(model, False)
        try:
            yield
        finally:
            set_sync(model, True)
    else:
        yield


def set_sync(model: FSDPModule, sync: bool) -> None:
    """Whether a backward pass ends with gradients averaged and weights given back, or leaves both as they are."""
    model.set_requires_gradient_sync(sync)
    model.set_reshard_after_backward(sync)


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that ranks share, which all then call it for; another as it is."""
    if isinstance(value, DTensor):
        whole: Tensor = value.full_tensor()
        return whole
    return value


def shared_like(value: Tensor, example: Tensor) -> Tensor:
    """This rank's part of what all have whole, if that is how the example is shared."""
    if isinstance(example, DTensor) and value.shape == example.shape:
        place = value.to(example.device)
        return distribute_tensor(place, example.device_mesh, example.placements, src_data_rank=None)
    return value


def load_shared(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` from tensors that all ranks have whole.

    Raises:
        RuntimeError: they don't fit.
    """
    own = module.state_dict()
    module.load_state_dict({name: shared_like(each, own.get(name, each)) for name, each in tensors.items()})
