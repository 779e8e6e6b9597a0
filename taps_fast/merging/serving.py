"""Task vectors as a `TapsModel`: every task's own weights in one mixed batch, and no merged weight stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..model import TapsModel
from ..nn.layer import TapsLayer
from .merged import adopt, own_head, place_of
from .vectors import TaskVectors

DeltaOf = Callable[[str, str], Tensor]
"""The dense delta of a tensor for a task, both by name."""


def taps_model(
    model: nn.Module,
    vectors: TaskVectors,
    tasks: list[str],
    delta_of: DeltaOf,
    head: str | None = None,
    set_weight: Callable[[TapsLayer, str, str], None] | None = None,
) -> TapsModel:
    """A `TapsModel` in which task t's weights are base + delta_of(·, t), with its norms and head, in eval mode.

    Args:
        model: of the base's architecture; its parameters are not copied.
        vectors: whose base it is, with the tasks'
            own tensors. tasks: their names. head: as in `MergedModel`.
        delta_of: deltas that are not copied.
        set_weight: called as ``set_weight(layer, name, task)`` for a layer's
            weight instead, where it takes another form.

    Raises:
        ValueError: a merged tensor that belongs to no layer or norm, in which tasks can differ.
    """
    network = TapsModel(model, head=head)
    adopt(network, vectors)  # first, because norms of tasks start as copies
    for task in tasks:
        network.add_task(task, head=None if head is None else own_head(network, vectors, task), deltas=False)
    for name in vectors.names:
        path, module, last = place_of(network, name, vectors.base[name])
        norm = network.conversion.norms.get(path.removesuffix("base").removesuffix("."))
        if not isinstance(module, TapsLayer) and norm is None:
            raise ValueError(
                f"taps_model: every tensor must be of a layer or norm, in which tasks differ, got {name!r}"
            )
        for task in tasks:
            if norm is not None:
                getattr(norm.tasks[task], last).data.copy_(vectors.base[name] + delta_of(name, task))
            elif isinstance(module, TapsLayer):
                _open(module, task)
                if last == "base" and set_weight is not None:
                    set_weight(module, name, task)
                else:
                    owned = module.deltas if last == "base" else module.bias_deltas
                    owned[task] = nn.Parameter(delta_of(name, task), False)
    network.requires_grad_(False)
    return network.eval()


def _open(layer: TapsLayer, task: str) -> None:
    """A gate that is open whatever the threshold, over a zero delta that is one element."""
    if task not in layer.deltas:
        layer.scores[task].data.fill_(1.0)
        layer.deltas[task] = nn.Parameter(layer.base.new_zeros(()).expand_as(layer.base), False)
        if layer.base_bias is not None:
            layer.bias_deltas[task] = nn.Parameter(torch.zeros_like(layer.base_bias), False)
