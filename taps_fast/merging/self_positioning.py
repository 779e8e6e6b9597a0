"""Self Positioning: the deltas composed along a sphere, and how far to go, with K + 1 numbers to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .vectors import TaskVectors


def slerp_coefficients(gram: Tensor, weights: Tensor) -> Tensor:
    """Coefficients [K] of the composition of K vectors along great circles, from their dot products alone.

    ::

        v_1 = Δ_1;  v_k = slerp(v_{k-1}, Δ_k; w_k / (w_1 + … + w_k))
        slerp(a, b; s) = sin((1 - s)·Ω)/sin Ω·a + sin(s·Ω)/sin Ω·b,   cos Ω = <a, b> / (|a|·|b|)

    Args:
        gram: [K, K] of <Δ_i, Δ_j>, float64.
        weights: [K], positive; the share of each vector.

    Returns:
        [K], differentiable in weights. Where two vectors are parallel, the straight line is taken.
    """
    count = len(weights)
    eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
    current = eye[0] if count else gram.new_zeros(0)
    total = weights[0] if count else weights.sum()
    for k in range(1, count):
        total = total + weights[k]
        share = (weights[k] / total).to(gram.dtype)
        sizes = (current @ gram @ current).sqrt() * gram[k, k].sqrt()
        cosine = ((current @ gram)[k] / sizes.clamp(min=torch.finfo(gram.dtype).tiny)).clamp(-1, 1)
        if float(cosine.detach().abs()) > 1 - 1e-9:
            first, second = 1 - share, share
        else:
            angle = torch.acos(cosine)
            first, second = torch.stack([1 - share, share]).mul(angle).sin() / angle.sin()
        current = first * current + second * eye[k]
    return current


def gram_matrix(vectors: TaskVectors) -> Tensor:
    """<Δ_i, Δ_j> over all tensors, float64 [K, K]; one tensor at a time."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for deltas in vectors.deltas.values():
        flat = torch.stack([d.flatten() for d in deltas]).double().cpu()
        gram += flat @ flat.t()
    return gram


def self_positioning(
    vectors: TaskVectors,
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    steps: int = 100,
    lr: float = 1e-2,
    init: Sequence[float] | None = None,
    scale: float = 1.0,
    penalty: float = 0.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """W0 + λ·Σ_k c_k(w)·Δ_k, c the spherical composition of the deltas, with λ and K weights trained by a probe loss.

    Args:
        vectors: base and K deltas.
        loss: of a merged state dict (differentiable), on probe data of the user's.
        steps, lr: Adam's.
        init: K positive weights (default: equal).
        scale: λ at the start.
        penalty: of λ².

    Returns:
        (the merged state dict, the coefficients λ·c [K]).

    Raises:
        ValueError: init that is not K positive numbers.

    Cost: a step folds once and reads the deltas once more for the K + 1 gradients. Source: Self Positioning, of which
    the spherical composition and its K + 1 scalars are taken. The order of composition (the tasks'), positive weights
    through exp, Adam, and the penalty are this library's choice.

    >>> vectors = TaskVectors({"w": torch.zeros(2)}, {"w": [Tensor([1.0, 0.0]), Tensor([0.0, 1.0])]}, ["a", "b"])
    >>> state, c = self_positioning(vectors, lambda s: (s["w"] - Tensor([0.0, 1.0])).square().sum(), lr=0.1)
    >>> bool(state["w"][1] > 0.9)
    True
    """
    gram = gram_matrix(vectors)
    start = torch.ones(len(vectors)) if init is None else torch.tensor(list(init), dtype=torch.float32)
    if len(start) != len(vectors) or not bool((start > 0).all()):
        raise ValueError(f"self_positioning: init must be {len(vectors)} positive numbers, got {start.tolist()}")
    logs = start.log().requires_grad_()
    distance = torch.tensor(float(scale), requires_grad=True)

    def coefficients() -> Tensor:
        return distance * slerp_coefficients(gram, logs.exp()).to(torch.float32)

    optimizer = torch.optim.Adam([logs, distance], lr=lr)
    for _ in range(steps if len(vectors) else 0):
        optimizer.zero_grad()
        (loss(vectors.fold(coefficients())) + penalty * distance.square()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = coefficients().detach()
    return vectors.fold(found), found
