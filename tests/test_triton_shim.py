"""What the other Triton tests rest on: the corrected interpreter, and the check of machine code."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sass_hazards import hazards, spills_in_loops
from triton_shim import DEVICE, INTERPRETED


@triton.jit
def round_trip_kernel(out_ptr, x_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), x.to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset))
    tl.store(out_ptr + offset, product)


@triton.jit
def add_kernel(out_ptr, x_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset) + tl.load(x_ptr + offset))


@triton.jit
def splat_kernel(out_ptr, limit, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    tl.store(out_ptr + offset, offset, mask=(offset >= 0) & (limit > 0))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype)
    round_trip_kernel[(1,)](out, x, SIZE=x.numel())
    return out


def test_bfloat16_casts_round_to_nearest_even():
    special = [1.0, 1.00390625, 1.01171875, -1.00390625, 3.3895e38, float("inf"), float("-inf"), 1e-40, 0.0]
    x = torch.cat([torch.tensor(special), torch.randn(247)]).to(DEVICE)
    assert torch.equal(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    assert torch.equal(cast(x.to(torch.bfloat16), torch.float32), x.to(torch.bfloat16).float())
    assert cast(torch.full((1,), float("nan"), device=DEVICE), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_products_of_16_bit_numbers(dtype):
    """Small integers: every partial sum is exact, whatever the order."""
    a, b = torch.randint(-8, 9, (2, 16, 16), device=DEVICE).to(dtype)
    out = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](out, a, b, SIZE=16)
    assert torch.equal(out, a.float() @ b.float())


def test_a_scalar_comparison_is_a_mask():
    out = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    splat_kernel[(1,)](out, 1, SIZE=4)
    assert out.tolist() == [0, 1, 2, 3]


def test_bfloat16_arithmetic_is_refused_where_it_would_be_garbage():
    x = torch.ones(4, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty_like(x)
    if INTERPRETED:
        with pytest.raises(Exception, match="no bfloat16 arithmetic"):
            add_kernel[(1,)](out, x, SIZE=4)
    else:
        add_kernel[(1,)](out, x, SIZE=4)
        assert torch.equal(out, x + x)


SASS = """
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   LDSM.16.M88.4 R4, [R100] ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0130*/                   {between} ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0150*/                   IADD3 R101, R101, 0x1, RZ ;
        /*0160*/              @!P0 BRA 0x100 ;
        /*0170*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("between", "pending", "writers"),
    (
        ("NOP", "0x0", []),
        ("FADD R8, R9, R10", "0x0", []),
        ("FADD R7, R9, R10", "0x0", ["FADD R7, R9, R10"]),
        ("STS [R100], R5", "0x0", []),
        # One group may stay in flight: the next iteration's load overwrites what it reads.
        ("NOP", "0x1", ["LDSM.16.M88.4 R4, [R100]"]),
    ),
)
def test_overwritten_operands_are_found(between, pending, writers):
    found = hazards(SASS.format(between=between, pending=pending))
    assert [hazard.write.text for hazard in found] == writers


def test_operands_in_shared_memory_are_safe():
    in_shared = SASS.replace("R24, R4, gdesc[UR8]", "R24, gdesc[UR4], gdesc[UR8]")
    assert hazards(in_shared.format(between="FADD R4, R9, R10", pending="0x1")) == []


def test_spills_count_in_loops_that_multiply():
    inside, outside = "LDL R9, [R1]", "NOP"
    assert spills_in_loops(SASS.format(between=inside, pending="0x0"), "HGMMA") == 1
    assert spills_in_loops(SASS.format(between=outside, pending="0x0"), "HGMMA") == 0
    assert spills_in_loops(SASS.format(between=inside, pending="0x0"), "FFMA") == 0
