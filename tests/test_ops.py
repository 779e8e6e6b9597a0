"""Every backend and algorithm against the oracle, over the axes of `taps_fast.testing`."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from taps_fast import _autograd, _ops, testing

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


ELSEWHERE = {"batch_norm", "group_norm"}
"""Of a CPU alone, as `taps_fast.norms` asks before."""
EXTENSION = {"linear_stream"}
"""Of an extension that is asked for before."""


def test_what_autograd_calls_runs_on_every_device() -> None:
    """Also one that is not here: interpreted kernels are called past the dispatcher, which must find them."""
    called = set(re.findall(r"\bops\.(\w+)", inspect.getsource(_autograd))) - {"taps_fast"}
    assert {"linear_grad", "conv2d_grad", "linear_fwd"} <= called <= _ops.SCHEMAS.keys()
    has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    for device in ("CPU", "CUDA"):
        missing = {name for name in called if not has(f"taps_fast::{name}", device)}
        assert {name for name in missing - EXTENSION if not name.startswith(tuple(ELSEWHERE))} <= (
            {"conv2d_implicit"} if device == "CPU" else set()
        )
