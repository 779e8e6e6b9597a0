"""Layers that sum their own deltas: no merged weight and no weight's gradient is stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..functional import delta_conv2d, delta_linear
from .vectors import TaskVectors


class Running:
    """What the layers of a model share: its vectors, and the coefficients of the forward that is running."""

    table: Tensor | None = None
    """[L, K], or [K] for all tensors."""

    def __init__(self, vectors: TaskVectors) -> None:
        self.vectors = vectors


class Row(NamedTuple):
    """Where a layer finds its deltas and coefficients."""

    running: Running
    tensor: int
    name: str

    @property
    def deltas(self) -> list[Tensor]:
        return self.running.vectors.deltas[self.name]

    def read(self) -> Tensor:
        table = self.running.table
        if table is None:
            raise RuntimeError("MergedModel: a layer must run in the model's forward, got a call from outside")
        return table if table.dim() == 1 else table[self.tensor]


class MergedLinear(nn.Module):
    """y = (weight + Σ_k c_k·deltas[k]) x + bias; the coefficients' gradients come from one weight-gradient pass."""

    def __init__(self, plain: nn.Linear, row: Row) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._row = row

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.weight, self._row.deltas, self._row.read(), self.bias)


class MergedConv2d(nn.Module):
    """The same for a convolution with zero padding."""

    def __init__(self, plain: nn.Conv2d, row: Row) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._how = (plain.stride, plain.padding, plain.dilation, plain.groups)
        self._row = row

    def forward(self, x: Tensor) -> Tensor:
        return delta_conv2d(x, self.weight, self._row.deltas, self._row.read(), self.bias, *self._how)


def merged_layer(module: nn.Module, row: Row) -> nn.Module | None:
    """What takes the place of a layer; None for a module that must be given its whole weight."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return MergedLinear(module, row)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        return MergedConv2d(module, row)
    return None
