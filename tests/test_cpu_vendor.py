"""Both gradients of a linear layer's one weight, by PyTorch's products in place of the kernels'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import taps_fast  # noqa: F401  registers the operators

OPS = torch.ops.taps_fast


@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("base_coeff", [None, 0.0, 0.5])
def test_gradients_by_pytorchs_products(rows: int, base_coeff: float | None) -> None:
    """Every result, the weight summed where one of them will lie; a closed delta of NaN spoils nothing but its dot."""
    g = torch.Generator().manual_seed(rows)
    dy, x, base, *deltas = (torch.randn(n, generator=g) for n in ((1, 30), (rows, 40), *[(30, 20)] * 4))
    dy, x, coeffs = dy.expand(rows, 30), x[:, ::2], torch.tensor([0.5, 0.0, 1.0])
    deltas[1][3, 3] = float("nan")
    scale = None if base_coeff is None else torch.tensor([base_coeff])
    alone = (None, None, None, 1)

    def run(dtype: torch.dtype, algorithm: str, *asked: object) -> list[Tensor]:
        weight = (base.to(dtype), [d.to(dtype) for d in deltas], coeffs.to(dtype))
        bases = None if scale is None else scale.to(dtype)
        dx, dcoeffs, ddeltas, dbase, dbias = OPS.linear_grad(
            dy.to(dtype), x.to(dtype), *weight, bases, *alone, algorithm, *asked, True
        )
        return [dx, dcoeffs, *ddeltas, dbase, dbias]

    for need_dx in (False, True):
        for wanted in (([], [0, 1, 2], True, True), ([2], [1], True, False), ([], [2, 0], False, False)):
            found, again = (run(torch.float32, "merge", need_dx, *wanted) for _ in range(2))
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))
            assert len({t.data_ptr() for t in found if t.numel()}) == sum(t.numel() > 0 for t in found)
            for got, want in zip(found, run(torch.float64, "blend", need_dx, *wanted), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_pytorchs_products_are_taken_where_they_are_faster() -> None:
    """On Intel's cores, of one weight of float32 whose gradient is wanted, with many rows."""
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()
    base, coeffs, alone = torch.randn(30, 20), torch.ones(1), (None, None, None, 1)

    def products(rows: int, dtype: torch.dtype, algorithm: str, ddeltas_for: list[int]) -> int:
        x, dy, w = torch.randn(rows, 20).to(dtype), torch.randn(rows, 30).to(dtype), base.to(dtype)
        with torch.profiler.profile() as found:
            OPS.linear_grad(dy, x, w, [w], coeffs, None, *alone, algorithm, True, [], ddeltas_for, True, False, False)
        return sum(event.name == "aten::mm" for event in found.events())

    assert products(256, torch.float32, "blend", [0]) == (2 if intel else 0)
    assert products(1, torch.float32, "merge", [0]) == 2
    rest = ((255, torch.float32, "blend", [0]), (256, torch.float32, "split", [0]), (256, torch.float32, "blend", []))
    for call in (*rest, (256, torch.bfloat16, "blend", [0])):
        assert products(*call) == 0
    for call in ((256, torch.bfloat16, "merge", [0]), (256, torch.float32, "merge", [])):
        with pytest.raises(
            RuntimeError, match="merge must be one weight of contiguous float32 whose gradient is wanted"
        ):
            products(*call)
