"""aTLAS: anisotropic scaling of task vectors, learned from labels; ×P: by random classes of elements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import Progress, optimise
from .merged import MergedModel, class_rows
from .vectors import TaskVectors


def atlas(
    model: nn.Module,
    vectors: TaskVectors,
    batches: Iterable[Mapping[str, tuple[Tensor, Tensor]]],
    *,
    head: str | None = None,
    num_parts: int = 1,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> MergedModel:
    """W0^l + Σ_k c_k^l·Δ_k^l with unbounded c from 0, trained on labelled batches; ×P: one c for each of P parts.

    Args:
        model, vectors, head: as in `MergedModel`.
        batches: one item a step: (inputs, labels) by task.
        num_parts: P; 1 is plain aTLAS. With more, each tensor's elements are split at random.
        lr, weight_decay: AdamW's.
        seed: of the split.
        progress: called with each step and its loss.

    Returns:
        The trained `MergedModel`.

    Raises:
        ValueError: as `MergedModel` and `random_parts`.

    Cost: as `adamerging`; parts cost a byte per weight. Source: aTLAS, arXiv 2407.02880, equations of anisotropic
    scaling and of aTLAS x K (here P: K is the number of deltas).
    """
    parts = random_parts(vectors, num_parts, seed) if num_parts > 1 else None
    merged = MergedModel(
        model,
        vectors,
        head=head,
        coeffs="tensor" if parts is None else "part",
        parts=parts,
        num_parts=num_parts,
        init=0.0,
        clamp=None,
    )

    def losses(batch: Mapping[str, Tensor]) -> Tensor:
        outputs = merged.each_rows({task: pair[0] for task, pair in batch.items()})
        found = (_cross_entropy(merged, y, batch[task][1]) for task, y in outputs.items())
        return sum(found, start=merged.coeffs.new_zeros(()))

    groups: list[dict[str, object]] = [{"params": [merged.coeffs], "lr": lr}]
    optimise(groups, batches, losses, weight_decay=weight_decay, progress=progress)  # type: ignore[arg-type]
    return merged


def random_parts(vectors: TaskVectors, num_parts: int, seed: int = 0) -> dict[str, Tensor]:
    """Classes of elements at random, for coefficients of their own (`MergedModel`, coeffs="part").

    Args:
        vectors: whose tensors are split.
        num_parts: how many classes, at most 256.
        seed: of the draw.

    Returns:
        uint8 by name, in the tensors' shapes and on their devices: each element's class.

    Raises:
        ValueError: ``num_parts`` out of range.

    >>> vectors = TaskVectors({"w": torch.zeros(100)}, {"w": [torch.ones(100)]}, ["a"])
    >>> random_parts(vectors, 3)["w"].unique().tolist()
    [0, 1, 2]
    """
    if not 1 <= num_parts <= 256:
        raise ValueError(f"random_parts: num_parts must be in [1, 256], got {num_parts}")
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(num_parts, vectors.base[name].shape, generator=draw, dtype=torch.uint8).to(
            vectors.base[name].device
        )
        for name in vectors.names
    }


def _cross_entropy(merged: MergedModel, rows: Tensor, labels: Tensor) -> Tensor:
    """Of rows [N, C] with their classes, or with probabilities that lie as the model's outputs do; 0 for no rows."""
    probabilities = labels.is_floating_point()
    return F.cross_entropy(rows, class_rows(merged.network, labels) if probabilities else labels.flatten(),
                           reduction="sum") / max(len(rows), 1)  # fmt: skip
