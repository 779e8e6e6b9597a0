"""The Triton kernels of `fold`: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from folds import double, draw, plain, run
from taps_fast.kernels import fold as kernels
from triton_shim import DEVICE

from taps_fast.testing import assert_no_worse_than_torch

SHAPES = ((13, 11), (), (0, 3), (40, 53))
CASES = [(torch.float32, k, 1, None) for k in (0, 1, 5, 33)]
CASES += [(torch.bfloat16, 2, 1, None), (torch.float16, 2, 1, "soft"), (torch.float64, 2, 3, "soft")]
CASES += [(torch.float32, 3, 4, None), (torch.float32, 2, 1, "bool")]


@pytest.mark.parametrize(("dtype", "num_deltas", "num_parts", "mask"), CASES, ids=str)
def test_fold_is_no_worse_than_torch(dtype, num_deltas, num_parts, mask):
    inputs = draw(dtype, num_deltas, num_parts, mask, shapes=SHAPES)
    bases, deltas, coeffs, parts, masks, dweights = inputs
    low, ref = run(plain, *inputs), run(plain, *double(inputs))
    flat = [d.to(DEVICE) for each in deltas for d in each]
    bases, parts, masks, dweights = ([t.to(DEVICE) for t in ts] for ts in (bases, parts, masks, dweights))
    coeffs = coeffs.to(DEVICE)
    out = kernels.fold(bases, flat, coeffs, parts, masks)
    dcoeffs, dmasks = kernels.fold_grad(dweights, flat, coeffs, parts, masks, True, mask == "soft")
    for l in range(len(SHAPES)):
        assert_no_worse_than_torch(out[l], ref[0][l], low[0][l], name=f"weight {l}")
    scale = max((float(d.norm() * g.norm()) for d, g in zip((each[0] for each in deltas if each), inputs[5],
                 strict=False)), default=0.0)  # fmt: skip
    assert_no_worse_than_torch(dcoeffs, ref[1], low[1], scale=scale, name="dcoeffs")
    for a, b, c in zip(dmasks, ref[2][len(SHAPES) :], low[2][len(SHAPES) :], strict=True):
        assert_no_worse_than_torch(a, b, c, name="dmask")
    assert kernels.fold_grad(dweights, flat, coeffs, parts, masks, False, False)[0].numel() == 0
