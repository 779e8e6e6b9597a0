"""`tuned.json`: what is modelled follows from what is assumed, a measurement replaces it, and dispatch says which."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from taps_fast import _dispatch, _ext, _tuned
from taps_fast._problem import Problem

ENTRY = {"op": "linear", "arch": "sm_90", "dtype": "bfloat16", "tb_per_s": 4.3, "tflops": 600, "measured": None}


@pytest.fixture
def table(monkeypatch):
    """Puts another table in place of the file's."""

    def use(entries):
        monkeypatch.setattr(_tuned, "CROSSOVERS", _tuned.crossovers(entries))

    return use


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(_tuned, "arch", lambda index=None: "sm_90")
    monkeypatch.setitem(_dispatch._REASONS, "triton", lambda problem: iter(()))


def problem(rows: int, tasks: int | None = None) -> Problem:
    return Problem("linear", "cuda", torch.bfloat16, (64, 64), rows, 1, tasks, grad=False)


def test_every_chip_has_every_dtype_and_what_is_measured_says_where():
    entries = _tuned.DATA["crossovers"]
    kinds = {(e["op"], e["arch"], e["dtype"]) for e in entries}
    assert len(kinds) == len(entries)
    assert kinds >= {("linear", a, d) for a in ("sm_80", "sm_90", "sm_100", "other") for d in _tuned.ITEMSIZE}
    assert all(e["measured"] is None or {"device", "date"} <= e.keys() for e in entries)


def test_the_model_is_the_formula_in_the_docstring():
    """600 TFLOP/s and 4.3 TB/s: three tensors of two bytes cost as much as 2·418 flops an element."""
    assert _tuned.modelled_rows(ENTRY) == round(3 * 2 * 600e12 / (2 * 4.3e12)) == 419


def test_a_chip_nobody_knows_uses_other():
    assert _tuned.crossover("linear", "sm_75", torch.float16) == _tuned.crossover("linear", "other", torch.float16)
    with pytest.raises(KeyError):
        _tuned.crossover("linear", "sm_90", torch.int8)


def test_a_chip_that_is_like_another_uses_its_entries():
    assert _tuned.LIKE["sm_103"] == "sm_100"
    for op, dtype in (("linear", torch.bfloat16), ("conv2d", torch.float32)):
        assert _tuned.crossover(op, "sm_103", dtype) == _tuned.crossover(op, "sm_100", dtype)
        assert _tuned.crossover(op, "sm_103", dtype) != _tuned.crossover(op, "other", dtype)


def test_a_measurement_replaces_the_model(table, on_hopper):
    other = ENTRY | {"arch": "other"}
    table([ENTRY, other])
    assert _tuned.crossover("linear", "sm_90", torch.bfloat16).source == (
        "modelled for sm_90 from 4.3 TB/s and 600 TFLOP/s, not measured"
    )
    assert _dispatch._select(problem(418), None, "auto") == ("triton", "split")
    assert _dispatch._select(problem(419), None, "auto") == ("triton", "merge")
    assert _dispatch._select(problem(8 * 418, tasks=8), None, "auto") == ("triton", "split")
    table([ENTRY | {"measured": 100, "device": "some GPU", "date": "2030-01-01"}, other])
    assert _dispatch._select(problem(100), None, "auto") == ("triton", "merge")
    text = _dispatch.explain(problem(99))
    assert "->  triton    split  two products" in text
    assert "rows a task < 100 (measured on some GPU, 2030-01-01)" in text


@pytest.mark.parametrize(
    ("built", "served"),
    (([(8, 0)], False), ([(8, 0), (9, 0)], True), ([(10, 0), (9, 0)], True), ([(9, 1)], False)),
    ids=str,
)
def test_a_chip_that_the_extension_was_not_built_for_is_refused(built, served, on_hopper, monkeypatch):
    """Then Triton's kernels serve it, and `explain` says why; all of it can be traced."""
    chip = SimpleNamespace(major=9, minor=0)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda index: chip)
    monkeypatch.setattr(_ext, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(_ext, "CUDA_ERROR", None)
    monkeypatch.setattr(_ext, "CUDA_CHIPS", built)
    chosen = _dispatch._select(problem(4), None, "auto")
    assert chosen == (("cuda", "stream") if served else ("triton", "split"))
    refused = "no  cuda      stream the device has compute capability 9.0, taps_fast._C_cuda was built for others. To "
    assert (refused in _dispatch.explain(problem(4))) != served

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if _dispatch.select(problem(x.shape[0])).backend == "cuda" else 3)

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=False)
    assert compiled(torch.ones(4)).eq(2 if served else 3).all()


def test_the_file_is_written_as_it_is_read(tmp_path):
    copy = tmp_path / "tuned.json"
    _tuned.save(_tuned.DATA, copy)
    assert copy.read_text() == _tuned.PATH.read_text()
    assert json.loads(copy.read_text()) == _tuned.DATA


def test_choosing_for_a_gpu_can_be_traced(on_hopper):
    """torch.compile takes the crossover for a constant; it does not read files."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if _dispatch.select(problem(x.shape[0]), "triton").algorithm == "split" else 3)

    compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=False)
    assert compiled(torch.ones(4)).eq(2).all()
    assert compiled(torch.ones(500)).eq(3).all()
