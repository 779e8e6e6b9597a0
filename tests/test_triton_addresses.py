"""Offsets beyond 2**31 elements, without the memory: strides are huge, and only pages that hold data exist."""

from __future__ import annotations

import pytest
import torch
from taps_fast.kernels import linear
from triton_shim import DEVICE, INTERPRETED

from taps_fast.tasks import TaskBatch

ROOM = 2**32 + 2**16
"""Elements. Every stride is less than 2**31, so that it is the product with an index that does not fit."""
SHAPES = {0: (4, 4), 1: (2, 132)}
STRIDES = {0: (2**30, 1), 1: (1, 2**24 + 2**18)}
"""By the axis that is far. Columns are many, so that the loop over them takes a second step."""


@pytest.fixture
def far_tensor(tmp_path):
    """Makes tensors that end beyond 2**31 elements: in a sparse file, or on a device."""
    if INTERPRETED:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=ROOM, dtype=torch.float16)
    else:
        room = torch.empty(ROOM, dtype=torch.float16, device=DEVICE)
    used = 0

    def make(values: torch.Tensor, far_axis: int) -> torch.Tensor:
        nonlocal used
        tensor = room[used:].as_strided(values.shape, STRIDES[far_axis])
        used += 256
        return tensor.copy_(values)

    return make


@pytest.mark.parametrize("far_axis", (0, 1))
def test_every_operand_may_be_far(far_tensor, far_axis):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g).half().to(DEVICE)

    rows, features = SHAPES[far_axis]
    x, dy, base, delta = (draw(n, features) for n in (rows, rows, features, features))
    near = dict(x=x, dy=dy, base=base, delta=delta)
    far = {name: far_tensor(t, far_axis) for name, t in near.items()}
    index = TaskBatch.from_ids(torch.tensor([1, 0], device=DEVICE), 2).tensors

    def run(t, coeffs, tasks):
        weight = (t["base"], [t["delta"]], coeffs, None)
        y = linear.linear_fwd(t["x"], *weight, None, *tasks, 1, "split")
        dx = linear.linear_dx(t["dy"], *weight, *tasks, 1, "split")
        dcoeffs, ddeltas, dbase = linear.linear_dw(t["dy"], t["x"], *weight, *tasks, 1, [], [0], True, True)
        return y, dx, dcoeffs, *ddeltas, dbase

    one, each = torch.tensor([0.5], device=DEVICE), torch.tensor([[0.5], [2.0]], device=DEVICE)
    for weights in ((one, (None, None, None)), (each, index)):
        for got, expected in zip(run(far, *weights), run(near, *weights), strict=True):
            assert torch.equal(got, expected)


def test_results_may_be_far(far_tensor, monkeypatch):
    """y and dx are written row by row: the last row is put beyond 2**31 elements."""
    x, base = torch.randn(4, 16, device=DEVICE).half(), torch.randn(16, 16, device=DEVICE).half()
    none = torch.empty(0, device=DEVICE)
    near = linear.linear_fwd(x, base, [], none, None, None, None, None, None, 1, "split")
    far = far_tensor(torch.zeros(4, 16, device=DEVICE), 0)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **how: far if size == (4, 16) else new_empty(self, *size, **how)
    )
    got = linear.linear_fwd(x, base, [], none, None, None, None, None, None, 1, "split")
    assert got is far
    assert torch.equal(far, near)
