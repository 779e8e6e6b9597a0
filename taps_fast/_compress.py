"""What `TapsModel.compress` does, and the report it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._names import counted
from .formats import Format, check_format, compress
from .sharing import readable_bytes

if TYPE_CHECKING:
    from .model import TapsModel


@dataclass(frozen=True)
class LayerCompression:
    """One layer's delta."""

    path: str
    error: float
    """‖Δ - Δ'‖ / ‖Δ‖."""
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, repr=False)
class Compression:
    """What `TapsModel.compress` measured; ``print`` shows it.

    Attributes:
        task, format: what was compressed, into what.
        layers: those whose delta was replaced.
        kept: the paths of open layers whose dense delta is as small.
        output_change: ‖y - y'‖ / ‖y‖ of the model's output for the inputs given; None without inputs.
    """

    task: str
    format: str
    layers: list[LayerCompression]
    kept: list[str]
    output_change: float | None = None

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=0)
        lines = [
            f"{layer.path:<{width}}  error {layer.error:7.2%}  {readable_bytes(layer.bytes_before):>8} -> "
            f"{readable_bytes(layer.bytes_after)}"
            for layer in self.layers
        ]
        total = (
            f"{self.task} as {self.format}: {counted(len(self.layers), 'layer')}, "
            f"{readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}"
        )
        if self.kept:
            total += f"; kept dense, which is as small: {', '.join(self.kept)}"
        if self.output_change is not None:
            total += f"; output changed by {self.output_change:.2%}"
        return "\n".join([*lines, total])

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows


def compress_task(model: TapsModel, task: str, format: str, rank: int | None, inputs: Tensor | None) -> Compression:
    check_format("TapsModel.compress: format", format, rank)
    found: dict[str, tuple[Format, LayerCompression]] = {}
    kept: list[str] = []
    before = None if inputs is None else _output(model, task, inputs)
    for path, layer in model.conversion.layers.items():
        if not layer.is_open(task):
            continue
        delta = layer.delta(task)
        if isinstance(delta, Format):
            raise ValueError(
                f"TapsModel.compress: the delta of {path!r} must be dense, got one in {delta.name!r} already"
            )
        try:
            small = compress(delta, format, rank=rank)
        except ValueError as error:
            raise ValueError(f"TapsModel.compress: layer {path!r}: {error}") from None
        if small.bytes >= delta.nbytes:
            kept.append(path)
            continue
        found[path] = small, LayerCompression(path, small.error(delta), delta.nbytes, small.bytes)
    for path, (small, _) in found.items():
        model.conversion.layers[path].set_delta(task, small)
    change = None
    if before is not None and inputs is not None:
        change = float((_output(model, task, inputs) - before).norm() / before.norm())
    return Compression(task, format, [record for _, record in found.values()], kept, change)


def _output(model: TapsModel, task: str, inputs: Tensor) -> Tensor:
    """Every number of it, [n], in eval mode, without gradients."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            y = model(inputs, tasks=task)
    finally:
        for module in training:
            module.training = True
    found = [t.double().flatten() for t in tree_leaves(y) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise ValueError(f"TapsModel.compress: inputs must be given for an output with tensors, got {type(y).__name__}")
    return torch.cat(found)
