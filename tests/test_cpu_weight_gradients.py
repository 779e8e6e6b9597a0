"""linear_dw on a CPU: which weights it reads, and how those that lie transposed and their gradients do."""

from __future__ import annotations

import pytest
import torch
from test_cpu_kernels import FLOATS, NO_GROUPS, OPS

from taps_fast.tasks import TaskBatch


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tasks", [None, (1, 0, -1, 1, 2)], ids=["one", "mixed"])
def test_gradients_of_weights_that_lie_transposed_do_so_too(tasks: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base, *deltas = (torch.randn(70, 37).to(dtype).t() for _ in range(4))
    x, dy = torch.randn(25, 70).to(dtype), torch.randn(25, 37).to(dtype)
    coeffs = torch.randn(3, 3).to(wide) if tasks else torch.randn(3).to(wide)
    groups = (*TaskBatch.from_ids(torch.tensor(tasks), 3).tensors, 5) if tasks else NO_GROUPS
    rest = (coeffs, None, *groups, [1], [0, 2], True, True, True)
    dcoeffs, ddeltas, dbase, dbias = OPS.linear_dw(dy, x, base, deltas, *rest)
    rows = (base.contiguous(), [delta.contiguous() for delta in deltas])
    want = OPS.linear_dw(dy, x, *rows, *rest)
    for got, should in zip((dcoeffs, *ddeltas, dbase, dbias), (want[0], *want[1], *want[2:]), strict=True):
        torch.testing.assert_close(got, should)
    assert all(gradient.t().is_contiguous() for gradient in (*ddeltas, dbase))
    torch.library.opcheck(OPS.linear_dw, (dy, x, base, deltas, *rest))


def test_only_deltas_that_a_coefficient_asks_for_are_read() -> None:
    """What is read of others, strided here, would be copied first."""
    strided = torch.full((6, 8, 2), float("nan"))[..., 0]
    arguments = (
        torch.ones(3, 6),
        torch.ones(3, 8),
        strided,
        [torch.ones(6, 8), strided],
        torch.ones(2),
        None,
        *NO_GROUPS,
    )
    dcoeffs, (ddelta,), *_ = OPS.linear_dw(*arguments, [0], [1], True, False, False)
    assert dcoeffs.tolist() == [144.0, 0.0]
    assert ddelta.unique().tolist() == [3.0]
