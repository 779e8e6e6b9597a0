"""Task arithmetic: the deltas are added with one scale."""

from __future__ import annotations

from torch import Tensor

from .vectors import TaskVectors


def task_arithmetic(vectors: TaskVectors, scale: float = 0.3) -> dict[str, Tensor]:
    """W0 + scale·Σ_k Δ_k.

    Args:
        vectors: base and K deltas.
        scale: λ, one number for all tensors and tasks.

    Returns:
        A state dict without the tasks' own tensors.

    Cost: one pass over base and deltas. Source: Task arithmetic, arXiv 2212.04089, section 2 (addition); 0.3 is where
    its eight-task sums are usually best.

    >>> vectors = TaskVectors({"w": Tensor([0.0, 1.0])}, {"w": [Tensor([1.0, 0.0]), Tensor([1.0, 2.0])]}, ["a", "b"])
    >>> task_arithmetic(vectors, 0.5)["w"]
    tensor([1., 2.])
    """
    return vectors.fold(scale)
