"""Inputs of `fold`, and its published form in plain PyTorch: what the tests of every backend share."""

from __future__ import annotations

import torch

SHAPES = ((13, 11), (5,), (), (0, 3), (3, 2, 3, 3), (40, 53))


def draw(dtype, num_deltas, num_parts=1, mask=None, seed=0, shapes=SHAPES):
    """bases, deltas [L][K], coeffs [L, P, K], parts, masks, dweights."""
    g = torch.Generator().manual_seed(seed)

    def each(scale=1.0):
        return [(torch.randn(s, generator=g) * scale).to(dtype) for s in shapes]

    deltas = [[(torch.randn(s, generator=g) * 0.1).to(dtype) for _ in range(num_deltas)] for s in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coeffs = torch.randn(len(shapes), num_parts, num_deltas, generator=g).to(wide)
    parts = [torch.randint(num_parts, s, generator=g).to(torch.uint8) for s in shapes] if num_parts > 1 else []
    masks = []
    if mask == "bool":
        masks = [torch.rand(s, generator=g) > 0.5 for s in shapes]
    elif mask == "soft":
        masks = each()
    return each(), deltas, coeffs, parts, masks, each()


def plain(bases, deltas, coeffs, parts, masks):
    """The published way: a chain of K sums for each tensor, in the tensors' dtype."""
    out = []
    for l, base in enumerate(bases):
        total = torch.zeros_like(base)
        for k, delta in enumerate(deltas[l]):
            c = coeffs[l, :, k][parts[l].long()] if parts else coeffs[l, 0, k]
            total = total + c.to(base.dtype) * delta
        out.append(base + (total * masks[l] if masks else total))
    return out


def run(function, bases, deltas, coeffs, parts, masks, dweights):
    """Weights, dcoeffs, and the gradients of bases and soft masks."""
    coeffs = coeffs.clone().requires_grad_()
    bases = [b.clone().requires_grad_() for b in bases]
    masks = [m.clone().requires_grad_() if m.is_floating_point() else m for m in masks]
    out = function(bases, deltas, coeffs, parts, masks)
    leaves = [coeffs, *bases, *(m for m in masks if m.requires_grad)]
    found = torch.autograd.grad(out, leaves, dweights, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
    return [t.detach() for t in out], grads[0], grads[1:]


def double(inputs):
    def up(value):
        if isinstance(value, list):
            return [up(v) for v in value]
        return value.double() if value.is_floating_point() else value

    return [up(v) for v in inputs]
