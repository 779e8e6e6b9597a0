"""TIES: deltas trimmed to their largest elements, one sign elected for each, and the mean of those that agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .vectors import TaskVectors


def ties(vectors: TaskVectors, scale: float = 1.0, density: float = 0.2) -> dict[str, Tensor]:
    """W0 + scale·τ, τ the mean of the trimmed deltas whose sign is that of their sum.

    ::

        Δ̂_k = Δ_k where |Δ_k| is among the task's largest ``density``, else 0
        γ   = sign(Σ_k Δ̂_k)                          0 where they cancel
        τ   = Σ_k Δ̂_k·[sign Δ̂_k = γ] / max(1, Σ_k [sign Δ̂_k = γ ≠ 0])

    Args:
        vectors: base and K deltas.
        scale: λ.
        density: the share of a whole task's elements that is kept, in (0, 1].

    Returns:
        A state dict without the tasks' own tensors.

    Raises:
        ValueError: a density outside (0, 1].

    Cost: a selection in each task's elements (memory: one delta more), then one pass. Source: TIES-Merging, arXiv
    2306.01708, algorithm 1. Where a sum is exactly 0 the published code takes the majority's sign; here nothing is
    added.

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([2.0, 3.0]), Tensor([-5.0, 5.0])]}, ["a", "b"])
    >>> ties(vectors, density=1.0)["w"]
    tensor([-5.,  4.])
    """
    limits = thresholds(vectors, density)

    def merge(name: str, deltas: list[Tensor]) -> list[Tensor]:
        kept = [trim(delta, limit) for delta, limit in zip(deltas, limits, strict=True)]
        sign = torch.stack(kept).sum(0).sign()
        agree = [(delta.sign() == sign) & (sign != 0) for delta in kept]
        count = torch.stack(agree).sum(0).clamp(min=1)
        return [torch.stack([delta * a for delta, a in zip(kept, agree, strict=True)]).sum(0) / count]

    return vectors.map(merge).fold([scale])


def elected(vectors: TaskVectors, density: float = 0.2) -> TaskVectors:
    """Deltas trimmed as in `ties`, without the elements whose sign lost: what AdaMerging++ weighs.

    Args:
        vectors: base and deltas, which are left as they are.
        density: the share of each task's elements that is kept, the largest.

    Returns:
        The same base with new deltas.

    Raises:
        ValueError: a density that is not in (0, 1].
    """
    limits = thresholds(vectors, density)

    def change(name: str, deltas: list[Tensor]) -> list[Tensor]:
        kept = [trim(delta, limit) for delta, limit in zip(deltas, limits, strict=True)]
        sign = torch.stack(kept).sum(0).sign()
        return [delta * (delta.sign() == sign) for delta in kept]

    return vectors.map(change)


def thresholds(vectors: TaskVectors, density: float, function: str = "ties") -> list[float]:
    """For each task the magnitude that its largest ``density`` of elements reach."""
    if not 0 < density <= 1:
        raise ValueError(f"{function}: density must be in (0, 1], got {density}")
    found = []
    for k in range(len(vectors)):
        sizes = torch.cat(
            [deltas[k].detach().flatten() for deltas in vectors.deltas.values()] or [torch.zeros(1)]
        ).abs_()
        smaller = sizes.numel() - max(1, round(density * sizes.numel()))
        if sizes.device.type == "cpu":  # in place, where kthvalue copies, and lists places; bits order as magnitudes do
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[sizes.element_size()]
            sizes.view(bits).numpy().partition(smaller)
            found.append(float(sizes[smaller]))
        else:
            found.append(float(sizes.sort().values[smaller]))
    return found


def trim(delta: Tensor, limit: float) -> Tensor:
    """The elements of at least ``limit``, else 0."""
    return torch.where(delta.abs() >= limit, delta, torch.zeros_like(delta))
