"""Running statistics of a model that several processes train: each has moved its own, by its own batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .nn.norm import STATISTICS
from .nn.per_task import PerTask

if TYPE_CHECKING:
    from ._running import RunningModel


@torch.no_grad()
def share(model: RunningModel, group: Any = None) -> None:
    """What `TapsModel.share_statistics` does: one sum over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    located = [module for module in model.conversion.located().values() if isinstance(module, PerTask)]
    norms, counts, weighted = [], [], []
    for module in located:
        for task in module.tasks:
            for name, norm in module.counting(task).items():
                now = norm.num_batches_tracked
                count = now - module.agreed.get(name, torch.zeros_like(now)).to(now.device)
                norms.append(norm)
                counts.append(count)
                weighted += [count * norm._buffers[name].double() for name in STATISTICS]
    if not norms:
        return
    total = torch.cat([torch.stack(counts).double(), *weighted])
    dist.all_reduce(total, group=group)
    batches, *sums = torch.split(total, [len(norms), *map(len, weighted)])
    for i, (norm, mine, all_batches) in enumerate(zip(norms, counts, batches, strict=True)):
        for name, summed in zip(STATISTICS, sums[2 * i : 2 * i + 2], strict=True):
            value = norm._buffers[name].data
            value.copy_(torch.where(all_batches > 0, summed / all_batches, value))
        norm.num_batches_tracked.data += all_batches.to(torch.int64) - mine
    for module in located:
        module.agree(*module.tasks)
