"""The processes of a training: one, or those that torchrun started, which share the batches of every step.

Gradients are added up here and not by DistributedDataParallel, which hooks the forward of one module, where a lesson
runs a head's parts several times over, and takes means of processes in the weights' own dtype, where rows are to weigh
alike whoever has how many of them, and bf16 weights learn by fp32 sums.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: As long as the first process may be alone at work, generating answers, say.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: 0 is the one that writes and prints.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def now(cls) -> "Ranks":
        """As torch.distributed has them, if it was started."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Makes every tensor the sum of all processes' tensors, in place; they are of one dtype and device."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def told(self, value: Any) -> list[Any]:
        """What every process has to say, by rank."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said


def start_ranks(device: str | None) -> tuple[Ranks, str | None]:
    """Joins the processes that torchrun started, if it did.

    Returns:
        which this one is, and its device: of GPUs every process has its own.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return Ranks.now(), device
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    return Ranks.now(), f"cuda:{local}" if on_gpu else "cpu"
