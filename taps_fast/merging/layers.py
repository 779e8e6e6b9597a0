"""Layers that sum their own deltas: no merged weight and no weight's gradient is stored."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..functional import delta_conv2d, delta_linear
from .threads import Current
from .vectors import TaskVectors


class Running:
    """What the layers of a model share: its vectors, and the coefficients of the forward that is running.

    Coefficients are [L, K], or [K] for all tensors.
    """

    def __init__(self, vectors: TaskVectors) -> None:
        self.vectors, self.coefficients = vectors, Current()


class Row(NamedTuple):
    """Where a layer finds its deltas and coefficients."""

    running: Running
    tensor: int
    name: str

    @property
    def deltas(self) -> list[Tensor]:
        return self.running.vectors.deltas[self.name]

    def read(self) -> Tensor:
        table = self.running.coefficients.now
        if table is None:
            raise RuntimeError("MergedModel: a layer must run in the model's forward, got a call from outside")
        return table if table.dim() == 1 else table[self.tensor]


class MergedLinear(nn.Linear):
    """y = (weight + Σ_k c_k·deltas[k]) x + bias; the coefficients' gradients come from one weight-gradient pass."""

    row: Row

    def forward(self, input: Tensor) -> Tensor:
        return delta_linear(input, self.weight, self.row.deltas, self.row.read(), self.bias)


class MergedConv2d(nn.Conv2d):
    """The same for a convolution with zero padding."""

    row: Row

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = (self.stride, self.padding, self.dilation, self.groups)
        return delta_conv2d(input, self.weight, self.row.deltas, self.row.read(), self.bias, *conv)


def merge_in_place(module: nn.Module, row: Row) -> bool:
    """Lets a layer sum its deltas, wherever it is referred to; False for one that must be given its whole weight."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return False
    if type(module) is nn.Linear:
        module.__class__ = MergedLinear
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
        module.__class__ = MergedConv2d
    else:
        return False
    module.row = row  # type: ignore[assignment]
    return True
