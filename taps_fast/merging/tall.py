"""TALL-masks and Consensus: which elements of the sum of all deltas a task needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import MaskedDelta, one_delta, per_task
from .vectors import TaskVectors


def tall_masks(vectors: TaskVectors, lam: float | Sequence[float] | Tensor = 0.4) -> MaskedDelta:
    """W_t = W0 + m_t ∘ τ with τ = Σ_k Δ_k and m_t = [ |Δ_t| > lam_t·|τ - Δ_t| ].

    Args:
        vectors: base and K deltas.
        lam: λ_t, one number or one per task; larger keeps less. The paper chooses it on validation data between 0.2
            and 0.6.

    Returns:
        A `MaskedDelta`: one delta and a bit mask per task.

    Raises:
        ValueError: numbers that are not one per task; TypeError: no numbers.

    Cost: one pass over the deltas; then one bit per weight and task. Source: TALL-masks, arXiv 2405.07813, equation of
    the task-specific masks; the comparison is strict.

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([2.0, 0.1]), Tensor([0.0, 1.0])]}, ["a", "b"])
    >>> tall_masks(vectors).state("a")["w"]
    tensor([2., 0.])
    """
    limits = per_task(lam, vectors, "tall_masks", "lam")
    total, masks = _masks(vectors, limits)
    return MaskedDelta(one_delta(vectors, total), masks, dict.fromkeys(vectors.tasks, 1.0), vectors.own)


def consensus(
    vectors: TaskVectors, scale: float = 0.3, lam: float | Sequence[float] | Tensor = 0.4, least: int = 2
) -> dict[str, Tensor]:
    """W0 + scale·[Σ_t m_t >= least] ∘ Σ_k Δ_k: task arithmetic without what fewer than ``least`` tasks need.

    Args:
        vectors: base and K deltas.
        scale: α.
        lam: as in `tall_masks`.
        least: how many tasks must need an element.

    Returns:
        A state dict without the tasks' own tensors.

    Raises:
        ValueError: as `tall_masks`.

    Cost: one pass for the masks, one for the sum. Source: arXiv 2405.07813, Consensus Task Arithmetic (least = 2).

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([2.0, 0.1]), Tensor([2.0, 1.0])]}, ["a", "b"])
    >>> consensus(vectors, scale=0.5)["w"]
    tensor([2., 0.])
    """
    total, masks = _masks(vectors, per_task(lam, vectors, "consensus", "lam"))
    agreed = {name: torch.stack([mask[name] for mask in masks.values()]).sum(0) >= least for name in vectors.names}
    return one_delta(vectors, total).fold([scale], masks=agreed)


def _masks(vectors: TaskVectors, lam: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    total: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {task: {} for task in vectors.tasks}
    for name, deltas in vectors.deltas.items():
        total[name] = torch.stack(deltas).sum(0)
        for task, delta, l in zip(vectors.tasks, deltas, lam, strict=True):
            masks[task][name] = delta.abs() > l * (total[name] - delta).abs()
    return total, masks
