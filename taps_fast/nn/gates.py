"""Scores, gates and their penalty: τ, the straight-through estimator, λ/L·Σ|s|."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GATES = ("ste", "raw")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: float) -> Tensor:
        return (scores >= threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(scores: Tensor, threshold: float) -> Tensor:
    """1 where a score has reached the threshold, else 0; the gradient passes as if it were the score itself.

    ::

        I(s) = 1[s >= threshold]        dI/ds := 1

    Args:
        scores: any shape.
        threshold: τ.

    Returns:
        Gates, shape and dtype of ``scores``. A closed gate still gets its gradient, so it can open again.

    Source: TAPS, arXiv 2203.16708.

    >>> scores = torch.tensor([0.05, 0.1], requires_grad=True)
    >>> straight_through(scores, 0.1).tolist()
    [0.0, 1.0]
    """
    if not torch.is_grad_enabled():
        return (scores >= threshold).to(scores.dtype)  # a custom Function costs more than the comparison
    gates: Tensor = _StraightThrough.apply(scores, threshold)  # type: ignore[no-untyped-call]
    return gates


def coefficients(scores: Tensor, threshold: float, gate: str) -> Tensor:
    """What multiplies each delta: its gate ("ste"), or the score itself ("raw")."""
    return straight_through(scores, threshold) if gate == "ste" else scores


def as_float32(number: float) -> float:
    """The number that a float32 tensor holds: scores are compared with thresholds in float32."""
    return ctypes.c_float(number).value


def starting_score(owner: str, threshold: float, initial_score: float | None, gate: str) -> float:
    """What scores start from: ``initial_score``, or for None 1.5·τ, the paper's 0.15 at its τ of 0.1.

    Raises:
        ValueError: an unknown gate, a threshold not above 0, it or a score that is not finite, and what `check_score`
            refuses.
    """
    if gate not in GATES:
        raise ValueError(f"{owner}: gate must be one of {', '.join(GATES)}, got {gate!r}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"{owner}: threshold must be finite and above 0, got {threshold}")
    start = 1.5 * threshold if initial_score is None else initial_score
    check_score(f"{owner}: initial_score", start, threshold, gate)
    return start


def check_score(what: str, score: float, threshold: float, gate: str) -> None:
    """Refuses a score from which a zero delta would never train: times 0 it gets no gradient, and gives none.

    Raises:
        ValueError: a score that is not finite, is below the threshold with gate "ste", or is 0 with "raw".
    """
    if not math.isfinite(score):
        raise ValueError(f"{what} must be finite, got {score} (threshold {threshold})")
    if gate == "ste" and as_float32(score) < as_float32(threshold):
        raise ValueError(
            f"{what} must be at least the threshold, got {score} (threshold {threshold}): behind a closed gate a zero "
            "delta gets no gradient, nor does its score"
        )
    if gate == "raw" and score == 0:
        raise ValueError(f"{what} must not be 0 with gate 'raw', got 0: a zero delta times 0 gets no gradient")


def penalty(
    scores: Sequence[Tensor], lam: float, layers: int | None = None, sizes: Sequence[int] | None = None
) -> Tensor:
    """λ/L·Σ|s| over the scores of L adapted layers: what pushes gates to close.

    ::

        λ·Σ (n_i / N)·|s_i|        N = Σ n_i        with sizes n_i

    Args:
        scores: one a layer.
        lam: λ, at least 0.
        layers: L, where it shall be another number than that of the scores.
        sizes: n_i, the number of weights of each layer, so that a gate costs what it stores. Equal sizes: as without.

    Raises:
        ValueError: λ that is negative or not finite, L below 1.

    Source: TAPS, arXiv 2203.16708; the weighing by size is ours.
    """
    count = len(scores) if layers is None else layers
    if not 0 <= lam < math.inf:
        raise ValueError(f"penalty: lam must be finite and at least 0, got {lam}")
    if count < 1:
        raise ValueError(f"penalty: layers must be at least 1, got {count} ({len(scores)} scores)")
    if sizes is None:
        return torch.stack(list(scores)).abs().sum() * (lam / count)
    # By numbers of Python's, so that nothing is copied to the device.
    parts = torch._foreach_mul(torch._foreach_abs(list(scores)), [lam * size / sum(sizes) for size in sizes])
    return torch.stack(parts).sum()
