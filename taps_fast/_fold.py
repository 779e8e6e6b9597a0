"""All of a network's deltas folded into its weights at once: what is right, in plain PyTorch, on every device.

For L weights, K deltas each, and P parts into which the elements of a weight may be split::

    out_l = base_l + mask_l ∘ Σ_k coeffs[l, part_l, k]·delta_lk

    dcoeffs[l, p, k] = Σ_{i: part_l(i) = p} dweight_l[i]·mask_l[i]·delta_lk[i]
    dmask_l          = dweight_l ∘ Σ_k coeffs[l, part_l, k]·delta_lk

Sums are formed in the dtype of the coefficients and rounded once. The compiled kernels are tested against these lines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold(
    bases: list[Tensor], deltas: list[Tensor], coeffs: Tensor, parts: list[Tensor], masks: list[Tensor]
) -> list[Tensor]:
    out = []
    for l, base in enumerate(bases):
        total = _summed(l, base, deltas, coeffs, parts)
        if masks:
            total = total * masks[l]
        out.append(total.add_(base).to(base.dtype))
    return out


def fold_grad(
    dweights: list[Tensor],
    deltas: list[Tensor],
    coeffs: Tensor,
    parts: list[Tensor],
    masks: list[Tensor],
    need_dcoeffs: bool,
    need_dmasks: bool,
) -> tuple[Tensor, list[Tensor]]:
    num_deltas = coeffs.shape[2]
    dcoeffs = coeffs.new_zeros(coeffs.shape if need_dcoeffs else 0)
    dmasks = []
    for l, dweight in enumerate(dweights):
        if need_dmasks:
            dmasks.append(_summed(l, dweight, deltas, coeffs, parts).mul_(dweight).to(dweight.dtype))
        if need_dcoeffs:
            wide = dweight.to(coeffs.dtype)
            if masks:
                wide = wide * masks[l]
            for k in range(num_deltas):
                product = wide * deltas[l * num_deltas + k]
                if parts:
                    members = torch.nn.functional.one_hot(parts[l].flatten().long(), coeffs.shape[1])
                    dcoeffs[l, :, k] = product.flatten() @ members.to(product.dtype)
                else:
                    dcoeffs[l, 0, k] = product.sum()
    return dcoeffs, dmasks


def _summed(l: int, like: Tensor, deltas: list[Tensor], coeffs: Tensor, parts: list[Tensor]) -> Tensor:
    """Σ_k c·delta_lk; a delta whose coefficient is 0 adds nothing, whatever it holds."""
    total = torch.zeros(like.shape, dtype=coeffs.dtype, device=like.device)
    for k in range(coeffs.shape[2]):
        c = coeffs[l, :, k][parts[l].long()] if parts else coeffs[l, 0, k]
        total += torch.where(c != 0, c * deltas[l * coeffs.shape[2] + k], 0)
    return total
