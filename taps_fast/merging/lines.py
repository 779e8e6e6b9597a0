"""LiNeS: deltas scaled by depth, little near the input and more near the output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .vectors import TaskVectors


def lines(
    vectors: TaskVectors, alpha: float, beta: float, depths: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """W0 + (alpha + beta·l / (L - 1))·Σ_k Δ_k, l the depth of a tensor among L.

    Args:
        vectors: base and K deltas.
        alpha: the scale of the first layer.
        beta: what is added up to the last one, whose scale is alpha + beta.
        depths: l for each merged tensor; default: `block_depths` of their names.

    Returns:
        A state dict without the tasks' own tensors.

    Raises:
        ValueError: a merged tensor without a depth.

    Cost: one pass. Source: LiNeS, arXiv 2410.17146, equation of linear layer scaling.

    >>> vectors = TaskVectors({"0.w": torch.zeros(1), "1.w": torch.zeros(1)}, {"0.w": [torch.ones(1)],
    ...     "1.w": [torch.ones(1)]}, ["a"])
    >>> [w.item() for w in lines(vectors, 0.25, 0.5).values()]
    [0.25, 0.75]
    """
    depths = block_depths(vectors.names) if depths is None else depths
    if missing := [name for name in vectors.names if name not in depths]:
        raise ValueError(f"lines: depths must name every merged tensor, got none for {missing[0]!r}")
    last = max((depths[name] for name in vectors.names), default=0)
    scales = [alpha + beta * depths[name] / max(last, 1) for name in vectors.names]
    return vectors.fold(torch.tensor(scales).reshape(-1, 1).expand(-1, len(vectors)))


def block_depths(names: Sequence[str]) -> dict[str, int]:
    """Depths from the first number in each name, as in ``blocks.3.mlp.weight``.

    The blocks' numbers count up from 0 in the order in which they come; tensors without a number are as deep as the
    block before them, so that what stands before all blocks is at 0 and what follows them at the end.

    >>> block_depths(["cls_token", "blocks.0.w", "blocks.1.w", "norm.w"])
    {'cls_token': 0, 'blocks.0.w': 0, 'blocks.1.w': 1, 'norm.w': 1}
    """
    depths: dict[str, int] = {}
    seen: dict[str, int] = {}
    current = 0
    for name in names:
        found = re.match(r"(.*?)(?<![^.])(\d+)(?![^.])", name)
        if found:
            current = seen.setdefault(found[0], len(seen))
        depths[name] = current
    return depths
