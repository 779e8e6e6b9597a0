"""Deltas that somebody computes: low-rank pairs from a callable, as generators of LoRA weights give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .vectors import TaskVectors

Pair = tuple[Tensor, Tensor]
"""B [O, r] and A [r, I]."""


def from_generator(
    base: Mapping[str, Tensor],
    generate: Callable[[str], Mapping[str, Pair]],
    tasks: Sequence[str],
    *,
    scale: float = 1.0,
) -> TaskVectors:
    """Task vectors with Δ_t = scale·B_t A_t, the pairs made by ``generate(task)``.

    Args:
        base: the base's state dict.
        generate: for a task's name, (B [O, r], A [r, I]) by the names of weights [O, I].
        tasks: the names to ask for.
        scale: α / r of LoRA.

    Returns:
        `TaskVectors`; a weight that a task's pairs leave out has delta 0 there.

    Raises:
        ValueError: a name that is not in base, or factors that do not fit.

    Cost: one product a pair; the deltas are dense from then on. Source: LoRA, arXiv 2106.09685; a generator that is
    asked for a task's factors, as in ICM-LoRA.

    >>> pair = (torch.ones(2, 1), torch.ones(1, 3))
    >>> vectors = from_generator({"w": torch.zeros(2, 3)}, lambda task: {"w": pair}, ["a"], scale=0.5)
    >>> vectors.expert("a")["w"][0]
    tensor([0.5000, 0.5000, 0.5000])
    """
    made: dict[str, dict[str, Tensor]] = {}
    for task in tasks:
        for name, (b, a) in generate(task).items():
            wanted = base[name].shape if name in base else None
            if wanted is None or b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
                raise ValueError(
                    f"from_generator: generate({task!r}) must give [O, r] and [r, I] for a tensor of base, got "
                    f"{tuple(b.shape)} and {tuple(a.shape)} for {name!r}"
                )
            if (b.shape[0], a.shape[1]) != tuple(wanted):
                raise ValueError(
                    f"from_generator: {name!r} must get factors of {tuple(wanted)}, got {tuple(b.shape)} and "
                    f"{tuple(a.shape)} (task {task!r})"
                )
            made.setdefault(name, {})[task] = (scale * (b.detach() @ a.detach())).to(base[name].dtype)
    deltas = {
        name: [found[task] if task in found else torch.zeros_like(base[name]) for task in tasks]
        for name, found in made.items()
    }
    return TaskVectors(base, deltas, tasks)
