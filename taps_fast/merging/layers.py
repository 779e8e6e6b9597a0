"""Layers that sum their own deltas: no merged weight and no weight's gradient is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..functional import delta_conv2d, delta_linear


class Running:
    """The coefficients of the forward that is running: [L, K], or [K] for all tensors."""

    table: Tensor | None = None


class Row(NamedTuple):
    """Where a layer finds its coefficients."""

    running: Running
    tensor: int

    def read(self) -> Tensor:
        table = self.running.table
        if table is None:
            raise RuntimeError("MergedModel: a layer must run in the model's forward, got a call from outside")
        return table if table.dim() == 1 else table[self.tensor]


class MergedLinear(nn.Module):
    """y = (weight + Σ_k c_k·deltas[k]) x + bias; the coefficients' gradients come from one weight-gradient pass."""

    def __init__(self, plain: nn.Linear, deltas: Sequence[Tensor], row: Row) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._deltas, self._row = list(deltas), row

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.weight, self._deltas, self._row.read(), self.bias)


class MergedConv2d(nn.Module):
    """The same for a convolution with zero padding."""

    def __init__(self, plain: nn.Conv2d, deltas: Sequence[Tensor], row: Row) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self._how = (plain.stride, plain.padding, plain.dilation, plain.groups)
        self._deltas, self._row = list(deltas), row

    def forward(self, x: Tensor) -> Tensor:
        return delta_conv2d(x, self.weight, self._deltas, self._row.read(), self.bias, *self._how)


def merged_layer(module: nn.Module, deltas: Sequence[Tensor], row: Row) -> nn.Module | None:
    """What takes the place of a layer; None for a module that must be given its whole weight."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return None
    if type(module) is nn.Linear:
        return MergedLinear(module, deltas, row)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        return MergedConv2d(module, deltas, row)
    return None
