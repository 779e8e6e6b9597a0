"""Every backend and algorithm against the oracle, over the axes of `taps_fast.testing`."""

from __future__ import annotations

import pytest
import torch

from taps_fast import testing

LINEAR = [
    (c, *choice)
    for c in testing.linear_cases((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    for choice in testing.available("linear")
]
CONV2D = [
    (c, *choice)
    for c in testing.conv2d_cases((torch.float32, torch.bfloat16, torch.float64))
    for choice in testing.available("conv2d")
]


@pytest.mark.parametrize("case, backend, algorithm", LINEAR, ids=str)
def test_linear(case: testing.Case, backend: str, algorithm: str) -> None:
    testing.assert_close_to_oracle(case, backend, algorithm)


@pytest.mark.parametrize("case, backend, algorithm", CONV2D, ids=str)
def test_conv2d(case: testing.Case, backend: str, algorithm: str) -> None:
    testing.assert_close_to_oracle(case, backend, algorithm)
