"""EMR: a unified delta of elected signs and largest sizes, with a bit mask and a scale for each task."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import MaskedDelta, one_delta
from .vectors import TaskVectors


def emr(vectors: TaskVectors) -> MaskedDelta:
    """W_t = W0 + s_t·m_t ∘ τ.

    ::

        γ   = sign(Σ_k Δ_k)                            τ = γ·max_k |Δ_k| over the tasks whose sign is γ
        m_t = [ Δ_t·τ > 0 ]                            s_t = Σ|Δ_t| / Σ|m_t ∘ τ|, sums over all elements

    Args:
        vectors: base and K deltas.

    Returns:
        A `MaskedDelta`: one delta, and a bit mask and a scale for each task. No data is used. A task whose mask is
        empty has scale 0.

    Cost: two passes over the deltas. Source: EMR-Merging, arXiv 2405.17461, sections "elect", "mask" and "rescale".

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([2.0, 1.0]), Tensor([4.0, -3.0])]}, ["a", "b"])
    >>> emr(vectors).state("a")["w"]
    tensor([3., 0.])
    """
    unified: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {task: {} for task in vectors.tasks}
    full = dict.fromkeys(vectors.tasks, 0.0)
    kept = dict.fromkeys(vectors.tasks, 0.0)
    for name, deltas in vectors.deltas.items():
        each = torch.stack(deltas)
        sign = each.sum(0).sign()
        unified[name] = sign * (each * sign).clamp(min=0).amax(0)
        for task, delta in zip(vectors.tasks, deltas, strict=True):
            masks[task][name] = mask = (delta.sign() == sign) & (sign != 0)  # a product of small float16 is 0
            full[task] += float(delta.abs().sum(dtype=torch.float64))
            kept[task] += float((unified[name].abs() * mask).sum(dtype=torch.float64))
    scales = {task: full[task] / kept[task] if kept[task] else 0.0 for task in vectors.tasks}
    return MaskedDelta(one_delta(vectors, unified), masks, scales, vectors.own)
