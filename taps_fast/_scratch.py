"""Weights summed for one product, in memory that the next one writes over."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ._problem import layout

Scalar = float | Tensor


class _Scratch(threading.local):
    """Each thread's buffers, by dtype, as large as its largest weight."""

    def __init__(self) -> None:
        self.weights: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def merged(base: Tensor, scale: Scalar, terms: list[tuple[Tensor, Scalar]], wide: torch.dtype) -> Tensor:
    """scale·base + Σ by·term, summed in ``wide`` and rounded once to the base's dtype; valid until the next one.

    What is times 0 counts for nothing, finite or not.
    """
    if isinstance(scale, Tensor) or scale != 0.0:
        terms = [(base, scale), *terms]
    if not terms:
        return torch.zeros_like(base)
    if len(terms) == 1 and isinstance(terms[0][1], float) and terms[0][1] == 1.0:
        return terms[0][0]
    (first, by), *rest = terms
    if base.dtype != wide:
        total = first.to(wide)
        total = total if isinstance(by, float) and by == 1.0 else scaled(total, by, out=total)
    elif rest and isinstance(by, float) and by == 1.0 and isinstance(c := rest[0][1], float):
        total = torch.add(first, rest[0][0], alpha=c, out=_buffer(base))
        rest = rest[1:]
    else:
        total = scaled(first.to(wide), by, out=_buffer(base))
    for term, c in rest:
        total = total.add_(term, alpha=c) if isinstance(c, float) else total.add_(scaled(term.to(wide), c))
    return total.to(base.dtype)


def scaled(term: Tensor, by: Scalar, out: Tensor | None = None) -> Tensor:
    """by·term; times a 0 that only the device knows, 0 whatever the term is."""
    product = torch.mul(term, by, out=out)
    return product.masked_fill_(by == 0, 0.0) if isinstance(by, Tensor) else product


def _buffer(like: Tensor) -> Tensor:
    """Memory for a merged weight. A CPU thread keeps its own: fresh pages cost as much as the sum."""
    if like.device.type != "cpu":
        return torch.empty_like(like)
    found: Tensor | None = _scratch.weights.get(like.dtype)
    if found is None or found.numel() < like.numel():
        # An inference tensor could never be written to by a later call outside of inference mode.
        with torch.inference_mode(False):
            found = _scratch.weights[like.dtype] = like.new_empty(like.numel())
    if like.is_contiguous(memory_format=layout(like)):
        return found.as_strided(like.shape, like.stride())
    return found[: like.numel()].view(like.shape)
