"""Many layers' weights in one launch: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from taps_fast.kernels import _arguments, merge
from triton_shim import DEVICE

from taps_fast import _fold
from taps_fast.testing import assert_no_worse_than_torch

SHAPES = ((5, 7), (3, 2, 3, 3), (1,), (0, 4), (70, 61), (16, 9))


def layers(dtype: torch.dtype, num_deltas: int, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    bases = [torch.randn(s, generator=g).to(DEVICE, dtype) for s in shapes]
    deltas = [torch.randn(b.shape, generator=g).to(DEVICE, dtype) for b in bases for _ in range(num_deltas)]
    return bases, deltas, torch.randn(len(shapes), 1, num_deltas, generator=g).to(DEVICE)


def check(bases, deltas, coeffs):
    """Against the reference in float64, by the rule of `taps_fast.testing`."""
    got = merge.fold(bases, deltas, coeffs)
    double = [[t.double() for t in ts] for ts in (bases, deltas)]
    ref = _fold.fold(*double, coeffs.double(), [], [])
    low = _fold.fold(bases, deltas, coeffs, [], [])
    for weights in zip(got, ref, low, strict=True):
        assert_no_worse_than_torch(*weights)


@pytest.mark.parametrize("num_deltas", (0, 1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_weights_of_many_layers(dtype, num_deltas):
    """Layers of all sizes, over and under one program's; more addresses than one launch writes into a table."""
    bases, deltas, coeffs = layers(dtype, num_deltas, SHAPES * 3)
    assert 2 * len(bases) > _arguments.ARGUMENTS
    check(bases, deltas, coeffs)


def test_more_deltas_than_are_looked_at_together():
    bases, deltas, coeffs = layers(torch.float32, 70, ((7, 9), (3,)))
    coeffs[:, :, 5:60] = 0.0
    check(bases, deltas, coeffs)


def test_closed_deltas_are_not_read():
    bases, deltas, coeffs = layers(torch.float32, 2)
    deltas[1].fill_(float("nan"))
    coeffs[0, 0, 1] = 0.0
    assert all(w.isfinite().all() for w in merge.fold(bases, deltas, coeffs))


def test_nothing_to_fold():
    (got,) = merge.fold([torch.empty(0, 3, device=DEVICE)], [], torch.empty(1, 1, 0, device=DEVICE))
    assert got.shape == (0, 3)
