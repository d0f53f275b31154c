"""The processes of one training run, as torchrun starts them; a run without it has one.

Each process knows the whole order of images and takes its share of every batch, so that a batch is the same images
however many processes there are. What ends a run early is agreed on: none waits for a collective that another one will
not reach.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet.kernels.host.command import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """As torchrun says it to each process; ConfigError where what it says is no place."""
        if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
            return cls()
        said = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE")}
        # Other launchers say no more where there is one machine.
        for local, whole in (("LOCAL_RANK", "RANK"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
            said[local] = os.environ.get(local) or said[whole]
        try:
            ranks = cls(*map(int, said.values()))
            possible = 0 <= ranks.local_rank <= ranks.rank < ranks.size and ranks.local_rank < ranks.local_size
        except ValueError:
            possible = False
        if not possible:
            found = " ".join(f"{name}={value}" for name, value in said.items())
            raise ConfigError(f"environment: expected a process's place, as torchrun gives it, got {found}")
        return ranks

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Inside, there is a process group: the caller's, or one that lasts as long.

        ConfigError where the caller's has no tensors of the CPU, on which processes agree.
        """
        if self.size == 1:
            yield
            return
        if dist.is_initialized():
            backends = dist.get_backend_config()
            if "cpu:" not in backends:
                raise ConfigError(f"process group: expected a backend for the CPU too, as cpu:gloo is, got {backends}")
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    # ---- data ----------------------------------------------------------------------------------------------------

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch. Parts follow each other in the order of ranks, and differ by one image."""
        return index.tensor_split(self.size)[self.rank]

    def parallel(self, net: nn.Module, device: torch.device) -> nn.Module:
        """What trains `net`: gradients are averaged over the processes, and the first one's buffers are everyone's."""
        if self.size == 1:
            return net
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)

    def sum_(self, *tensors: Tensor) -> None:
        """Puts the sums over all processes into the tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Puts the first process's values into the tensors of all."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    # ---- agreement -----------------------------------------------------------------------------------------------

    def highest(self, *numbers: int) -> list[int]:
        """Each number's highest value in any process; the device is not waited for."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def alike(self, work: Callable[[], T], *errors: type[Exception]) -> T:
        """What `work` returns. One of `errors` in any process becomes one in each, that of the lowest rank."""
        if self.size == 1:
            return work()
        result = failure = None
        try:
            result = work()
        except errors as error:
            failure = error
        found: list = [None] * self.size
        dist.all_gather_object(found, failure and (type(failure), str(failure)))
        for rank, error in enumerate(found):
            if error is None:
                continue
            kind, message = error
            if rank == self.rank:
                raise failure
            raise kind(message if rank == 0 else f"{message} (in process {rank})")
        return result

    def after_first(self, work: Callable[[], T]) -> T:
        """What `work` returns. The first process of a machine does it alone, and leaves the others its files."""
        if self.local_rank:
            self.highest(0)  # waits for all
        try:
            return work()
        finally:
            if not self.local_rank:
                self.highest(0)


ALONE = Ranks()
