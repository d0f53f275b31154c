"""Batch statistics of several processes, as `nn.SyncBatchNorm` takes them.

Each process gives what it found in its rows. All is gathered, and every process merges it by the same operators, which
add in a fixed order: the same bits in each, and from run to run. A reduction by the collective itself would promise
neither. What is gathered is float64. It is a few numbers per channel, and neither a count of rows nor a merge of large
means loses a digit there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def group_of(bn: nn.SyncBatchNorm) -> str:
    """The name of the process group whose statistics the module shares in training; "" where it is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.__dict__["process_group"] or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _gathered(values: Tensor, rows: int, group: str) -> Tensor:
    """(processes, n + 1) float64: the values (n,) of each process and its rows."""
    own = torch.cat((values.double(), values.new_full((1,), rows, dtype=torch.float64)))
    members = dist.distributed_c10d._resolve_process_group(group)
    gathered = own.new_empty(members.size() * own.numel())
    # Newer releases warn of the older name.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(gathered, own, group=members)
    return gathered.view(members.size(), -1)


def merge_moments(mean: Tensor, variance: Tensor, rows: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, rows) of all processes, (C,), (C,) and () float64, by Chan's formula.

    A variance is M2 over the rows. A process without rows gives zeros.
    """
    C = mean.numel()
    means, variances, counts = _gathered(torch.cat((mean, variance)), rows, group).split((C, C, 1), 1)
    total = counts.sum()
    shares = counts / total
    merged = (means * shares).sum(0)
    step = means - merged
    return merged, (torch.addcmul(variances, step, step) * shares).sum(0), total


def merge_sums(sums: Tensor, rows: int, group: str) -> Tensor:
    """The sums (n, C) over the rows of all processes, times this one's share of the rows.

    Divided by the rows of this process, as what reads them does, they are the means over all rows.
    """
    total, count = _gathered(sums.flatten(), rows, group).sum(0).split((sums.numel(), 1))
    return (total * (rows / count)).view(sums.shape).to(sums.dtype)
