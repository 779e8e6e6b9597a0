"""Whole weights and deltas that are put back have storage of their own: what shares the old one keeps its values."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from nets import ConvNet, images, three_tasks
from torch import nn

from taps_fast import TapsModel

MIX = ["cars", "base", "cubs", "dogs"]


def values(state):
    return {name: value.detach().clone() for name, value in state.items()}


def assert_equal(state, want):
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)


@pytest.mark.parametrize("originals", ["disk", "memory"])
@torch.no_grad()
def test_a_state_dict_taken_before(originals):
    model, x = three_tasks(ConvNet()), images(4)
    state = model.state_dict()
    want, y = values(state), model(x, tasks=MIX)
    for undo in (model.unprepare, model.train):
        model.eval().prepare_inference(x, originals=originals)
        assert_equal(state, want)
        torch.testing.assert_close(model(x, tasks=MIX), y)
        undo()
        assert_equal(state, want)
        assert_equal(model.state_dict(), want)


@torch.no_grad()
def test_models_that_share_storage():
    """By load_state_dict(assign=True), and as torch.multiprocessing hands a model to another process."""
    model, x = three_tasks(ConvNet()), images(4)
    assigned = three_tasks(ConvNet())
    assigned.load_state_dict(model.state_dict(), assign=True)
    handed = pickle.loads(bytes(ForkingPickler.dumps(model)))
    shared = [twin.model.conv2.deltas["cubs"] for twin in (model, assigned, handed)]
    shared[0][0, 0, 0, 0] += 1
    assert all(torch.equal(twin, shared[0]) for twin in shared)
    y, want = model(x, tasks=MIX), values(model.state_dict())
    models = [assigned, handed, model]
    for prepared in models:
        prepared.prepare_inference()
        for each in models:
            torch.testing.assert_close(each(x, tasks=MIX), y)
    for prepared in models:
        prepared.unprepare()
        assert torch.equal(prepared(x, tasks=MIX), y)
    assert all(torch.equal(value, want[name]) for each in models for name, value in each.state_dict().items())


@torch.no_grad()
def test_copies_do_not_share_what_is_put_back():
    model, x = three_tasks(ConvNet()), images(4)
    y = model(x, tasks=MIX)
    model.prepare_inference(originals="memory")
    twin = copy.deepcopy(model)
    twin.unprepare()
    for layer in twin.conversion.layers.values():
        for delta in layer.deltas.values():
            delta.zero_()
    model.unprepare()
    assert torch.equal(model(x, tasks=MIX), y)


@pytest.mark.parametrize("parameters", ["two of one storage", "one"])
@torch.no_grad()
def test_tasks_that_share_a_delta(parameters):
    model = TapsModel(nn.Linear(4, 4), ["cubs", "cars"], gate="raw").eval()
    layer, x = model.conversion.layers[""], torch.randn(2, 4)
    layer.scores["cars"].fill_(2.0)
    delta = layer.deltas["cubs"]
    delta.normal_()
    if parameters == "one":
        layer.deltas["cars"] = delta
    else:
        layer.deltas["cars"].data = delta.data
    want, was = [model(x, tasks=task) for task in model.tasks], delta.clone()
    report = model.prepare_inference(x)
    for task, y in zip(model.tasks, want, strict=True):
        torch.testing.assert_close(model(x, tasks=task), y)
    why = "not baked for cubs, cars: no parameter of its own, which could hold a whole weight"
    assert [row.reason for row in report.of("left")] == ([why] if parameters == "one" else [])
    model.unprepare()
    assert torch.equal(layer.deltas["cubs"], was) and torch.equal(layer.deltas["cars"], was)


@pytest.mark.parametrize("originals", ["disk", "memory"])
@torch.no_grad()
def test_memory_and_strides(originals):
    """The old storage is given back, parameters and optimizers stay, and channels stay last."""
    model = three_tasks(ConvNet()).to(memory_format=torch.channels_last)
    deltas = [layer.deltas["cubs"] for layer in model.conversion.layers.values() if layer.is_open("cubs")]
    strides = [delta.stride() for delta in deltas]
    assert any(delta.dim() == 4 and not delta.is_contiguous() for delta in deltas)
    storages = [weakref.ref(delta.untyped_storage()) for delta in deltas]
    nbytes = [delta.untyped_storage().nbytes() for delta in deltas]
    for change in (lambda: model.prepare_inference(originals=originals), model.unprepare):
        change()
        gc.collect()
        assert not any(storage() for storage in storages)
        assert [delta.stride() for delta in deltas] == strides
        assert [delta.untyped_storage().nbytes() for delta in deltas] == nbytes
        storages = [weakref.ref(delta.untyped_storage()) for delta in deltas]
    now = [layer.deltas["cubs"] for layer in model.conversion.layers.values() if layer.is_open("cubs")]
    assert all(map(operator.is_, now, deltas))


@pytest.mark.parametrize("undone", [False, True])
def test_a_graph_of_before_refuses_its_backward(undone):
    model, x = three_tasks(ConvNet()), images(2)
    x.requires_grad_()
    y = model(x, tasks="cubs").sum()
    model.prepare_inference()
    if undone:
        model.unprepare()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
