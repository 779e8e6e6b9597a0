"""The judge itself: it accepts right results and refuses each kind of wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from taps_fast import testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def one_element(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[y.numel() // 2] += 0.5 * y.abs().max()
    return y


def one_row_scaled(y: Tensor) -> Tensor:
    y = y.clone()
    y[3] *= 1.05
    return y


def everything_scaled(y: Tensor) -> Tensor:
    return y * 1.005


def not_a_number(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[0] = float("nan")
    return y


BUGS: list[Callable[[Tensor], Tensor]] = [one_element, one_row_scaled, everything_scaled, not_a_number]


def results(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n = testing.make_inputs(testing.Case(dtype, rows=64, shape=(48, 96)))
    out = testing.ours("reference", "split")(n)
    return out.detach(), testing.oracle(n.to(torch.float64)).detach(), testing.plain_torch(n).detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_result_passes(dtype: torch.dtype) -> None:
    testing.assert_no_worse_than_torch(*results(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_result_fails(dtype: torch.dtype, bug: Callable[[Tensor], Tensor]) -> None:
    out, ref, low = results(dtype)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_no_worse_than_torch(bug(out), ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_input_fails(dtype: torch.dtype) -> None:
    n = testing.make_inputs(testing.Case(dtype, rows=64, shape=(48, 96)))
    _, ref, low = results(dtype)
    short = n.x.detach().clone()
    short[:, -1] = 0
    out = testing.functional.delta_linear(short, n.base, n.deltas, n.coeffs, n.bias, backend="reference")
    with pytest.raises(AssertionError, match="error"):
        testing.assert_no_worse_than_torch(out, ref, low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_coefficient_gradient_fails(dtype: torch.dtype) -> None:
    case = testing.Case(dtype, rows=64, shape=(48, 96), num_deltas=5)
    n = testing.make_inputs(case)
    out = testing.run(n, testing.ours("reference"))
    ref = testing.run(n.to(torch.float64), testing.oracle)
    low = testing.run(n, testing.plain_torch)
    scale = testing.sum_scales(n.to(torch.float64), ref)["dcoeffs"]
    testing.assert_no_worse_than_torch(out["dcoeffs"], ref["dcoeffs"], low["dcoeffs"], scale=scale)
    for wrong in (out["dcoeffs"].flip(0), out["dcoeffs"] * 1.05, torch.zeros_like(out["dcoeffs"])):
        with pytest.raises(AssertionError, match="error"):
            testing.assert_no_worse_than_torch(wrong, ref["dcoeffs"], low["dcoeffs"], scale=scale)


def test_shape_and_dtype_are_judged() -> None:
    out, ref, low = results(torch.bfloat16)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_no_worse_than_torch(out[:-1], ref, low)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_no_worse_than_torch(out.float(), ref, low)


def test_a_backend_that_changes_its_input_or_its_mind_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = testing.Case(rows=5)
    right = testing.ours

    def changes_input(backend: str | None, algorithm: str) -> Callable[[testing.Inputs], Tensor]:
        def call(n: testing.Inputs) -> Tensor:
            y = right("reference")(n)
            n.x.data[0, 0] += 1
            return y

        return call

    calls = []

    def changes_mind(backend: str | None, algorithm: str) -> Callable[[testing.Inputs], Tensor]:
        def call(n: testing.Inputs) -> Tensor:
            calls.append(1)
            return right("reference")(n) * (1 + 1e-7 * len(calls))

        return call

    monkeypatch.setattr(testing, "ours", changes_mind)
    with pytest.raises(AssertionError, match="from run to run"):
        testing.assert_close_to_oracle(case, None)
    monkeypatch.setattr(testing, "ours", changes_input)
    with pytest.raises(AssertionError, match="(input was changed|from run to run)"):
        testing.assert_close_to_oracle(case, None)
