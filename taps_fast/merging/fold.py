"""`fold`: all of a network's deltas into all of its weights in one pass; its gradient in one more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._problem import DTYPES

ops = torch.ops.taps_fast


def fold(
    bases: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    coeffs: Tensor,
    *,
    parts: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """L weights, each a base plus a weighted sum of its K deltas.

    ::

        out_l = bases[l] + masks[l] ∘ Σ_k coeffs[l, parts[l], k]·deltas[l][k]

    Differentiable in coeffs, bases and floating masks. Sums are formed in float32 (float64 for float64 tensors) and
    rounded once. Deltas whose coefficient is 0 are not read.

    Args:
        bases: L tensors of any shapes; float32, bfloat16, float16 or float64, not mixed.
        deltas: for each base K tensors shaped like it, of its dtype; frozen.
        coeffs: [K], [L, K], or with parts [L, P, K].
        parts: uint8, shaped like the bases, values below P: which coefficient an element takes. P <= 256.
        masks: shaped like the bases; bool, or of their dtype.

    Returns:
        L new contiguous tensors.

    Raises:
        ValueError: shapes, counts, devices or values of parts that do not fit, deltas that require a gradient.
        TypeError: dtypes that do not.

    Cost: each base and delta is read once and each weight written once; the backward reads each delta once, for all
    coefficients together. Source: Task arithmetic, arXiv 2212.04089, equation in section 2; coefficients per tensor
    as in AdaMerging, arXiv 2310.02575, per part as in aTLAS, arXiv 2407.02880.

    >>> bases, deltas = [torch.zeros(2), torch.ones(3)], [[torch.ones(2)], [torch.ones(3)]]
    >>> coeffs = torch.tensor([[0.5], [2.0]], requires_grad=True)
    >>> fold(bases, deltas, coeffs)
    [tensor([0.5000, 0.5000], grad_fn=<FoldBackward>), tensor([3., 3., 3.], grad_fn=<FoldBackward>)]
    """
    bases = list(bases)
    num_deltas = len(deltas[0]) if deltas else (coeffs.shape[-1] if coeffs.dim() else 0)
    table = _table(coeffs, len(bases), num_deltas, parts is not None)
    _check(bases, deltas, num_deltas, table.shape[1], parts, masks)
    if not bases:
        return []
    wide = torch.float64 if bases[0].dtype == torch.float64 else torch.float32
    table = table.to(bases[0].device, wide).contiguous()
    layout = Layout(len(bases), num_deltas, parts is not None, masks is not None)
    tensors = [*bases, *(delta for each in deltas for delta in each), *(parts or ()), *(masks or ())]
    folded: tuple[Tensor, ...] = Fold.apply(layout, table, *(t.contiguous() for t in tensors))  # type: ignore[no-untyped-call]
    return list(folded)


class Layout(NamedTuple):
    """How many of each kind stand in a flat list of tensors: bases, deltas, parts, masks."""

    bases: int
    num_deltas: int
    parts: bool
    masks: bool

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        count = self.bases
        found, at = [], 0
        for size in (count, count * self.num_deltas, count * self.parts, count * self.masks):
            found.append(list(tensors[at : at + size]))
            at += size
        return found[0], found[1], found[2], found[3]


class Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, coeffs: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        bases, deltas, parts, masks = layout.split(tensors)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coeffs, *deltas, *parts, *masks)
        return tuple(ops.fold(bases, deltas, coeffs, parts, masks))

    @staticmethod
    def backward(ctx: Any, *dweights: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gradients are computed with grad mode on only when the caller asked for create_graph.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fold: create_graph must be False, got True; the kernels have no second derivatives")
        layout: Layout = ctx.layout
        count, k = layout.bases, layout.num_deltas
        coeffs, *saved = ctx.saved_tensors
        deltas, parts = saved[: count * k], saved[count * k : count * (k + layout.parts)]
        masks = saved[len(saved) - count * layout.masks :]
        _, need_coeffs, *need = ctx.needs_input_grad
        need_masks = any(need[len(need) - len(masks) :]) if masks else False
        # A weight that the loss did not touch has no gradient, and neither have its coefficients.
        used = [l for l, dweight in enumerate(dweights) if dweight is not None]
        whole = len(used) == count
        dcoeffs = None
        dmasks: list[Tensor | None] = [None] * len(masks)
        if used and (need_coeffs or need_masks):
            dcoeffs, found = ops.fold_grad(
                [dweight.contiguous() for dweight in dweights if dweight is not None],
                [delta for l in used for delta in deltas[l * k : (l + 1) * k]],
                coeffs if whole else torch.stack([coeffs[l] for l in used]),  # a list would be copied to a GPU
                [parts[l] for l in used] if parts else [],
                [masks[l] for l in used] if masks else [],
                need_coeffs,
                need_masks,
            )
            if need_coeffs and not whole:
                rows = [torch.zeros_like(coeffs[0])] * count
                for l, row in zip(used, dcoeffs.unbind(), strict=True):
                    rows[l] = row
                dcoeffs = torch.stack(rows)
            for l, dmask in zip(used, found, strict=False):
                dmasks[l] = dmask
        dbases = [dweight if n else None for dweight, n in zip(dweights, need, strict=False)]
        frozen = [None] * (len(deltas) + len(parts))
        return None, dcoeffs if need_coeffs else None, *dbases, *frozen, *dmasks


def _table(coeffs: Tensor, tensors: int, num_deltas: int, split: bool) -> Tensor:
    """coeffs as [L, P, K]."""
    table = coeffs.expand(tensors, num_deltas) if not split and coeffs.shape == (num_deltas,) else coeffs
    if table.dim() != 2 + split or table.shape[0] != tensors or table.shape[-1] != num_deltas:
        wanted = f"[{tensors}, P, {num_deltas}]" if split else f"[{num_deltas}] or [{tensors}, {num_deltas}]"
        raise ValueError(f"fold: coeffs must be {wanted}, got {tuple(coeffs.shape)}")
    return table if split else table[:, None]


def _check(
    bases: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    num_deltas: int,
    num_parts: int,
    parts: Sequence[Tensor] | None,
    masks: Sequence[Tensor] | None,
) -> None:
    for name, given in (("deltas", deltas), ("parts", parts), ("masks", masks)):
        if given is not None and len(given) != len(bases):
            raise ValueError(f"fold: {name} must be one for each of {len(bases)} bases, got {len(given)}")
    dtype = bases[0].dtype if bases else torch.float32
    device = bases[0].device if bases else None
    if dtype not in DTYPES:
        raise TypeError(f"fold: bases must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    mask_dtype = masks[0].dtype if masks else dtype
    if mask_dtype not in (torch.bool, dtype):
        raise TypeError(f"fold: masks must be torch.bool or {dtype} (bases), got {mask_dtype}")
    if parts and num_parts > 256:
        raise ValueError(f"fold: coeffs must have at most 256 parts, got {num_parts}")
    for l, base in enumerate(bases):
        if len(deltas[l]) != num_deltas:
            raise ValueError(f"fold: deltas[{l}] must be {num_deltas} tensors as deltas[0] is, got {len(deltas[l])}")
        if any(delta.requires_grad for delta in deltas[l]):
            raise ValueError(f"fold: deltas[{l}] must be frozen, got tensors that require a gradient")
        like = [("bases", base, dtype), *(("deltas", delta, dtype) for delta in deltas[l])]
        like += [("parts", parts[l], torch.uint8)] if parts else []
        like += [("masks", masks[l], mask_dtype)] if masks else []
        for name, tensor, wanted in like:
            if tensor.shape != base.shape:
                raise ValueError(
                    f"fold: {name}[{l}] must be {tuple(base.shape)} as its base is, got {tuple(tensor.shape)}"
                )
            if tensor.dtype != wanted:
                raise TypeError(f"fold: {name}[{l}] must be {wanted}, got {tensor.dtype} (bases[0] {dtype})")
            if tensor.device != device:
                raise ValueError(f"fold: {name}[{l}] must be on {device} as bases[0] is, got {tensor.device}")
        if parts and parts[l].numel() and int(parts[l].max()) >= num_parts:
            raise ValueError(f"fold: parts[{l}] must be below {num_parts}, got {int(parts[l].max())}")
