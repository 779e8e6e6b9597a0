"""`MaskedDelta`: one delta for all tasks, of which each task takes the elements that its bit mask names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .vectors import TaskVectors, copies


class MaskedDelta:
    """W_t = W0 + scales[t]·masks[t] ∘ Δ: what TALL-masks and EMR store, one bit per weight for each further task.

    Attributes:
        vectors: the base and the one delta, as `TaskVectors` of K = 1.
        masks: bool tensors by task and name.
        scales: one number for each task.
        own: the tensors of each task that are not merged.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        masks: Mapping[str, Mapping[str, Tensor]],
        scales: Mapping[str, float],
        own: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        self.vectors = vectors
        self.masks = {task: dict(mask) for task, mask in masks.items()}
        self.scales, self.own = dict(scales), {task: dict(mine) for task, mine in own.items()}

    @property
    def tasks(self) -> list[str]:
        return list(self.masks)

    def state(self, task: str) -> dict[str, Tensor]:
        """The state dict of one task, with its own tensors: one pass over base, delta and mask."""
        if task not in self.masks:
            raise ValueError(f"MaskedDelta: task must be one of {', '.join(self.masks)}, got {task!r}")
        return self.vectors.fold([self.scales[task]], masks=self.masks[task]) | copies(self.own[task])

    def bytes(self) -> int:
        """What it stores when masks are packed to bits: base, delta, masks."""
        count = sum(self.vectors.base[n].numel() for n in self.vectors.names)
        dense = sum(t.nbytes for t in self.vectors.base.values())
        dense += sum(t.nbytes for deltas in self.vectors.deltas.values() for t in deltas)
        return dense + len(self.masks) * -(-count // 8)


def one_delta(vectors: TaskVectors, deltas: Mapping[str, Tensor]) -> TaskVectors:
    """The base with one delta for all tasks."""
    return TaskVectors(vectors.base, {name: [delta] for name, delta in deltas.items()}, ["shared"])


def per_task(value: float | Sequence[float] | Tensor, vectors: TaskVectors, owner: str, name: str) -> list[float]:
    """One number for each task."""
    try:
        given = torch.as_tensor(value, dtype=torch.float64).tolist()
        values = [float(v) for v in given] if isinstance(given, list) else [given] * len(vectors)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or a table of them
        raise TypeError(f"{owner}: {name} must be one number or {len(vectors)}, got {value!r}") from None
    if len(values) != len(vectors):
        raise ValueError(f"{owner}: {name} must be one number or {len(vectors)}, got {len(values)}")
    return values
