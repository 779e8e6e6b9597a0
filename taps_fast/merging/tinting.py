"""Model Tinting: coefficients and one layer a task, trained together on the labels that the frozen experts give."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .adapt import Batch, Experts, Progress, agreement, optimise
from .merged import MergedModel, class_rows
from .vectors import TaskVectors


def tinting(
    model: nn.Module,
    vectors: TaskVectors,
    batches: Iterable[Batch],
    *,
    head: str | None = None,
    own: str | None = None,
    plus_plus: bool = False,
    updates: str = "joint",
    lr: float = 1e-3,
    own_lr: float = 1e-3,
    route: str = "whole",
    progress: Progress | None = None,
) -> MergedModel:
    """W0 + Σ_k clamp(λ_k, 0, 1)·Δ_k and one layer of each task's own, trained on the experts' pseudo-labels.

    ::

        loss = Σ_t mean over x in batch[t] of CE(f_merged,t(x), argmax f_expert,t(x))        λ from 0.3

    Args:
        model, vectors, head, route: as in `MergedModel`.
        batches: one item a step: unlabelled inputs by task. Experts and merged model run all tasks as one mixed batch
            where shapes allow it.
        own: the path of the layer that each task trains: a delta on top of the merged weight, from 0. None: each
            task's head trains instead; with a path, heads rest.
        plus_plus: leave out the rows where merged model and expert differ and the merged model is the surer (the
            paper's ++). A batch in which no row is left has zero loss.
        updates: "joint" (one update a batch, from the loss of all tasks) or "sequential" (one after each task).
        lr: of the coefficients.
        own_lr: of the tasks' layers.
        progress: called with each step and its loss.

    Returns:
        The trained `MergedModel`; ``.state(task)`` is a plain state dict with the task's own layer.

    Raises:
        ValueError: updates that are neither, no layer to train; TypeError: one in float16.

    Cost: as `adamerging`, and one forward of the experts. Source: Model Tinting, arXiv 2412.19098: coefficients per
    tensor, a task-specific layer, pseudo-labels and their confidence filter. Adam, both rates and the exact order of
    sequential updates are this library's choice.
    """
    if updates not in ("joint", "sequential"):
        raise ValueError(f"tinting: updates must be 'joint' or 'sequential', got {updates!r}")
    if head is None and own is None:
        raise ValueError("tinting: head or own must name a layer that each task trains, got neither")
    experts = Experts(model, vectors, head)
    merged = MergedModel(model, vectors, head=head, own=own, route=route)
    if own is None:
        merged.network.conversion.head.tasks.requires_grad_()  # type: ignore[union-attr]
    mine = [p for p in merged.own_parameters() if p.requires_grad]
    if any(p.dtype == torch.float16 for p in mine):
        raise TypeError(
            "tinting: vectors must be float32, bfloat16 or float64 in the layers that tasks train, got torch.float16 "
            "(what Adam divides by would be 0 in it)"
        )

    def losses(batch: Batch) -> Tensor:
        teachers, students = experts(batch), merged.each_rows(batch)
        found = (agreement(y, class_rows(experts.network, teachers[task]), plus_plus) for task, y in students.items())
        return sum(found, start=merged.coeffs.new_zeros(()))

    groups: list[dict[str, object]] = [{"params": [merged.coeffs], "lr": lr}, {"params": mine, "lr": own_lr}]
    optimise(groups, batches, losses, sequential=updates == "sequential", progress=progress)
    return merged
