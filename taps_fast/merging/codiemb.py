"""Per-parameter fusion of fine-tuned models, as in CoDiEmb: each element has weights of its own for the K models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .vectors import TaskVectors


def fusion(vectors: TaskVectors, weights: Mapping[str, Tensor] | None = None, power: float = 1.0) -> dict[str, Tensor]:
    """Σ_k w_k ∘ W_k over the fine-tuned models W_k = W0 + Δ_k, with Σ_k w_k = 1 for every element.

    ::

        w_k = |Δ_k|^power / Σ_j |Δ_j|^power          equal weights where no model moved the element

    Args:
        vectors: base and K deltas.
        weights: [K, *shape] by name, to use instead; they are used as given.
        power: 0 is the plain mean; larger prefers the models that moved an element farther.

    Returns:
        A state dict without the tasks' own tensors.

    Raises:
        ValueError: weights that are missing or of another shape.

    Cost: one pass over the deltas. Source: the per-parameter fusion of CoDiEmb. The paper's exact weighting was not
    available: the rule above, by the size of the deviation from the base, is this library's.

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([3.0, 1.0]), Tensor([1.0, 1.0])]}, ["a", "b"])
    >>> fusion(vectors)["w"]
    tensor([2.5000, 1.0000])
    """

    def change(name: str, deltas: list[Tensor]) -> list[Tensor]:
        base = vectors.base[name]
        each = torch.stack(deltas)
        each = each.to(torch.promote_types(each.dtype, torch.float32))
        if weights is None:
            sizes = each.abs()
            largest = sizes.amax(0)
            share = (sizes / torch.where(largest > 0, largest, 1.0)) ** power  # no power of a small number is 0 for all
            total = share.sum(0)
            share = torch.where(total > 0, share / total, 1 / len(deltas))
            return [(share * each).sum(0).to(base.dtype)]
        given = weights.get(name)
        if given is None or given.shape != each.shape:
            got = "none" if given is None else f"{tuple(given.shape)}"
            raise ValueError(f"fusion: weights must have {name!r} of shape {tuple(each.shape)}, got {got}")
        # Σ w·(W0 + Δ) = W0 + (Σ w·Δ + (Σ w - 1)·W0)
        given = given.to(each.dtype)
        return [((given * each).sum(0) + (given.sum(0) - 1) * base).to(base.dtype)]

    return vectors.map(change).fold([1.0]) if vectors.names else vectors.fold(0.0)
