"""DOGE: one change of all deltas that brings their sum nearer to each expert, found without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ties import thresholds
from .vectors import TaskVectors


def doge(
    vectors: TaskVectors,
    scale: float = 0.07,
    density: float = 0.3,
    *,
    subspace: int = 6,
    steps: int = 400,
    lr: float = 1e-4,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """W0 + Σ_k λ_k·M_k∘(Δ_k + δ), of each matrix: δ is shared by the tasks and found by `modification`.

    ::

        λ_k = scale / ‖Δ_k‖              of each tensor; 0 where Δ_k is
        M_k = |Δ_k| is among the largest ``density`` of the task's elements

    Args:
        vectors: base and K deltas. Tensors of fewer than two axes stay the base's; a convolution is [O, C·kh·kw].
        scale: λ.
        density: in (0, 1].
        subspace, steps, lr: of `modification`.
        progress: called with each tensor's name.

    Returns:
        A state dict without the tasks' own tensors.

    Raises:
        ValueError: a density outside (0, 1], a subspace below 1, steps below 0.

    Cost: K + 1 singular value decompositions and ``steps`` passes over K deltas a matrix, then one pass. Source: DOGE,
    arXiv 2501.01230; the loss is summed over outputs before it is squared, as in the published code.

    >>> vectors = TaskVectors({"w": torch.zeros(1, 2)}, {"w": [torch.tensor([[3.0, 4.0]])]}, ["a"])
    >>> doge(vectors, 2.5, 1.0, steps=0)["w"]
    tensor([[1.5000, 2.0000]])
    """
    if subspace < 1 or steps < 0:
        raise ValueError(f"doge: subspace must be at least 1 and steps at least 0, got {subspace} and {steps}")
    matrices = {name: deltas for name, deltas in vectors.deltas.items() if vectors.base[name].dim() > 1}
    limits = thresholds(TaskVectors(vectors.base, matrices, vectors.tasks), density, "doge")
    coeffs = torch.zeros(len(vectors.names), len(vectors))
    for l, name in enumerate(vectors.names):
        if name in matrices:
            norms = torch.stack([delta.float().norm() for delta in matrices[name]])
            coeffs[l] = torch.where(norms > 0, scale / norms.clamp(min=1e-30), 0.0)

    def change(name: str, deltas: list[Tensor]) -> list[Tensor]:
        if name not in matrices:
            return deltas
        if progress is not None:
            progress(name)
        tau = torch.stack(deltas).flatten(2).float()
        shift = modification(tau, coeffs[vectors.names.index(name)].to(tau.device), subspace, steps, lr)
        shift = shift.view(deltas[0].shape).to(deltas[0].dtype)
        return [(d + shift) * (d.abs() >= limit) for d, limit in zip(deltas, limits, strict=True)]

    return vectors.map(change).fold(coeffs)


def modification(tau: Tensor, coeffs: Tensor, subspace: int, steps: int, lr: float) -> Tensor:
    """δ [O, I] that lowers, by projected gradient descent from 0,

    ::

        L(δ) = Σ_k Σ_o ⟨τ_k[o], τ_k[o] - Σ_i λ_i (τ_i + δ)[o]⟩²

    Args:
        tau: [K, O, I].
        coeffs: λ [K].
        subspace: the gradient's part in the columns' shared space is taken away: that of the leading
            min(O, I) // subspace left singular vectors of the K deltas' own leading min(O, I) // K.
        steps, lr: of Adam.

    The gradient is written out: it is a sum of the deltas' rows, so each step reads them twice and stores nothing.
    """
    rank = min(tau.shape[1:])
    each = rank // len(tau)
    leading = torch.cat([torch.linalg.svd(t, full_matrices=False)[0][:, :each] for t in tau], 1)
    shared = torch.linalg.svd(leading, full_matrices=False)[0][:, : rank // subspace]
    delta = torch.zeros_like(tau[0])
    optimizer = torch.optim.Adam([delta], lr=lr)
    merged = torch.einsum("k,koi->oi", coeffs, tau)
    fixed = (tau * (tau - merged)).sum(-1)  # [K, O]
    total = coeffs.sum()
    for _ in range(steps):
        gap = fixed - total * (tau * delta).sum(-1)
        gradient = -2 * total * torch.einsum("ko,koi->oi", gap, tau)
        delta.grad = gradient - shared @ (shared.t() @ gradient)
        optimizer.step()
    return delta
