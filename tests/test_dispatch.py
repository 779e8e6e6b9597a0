"""Which kernels a problem gets on GPUs that this machine need not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from taps_fast import _dispatch, functional
from taps_fast._problem import Problem
from taps_fast.functional import delta_linear


class Described(Exception):
    """Carries the problem of a call that goes no further."""


@pytest.fixture
def described(monkeypatch):
    """The problem that `delta_linear` makes of tensors on a GPU, which have no memory."""

    def stop(problem, *_):
        raise Described(problem)

    monkeypatch.setattr(functional, "select", stop)

    def describe(x: Tensor, base: Tensor) -> Problem:
        with pytest.raises(Described) as caught, torch.no_grad():
            delta_linear(x, base, [base], x.new_ones(1, dtype=torch.float32))
        return caught.value.args[0]

    with FakeTensorMode():
        yield describe


@pytest.fixture
def kernels_run(monkeypatch):
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(_dispatch._REASONS, backend, lambda problem: iter(()))


def test_weights_whose_rows_are_not_contiguous_do_not_stream_by_themselves(described, kernels_run):
    """The kernel would copy base and every delta; the other reads them as they lie."""
    x, base = torch.empty(4, 64, device="cuda:0"), torch.empty(64, 64, device="cuda:0")
    plain, turned = described(x, base), described(x, base.t())
    assert (plain.turned, turned.turned) == (False, True)
    assert _dispatch._select(plain, None, "auto") == ("cuda", "stream")
    assert _dispatch._select(turned, None, "auto") == ("triton", "split")
    for backend, algorithm in (("cuda", "auto"), (None, "stream")):
        assert _dispatch._select(turned, backend, algorithm) == ("cuda", "stream")
    assert not described(
        x.narrow(1, 0, 1), base.t().narrow(1, 0, 1)
    ).turned  # of one in feature, whose stride says nothing
