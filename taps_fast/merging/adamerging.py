"""AdaMerging: coefficients trained at test time so that the merged model is sure of its answers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .adapt import Batch, Progress, entropy, optimise
from .merged import MergedModel
from .ties import elected
from .vectors import TaskVectors


def adamerging(
    model: nn.Module,
    vectors: TaskVectors,
    batches: Iterable[Batch],
    *,
    head: str | None = None,
    coeffs: str = "tensor",
    plus_plus: bool = False,
    lr: float = 1e-3,
    route: str = "whole",
    progress: Progress | None = None,
) -> MergedModel:
    """W0 + Σ_k clamp(λ_k, 0, 1)·Δ_k with the λ that minimise the entropy of the merged model's predictions.

    ::

        loss = Σ_t mean over x in batch[t] of H(softmax f_merged,t(x))        λ from 0.3, Adam

    Args:
        model, vectors, head, route: as in `MergedModel`.
        batches: one item a step: unlabelled inputs by task. All tasks run as one mixed batch where shapes allow it.
        coeffs: "tensor" (layer-wise AdaMerging) or "task" (task-wise).
        plus_plus: trim deltas to their largest 20 % and drop the signs that lose first (AdaMerging++).
        lr: Adam's learning rate.
        progress: called with each step and its loss.

    Returns:
        The trained `MergedModel`; ``.state(task)`` is a plain state dict.

    Raises:
        ValueError: as `MergedModel`.

    Cost: a step folds once, runs each task's batch forward and backward once, and reads each delta once more for all
    coefficients' gradients. Source: AdaMerging, arXiv 2310.02575, equations of task-wise and layer-wise AdaMerging and
    of the entropy objective.
    """
    if plus_plus:
        vectors = elected(vectors)
    merged = MergedModel(model, vectors, head=head, coeffs=coeffs, route=route)

    def losses(batch: Batch) -> Tensor:
        return sum((entropy(y) for y in merged.each_rows(batch).values()), start=merged.coeffs.new_zeros(()))

    optimise([{"params": [merged.coeffs], "lr": lr}], batches, losses, progress=progress)
    return merged
