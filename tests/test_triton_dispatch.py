"""Which kernels a problem gets on GPUs that this machine need not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from taps_fast.kernels import linear
from torch import Tensor
from torch._subclasses import FakeTensorMode

from taps_fast import _call, _dispatch, _ext, tasks
from taps_fast._problem import Problem
from taps_fast.functional import delta_linear

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Described(Exception):
    """Carries the problem of a call that goes no further."""


@pytest.fixture
def described(monkeypatch):
    """The problem that `delta_linear` makes of tensors on a GPU, which have no memory."""

    def stop(problem, *_):
        raise Described(problem)

    monkeypatch.setattr(_call, "select", stop)

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


CHIPS = ((9, 0), (8, 0), (7, 5))


@pytest.fixture
def three_chips(monkeypatch):
    """GPUs of three generations, the first of them the current one; the CUDA extension was built for it alone."""

    def properties(index=None):
        major, minor = CHIPS[index or 0]
        return SimpleNamespace(major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(_ext, "CUDA_ERROR", None)
    monkeypatch.setattr(_ext, "CUDA_CHIPS", [CHIPS[0]])
    _dispatch._cached_select.cache_clear()
    yield
    _dispatch._cached_select.cache_clear()


def test_the_device_of_the_tensors_decides(described, three_chips):
    """Not the current one, nor the one that an equal problem was on before."""
    problems = [described(*(torch.empty(4, 64, device=f"cuda:{n}") for _ in range(2))) for n in range(3)]
    assert [problem.gpu for problem in problems] == [0, 1, 2]
    chosen = [_dispatch.select(problem) for problem in problems]
    assert chosen == [("cuda", "stream"), ("triton", "split"), ("reference", "split")]
    text = [_dispatch.explain(problem) for problem in problems]
    assert "modelled for sm_80" in text[1] and "modelled for sm_80" not in text[0]
    assert "needs compute capability 8.0 or newer, the device is sm_75" in text[2]
    assert "the device has compute capability 7.5, taps_fast._C_cuda was built for others" in text[2]


def test_the_device_of_the_ids_decides(described, three_chips, monkeypatch):
    """Whose kernel groups a batch, and whose plans its rows."""
    planned = []
    plan = SimpleNamespace(task_plan=lambda ids, num_tasks: planned.append(ids.device.index) or (ids,) * 4)
    monkeypatch.setattr(tasks.torch.ops, "taps_fast", plan)
    for n in range(3):
        ids = torch.empty(4, dtype=torch.int64, device=f"cuda:{n}")
        tasks.grouped(ids, 2)
        assert linear._planned_by_extension(linear.Rows(ids, ids, ids, 4, 1), 2) is (n == 0)
    assert planned == [0]
