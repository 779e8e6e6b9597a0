"""Layers and norms with what follows them folded in: how a prepared model runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..norms import scale_shift
from .context import Selection

if TYPE_CHECKING:
    from .layer import TapsLayer
    from .norm import TaskBatchNorm

Tables = tuple[Tensor | None, Tensor | None]
"""scale, shift: [C], or [T + 1, C] with the base's row last."""


class Epilogue:
    """y -> act(scale[t]·y + shift[t]), of every selection, made once.

    Args:
        norm: the batch norm that follows, in eval mode; None: none does.
        activation: "relu", "relu6", "silu", "gelu" or None.
        tasks: names; a task's place is its id.
    """

    def __init__(self, norm: TaskBatchNorm | None, activation: str | None, tasks: Sequence[str]) -> None:
        self.activation = activation
        self.mixed: Tables = (None, None)
        self.single: dict[str | None, Tables] = dict.fromkeys((*tasks, None), self.mixed)
        if norm is not None:
            scales, shifts = (torch.stack(rows) for rows in zip(*(_tables(norm, t) for t in self.single), strict=True))
            self.mixed = scales, shifts
            self.single = dict(zip(self.single, zip(scales, shifts, strict=True), strict=True))

    def options(self, selection: Selection) -> dict[str, Any]:
        """The arguments that `delta_linear`, `delta_conv2d` and `scale_shift` take for it."""
        scale, shift = self.single[selection.task] if selection.mixed is None else self.mixed
        return {"scale": scale, "shift": shift, "activation": self.activation}

    @property
    def bytes(self) -> int:
        return sum(table.nbytes for table in self.mixed if table is not None)


def _tables(norm: TaskBatchNorm, task: str | None) -> tuple[Tensor, Tensor]:
    """What an evaluated batch norm is: weight / √(var + eps), and what remains."""
    own: Any = norm.of(task)
    wide = torch.promote_types(own.running_mean.dtype, torch.float32)
    scale = (own.running_var.detach().double() + own.eps).rsqrt()
    scale = scale if own.weight is None else scale * own.weight.detach().double()
    shift = -own.running_mean.detach().double() * scale
    shift = shift if own.bias is None else shift + own.bias.detach().double()
    return scale.to(wide), shift.to(wide)


class FoldedLayer(nn.Module):
    """An adapted layer, then its norm and activation, in one call."""

    def __init__(self, layer: TapsLayer, after: Epilogue) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, after=self.after)
        return y


class FoldedNorm(nn.Module):
    """A batch norm and its activation in one pass."""

    def __init__(self, norm: TaskBatchNorm, after: Epilogue) -> None:
        super().__init__()
        self.norm, self.after = norm, after

    def forward(self, x: Tensor) -> Tensor:
        selection = self.norm.selected() if self.norm.tasks else Selection()  # shared, it asks nobody's axis
        options, mix = self.after.options(selection), selection.mixed
        if mix is not None:
            layout = self.norm.layout(x, mix.batch)
            options["tasks"] = layout.spread(mix.batch, x.shape[layout.axis], self.norm.path)
        return scale_shift(x, **options)
