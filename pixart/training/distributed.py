"""Many processes: which batches, weights and tokens each has, and what they agree on."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pixart.model import Block, PixArt
from pixart.training.recipe import Parallel


def check_started(found: int) -> None:
    """Raises RuntimeError where more processes were started than have found each other."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > found:
        raise RuntimeError(
            f"{started} processes were started, and each would work alone: without a GPU, set "
            "ACCELERATE_USE_CPU=true"
        )


class Processes:
    """This process among those of a run; alone where no process group is initialised.

    Raises ValueError where the number of processes does not suit ``parallel``.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.count > 1 else 0
        if self.count % parallel.sequence:
            raise ValueError(
                f"parallel.sequence is {parallel.sequence}, which does not divide the "
                f"{self.count} processes that were started"
            )
        # processes that share the tokens of a picture have the same batches
        self.streams = self.count // parallel.sequence
        self.stream = self.rank // parallel.sequence
        # on the host, so that agreeing does not wait for a GPU; a group of its own for what is
        # saved in another thread meanwhile. Also of one process: its default may be nccl alone
        together = dist.is_initialized()
        self.agreeing = dist.new_group(backend="gloo") if together else None
        self.saving = dist.new_group(backend="gloo") if together else None

    @property
    def sharded(self) -> bool:
        return self.parallel.strategy == "fsdp" and self.count > 1

    def total(self, *values: float) -> list[float]:
        """Sums over all processes. All must call it."""
        if self.agreeing is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.agreeing)
        return sums.tolist()

    def wait(self) -> None:
        if self.agreeing is not None:
            dist.barrier(group=self.agreeing)


def share_tokens(module: nn.Module, processes: int) -> None:
    """Makes each picture's tokens those of so many processes together."""
    if processes == 1:
        return
    if not isinstance(module, PixArt):
        raise ValueError("parallel.sequence: only a PixArt's tokens can be shared")
    group, _ = dist.new_subgroups(processes)
    module.share_tokens(group)


# what is in a view here is nowhere changed in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def shard(module: nn.Module, device: torch.device, mixed_precision: str) -> None:
    """Shares the weights out over all processes with FSDP2, in place; parameter names stay.

    Each PixArt block is gathered when it runs, and what is left with the whole module.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # a block is gathered in the type that autocast would give it, as autocast keeps its copies
    # until the backward. What is left stays float32, and with it the residual stream
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in list(module.modules()):
        if isinstance(block, Block):
            block.register_forward_hook(_lend_modulation)
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def _lend_modulation(_block: nn.Module, _inputs: Any, output: Any) -> Any:
    # the next block adds this one's MLP, gated by this one's table, which is freed by then
    x, pending = output
    if pending is None:
        return output
    mlp, (table, t) = pending
    return x, (mlp, (table.clone(), t.clone()))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def seed_batch(seed: int, index: int) -> None:
    """Seeds what is drawn for the ``index``-th batch of a run: noise, timesteps, dropout.

    It depends on nothing else, so that a run draws the same however many processes share its
    batches, and however often it was resumed.
    """
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
