"""A network's deltas folded into its weights, and the gradients of the coefficients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import merge
from ._arguments import cdiv, grid, pointers
from ._launch import direct
from ._tiles import pick

BLOCK = 1024
REGISTERS = 255  # left to its own guess, the assembler spills
STEPS = 8  # blocks that one program of the gradient sums before it writes


@direct
@triton.jit
def fold_kernel(
    out_ptr,
    in_ptr,
    deltas,
    coeffs_ptr,
    masks_ptr,
    parts_ptr,
    size,
    K,
    dtype: tl.constexpr,
    wide: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    PRODUCT: tl.constexpr,
    TABLE: tl.constexpr,
):
    """out = in + mask ∘ Σ_k c_k·delta_k, or with PRODUCT out = in ∘ Σ_k c_k·delta_k; c of each element's part."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < size
    part = 0
    if PARTS:
        part = tl.load(parts_ptr + element, mask=real, other=0).to(tl.int32)
    acc = tl.zeros((BLOCK,), wide)
    for k in tl.range(0, K):
        c = tl.load(coeffs_ptr + part * K + k)
        # What every element's own part decides is no mask of a load: each element would be a load of its own.
        wanted = real if PARTS else real & (c != 0.0)
        delta = tl.load(pick(deltas, k, dtype, TABLE) + element, mask=wanted, other=0.0).to(wide)
        acc += tl.where(c != 0.0, c * delta, 0.0)
    into = tl.load(in_ptr + element, mask=real, other=0.0).to(wide)
    if PRODUCT:
        total = into * acc
    elif MASKED:
        total = into + tl.load(masks_ptr + element, mask=real, other=0).to(wide) * acc
    else:
        total = into + acc
    tl.store(out_ptr + element, total.to(dtype), mask=real)


@direct
@triton.jit
def fold_grad_kernel(
    partials_ptr,
    dweight_ptr,
    deltas,
    masks_ptr,
    parts_ptr,
    size,
    K,
    P,
    dtype: tl.constexpr,
    wide: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """partials[program, p, k] = Σ over the program's elements of part p of dweight·mask·delta_k."""
    program = tl.program_id(0).to(tl.int64)
    for k in tl.range(0, K):
        for p in tl.range(0, P):
            total = tl.zeros((BLOCK,), wide)
            for step in tl.range(0, STEPS):
                element = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
                real = element < size
                g = tl.load(dweight_ptr + element, mask=real, other=0.0).to(wide)
                if MASKED:
                    g *= tl.load(masks_ptr + element, mask=real, other=0).to(wide)
                g *= tl.load(pick(deltas, k, dtype, TABLE) + element, mask=real, other=0.0).to(wide)
                if PARTS:
                    g = tl.where(tl.load(parts_ptr + element, mask=real, other=0).to(tl.int32) == p, g, 0.0)
                total += g
            tl.store(partials_ptr + (program * P + p) * K + k, tl.sum(total, axis=0))


def fold(
    bases: list[Tensor], deltas: list[Tensor], coeffs: Tensor, parts: list[Tensor], masks: list[Tensor]
) -> list[Tensor]:
    """Each base and delta is read once, each weight written once; without parts and masks all tensors in one launch."""
    types = {base.dtype for base in bases}
    if not parts and not masks and len(types) == 1 and types != {torch.float64}:
        return merge.fold(bases, deltas, coeffs)
    return [_folded(l, base, deltas, coeffs, parts, masks, product=False) for l, base in enumerate(bases)]


def fold_grad(
    dweights: list[Tensor],
    deltas: list[Tensor],
    coeffs: Tensor,
    parts: list[Tensor],
    masks: list[Tensor],
    need_dcoeffs: bool,
    need_dmasks: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Two stages in a fixed order, without atomics."""
    dmasks = []
    if need_dmasks:
        dmasks = [_folded(l, d, deltas, coeffs, parts, [], product=True) for l, d in enumerate(dweights)]
    if not need_dcoeffs:
        return coeffs.new_empty(0), dmasks
    _, num_parts, num_deltas = coeffs.shape
    found = []
    for l, dweight in enumerate(dweights):
        own = deltas[l * num_deltas : (l + 1) * num_deltas]
        programs = cdiv(dweight.numel(), BLOCK * STEPS)
        partials = coeffs.new_empty(programs, num_parts, num_deltas)
        if programs and own:
            with torch.cuda.device_of(dweight):
                argument, table = pointers(own)
                fold_grad_kernel[grid(programs, *dweight.shape)](
                    partials, dweight, argument, masks[l] if masks else dweight, parts[l] if parts else dweight,
                    dweight.numel(), num_deltas, num_parts, _dtype(dweight), _dtype(coeffs), BLOCK, STEPS,
                    bool(masks), bool(parts), table, maxnreg=REGISTERS,
                )  # fmt: skip
        found.append(partials.sum(0))
    return torch.stack(found) if found else torch.zeros_like(coeffs), dmasks


def _folded(
    l: int, start: Tensor, deltas: list[Tensor], coeffs: Tensor, parts: list[Tensor], masks: list[Tensor], product: bool
) -> Tensor:
    num_deltas = coeffs.shape[2]
    own = deltas[l * num_deltas : (l + 1) * num_deltas]
    out = torch.empty_like(start)
    if start.numel():
        with torch.cuda.device_of(start):
            argument, table = pointers(own or [start])
            fold_kernel[grid(cdiv(start.numel(), BLOCK), *start.shape)](
                out, start, argument, coeffs[l], masks[l] if masks else start, parts[l] if parts else start,
                start.numel(), num_deltas, _dtype(start), _dtype(coeffs), BLOCK, bool(masks), bool(parts), product,
                table, maxnreg=REGISTERS,
            )  # fmt: skip
    return out


def _dtype(tensor: Tensor) -> tl.dtype:
    kinds = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    return kinds[tensor.dtype]
