"""Heads: each task has its own, of its own width."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import delta_linear
from ..tasks import TaskBatch
from .context import Layout, Mix, TaskContext
from .per_task import PerTask, ordinary


def new_head(base: nn.Module, classes: int, path: str) -> nn.Module:
    """A fresh Linear or Conv2d like ``base`` with ``classes`` outputs."""
    if not isinstance(classes, Integral) or isinstance(classes, bool) or classes < 1:
        raise ValueError(
            f"TapsModel.add_task: classes must be a whole number of at least 1, got {classes!r} (head {path!r})"
        )
    like: dict[str, Any] = {"bias": getattr(base, "bias", None) is not None}
    if isinstance(base, nn.Linear):
        return nn.Linear(base.in_features, classes, **like, device=base.weight.device, dtype=base.weight.dtype)
    if type(base) is nn.Conv2d:
        sizes: Any = (
            base.in_channels,
            classes,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            base.groups,
        )
        like |= {"padding_mode": base.padding_mode, "device": base.weight.device, "dtype": base.weight.dtype}
        return nn.Conv2d(*sizes, **like)
    raise ValueError(
        f"TapsModel.add_task: classes must go with a Linear or Conv2d head, got {type(base).__name__} at {path!r} "
        "(pass head=, a module)"
    )


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def last_layer(module: nn.Module) -> Any:
    """The Linear or convolution that a head ends in: itself, or the last one inside; None where there is none."""
    layers = [child for child in module.modules() if isinstance(child, (nn.Linear, *CONVOLUTIONS))]
    return layers[-1] if layers else None


def class_axis(head: nn.Module, y: Tensor) -> int:
    """Which axis of a network's outputs has the classes of this head: 1 of a convolution's, else the last."""
    return 1 if isinstance(last_layer(head), CONVOLUTIONS) else y.dim() - 1


def check_head(function: str, head: object, path: str) -> None:
    """Only a module can be a head; None: there will be one."""
    if not (head is None or isinstance(head, nn.Module)):
        raise TypeError(f"{function}: head must be an nn.Module, got {head!r} (in place of {path!r})")


def width_of(module: nn.Module) -> int | None:
    """How many outputs a head has; None where that is unknown."""
    last = last_layer(module)
    width: int | None = getattr(last, "out_channels" if isinstance(last, CONVOLUTIONS) else "out_features", None)
    return width


class TaskHead(PerTask):
    """A head for each task. In a mixed batch outputs are padded with -inf to the widest head.

    -inf is what softmax, argmax and cross entropy with class indices take as "no such class". A loss that multiplies
    every output is infinite or NaN: label smoothing, soft labels, binary cross entropy. Finite padding would be wrong
    there too (label smoothing gives every class a share), so cut each task's rows to its own outputs: ``y[ids == t, :
    model.widths[task]]``.

    Linear heads run as a baked bank: one `delta_linear` for each distinct width, in which a task's "delta" is
    its whole weight and the base coefficient is 0. Other heads, and those with hooks, run task by task.

    Args:
        base, context, path: as `PerTask`.
    """

    padded = True

    def __init__(self, base: nn.Module, context: TaskContext, path: str) -> None:
        super().__init__(base, context, path)
        self.widest = width_of(base) or 0

    def add_task(self, task: str, module: nn.Module | None = None) -> None:
        super().add_task(task, module)
        # All heads count, also those of tasks that a batch lacks: its output's width must not depend on the mix.
        self.widest = max(self.widest, width_of(self.tasks[task]) or 0)

    def remove_task(self, task: str) -> None:
        super().remove_task(task)
        self.widest = max(width_of(head) or 0 for head in (self.base, *self.tasks.values()))

    @property
    def widths(self) -> dict[str, int | None]:
        """The number of outputs of each task's head."""
        return {task: width_of(self.tasks[task]) for task in self.tasks}

    def together(self, x: Tensor, mix: Mix, layout: Layout) -> Tensor | None:
        heads = self.in_order(mix.tasks)
        plain = type(self.base) is nn.Linear and ordinary(heads)
        return self._bank(x, mix.batch, layout, heads) if plain else None

    def finish(self, y: Tensor) -> Tensor:
        axis = class_axis(self.base, y)
        missing = max(self.widest - y.shape[axis], 0)
        return F.pad(y, (0, 0) * (y.dim() - 1 - axis) + (0, missing), value=-torch.inf)

    def _bank(self, x: Tensor, batch: TaskBatch, layout: Layout, heads: list[Any]) -> Tensor:
        widths = [head.out_features for head in heads]
        widest, count = self.widest, len(heads) - 1
        spread = layout.spread(batch, x.shape[layout.axis], self.path)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        one_hot = torch.eye(count, dtype=wide, device=x.device)
        total: Tensor | None = None
        for width in sorted(set(widths)):
            members = [t for t in range(count) if widths[t + 1] == width]
            like = next(head.weight for head, w in zip(heads, widths, strict=True) if w == width)
            # Rows of other widths, and of the base where its width is another, must add nothing here.
            base = heads[0].weight if widths[0] == width else like.new_zeros(1, 1).expand(width, like.shape[1])
            y = delta_linear(
                x,
                base,
                [heads[t + 1].weight for t in members],
                _columns(one_hot, members),
                _bias_table(heads, widths, width, like),
                tasks=spread,
                base_coeffs=one_hot.new_zeros(count),
                pairs=[(t, k) for k, t in enumerate(members)],
                batch_dim=layout.axis,
            )
            y = F.pad(y, (0, widest - width))
            total = y if total is None else total + y
        assert total is not None
        if min(widths) < widest:
            outside = torch.stack([_outside(width, widest, total) for width in widths])
            total = total + layout.gather(outside, batch, total, self.path)
        return total

    @property
    def how(self) -> str:
        return "one per task; mixed batches pad with -inf to the widest"


def _columns(table: Tensor, members: list[int]) -> Tensor:
    if len(members) == len(table):
        return table
    if not members:
        return table.new_zeros(table.shape[0], 0)
    return torch.stack([table[:, t] for t in members], 1)


def _outside(width: int, widest: int, like: Tensor) -> Tensor:
    """[widest]: 0 for a head's own outputs, -inf beyond them."""
    return F.pad(like.new_zeros(width), (0, widest - width), value=-torch.inf)


def _bias_table(heads: list[Any], widths: list[int], width: int, like: Tensor) -> Tensor | None:
    """[T + 1, width], the base's row last, as `delta_linear` takes it; zeros for heads of other widths."""
    if all(head.bias is None for head in heads):
        return None
    rows = [
        head.bias if w == width and head.bias is not None else like.new_zeros(width)
        for head, w in zip(heads, widths, strict=True)
    ]
    return torch.stack([*rows[1:], rows[0]])
