"""Concrete subspaces: one soft mask for all tasks, trained with the coefficients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import Batch, Progress, entropy, optimise
from .merged import MergedModel
from .vectors import TaskVectors


class ConcreteModel(MergedModel):
    """W0 + (m / mean m) ∘ Σ_k clamp(λ_k)·Δ_k with m = sigmoid((logits + noise) / temperature), shared by the tasks.

    ``noise`` is logistic while ``sampling`` is set and 0 otherwise. The mean is over all merged elements.

    Args:
        model, vectors: as in `MergedModel`, with its keyword arguments.
        temperature: of the relaxed Bernoulli variables.
        logit: where the mask's logits start.
        seed: of the noise.

    Raises:
        ValueError: as `MergedModel`; another route than "whole", or parts.
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: TaskVectors,
        *,
        temperature: float = 0.5,
        logit: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        route, parts = kwargs.get("route", "whole"), kwargs.get("parts")
        if route != "whole" or parts is not None:
            with_parts = "" if parts is None else " with parts"
            raise ValueError(f"ConcreteModel: route must be 'whole' without parts, got {route!r}{with_parts}")
        super().__init__(model, vectors, **kwargs)
        self.temperature, self.sampling = temperature, False
        # At least float32: in float16 what Adam divides by would be 0.
        wide = {name: torch.promote_types(vectors.base[name].dtype, torch.float32) for name in vectors.names}
        self.logits = nn.ParameterList(
            torch.full_like(vectors.base[n], logit, dtype=dtype) for n, dtype in wide.items()
        )
        self._draw = torch.Generator().manual_seed(seed)

    def masks(self) -> dict[str, Tensor]:
        """m / mean m, by name."""
        soft = []
        for logits in self.logits:
            noise = torch.zeros_like(logits)
            if self.sampling:
                uniform = torch.rand(logits.shape, generator=self._draw, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
                noise = uniform.logit().to(logits)
            soft.append(torch.sigmoid((logits + noise) / self.temperature))
        count = sum(m.numel() for m in soft)
        mean = sum((m.sum() for m in soft), start=torch.zeros(())) / max(count, 1)
        base = self.vectors.base
        return {name: (m / mean).to(base[name].dtype) for name, m in zip(self.vectors.names, soft, strict=True)}


def concrete(
    model: nn.Module,
    vectors: TaskVectors,
    batches: Iterable[Batch],
    *,
    head: str | None = None,
    coeffs: str = "tensor",
    lr: float = 1e-3,
    mask_lr: float = 1e-1,
    temperature: float = 0.5,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConcreteModel:
    """W0 + (m / mean m) ∘ Σ_k λ_k·Δ_k with the mask m and the λ that minimise the entropy of predictions.

    Args:
        model, vectors, head, coeffs, batches, lr, progress: as in `adamerging`.
        mask_lr: of the mask's logits.
        temperature, seed: as in `ConcreteModel`.

    Returns:
        The trained model, whose mask is now without noise.

    Raises:
        ValueError: as `MergedModel`.

    Cost: as `adamerging`, and as many trained numbers as weights. Source: Concrete Subspace Learning, arXiv 2312.06173:
    a shared relaxed Bernoulli mask, rescaled by its mean. The paper trains mask and coefficients in two nested loops;
    here one step updates both.
    """
    merged = ConcreteModel(model, vectors, head=head, coeffs=coeffs, temperature=temperature, seed=seed)
    merged.sampling = True

    def losses(batch: Batch) -> Tensor:
        return sum((entropy(y) for y in merged.each_rows(batch).values()), start=merged.coeffs.new_zeros(()))

    groups: list[dict[str, object]] = [
        {"params": [merged.coeffs], "lr": lr},
        {"params": list(merged.logits), "lr": mask_lr},
    ]
    optimise(groups, batches, losses, progress=progress)
    merged.sampling = False
    return merged
