"""Tasks that a call does not name cost it nothing: they may be thousands."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from taps_fast import TapsModel
from taps_fast.nn import head, norm, per_task


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()


def calls(function, *args, **kwargs):
    """How many functions it calls, those in C included."""
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function(*args, **kwargs)
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


def test_new_tasks(tmp_path):
    model = TapsModel(network(), ["first"], head="4")
    model.save_task("first", tmp_path)
    found = []
    for count in (1, 101):
        while len(model.tasks) < count:
            model.add_task(f"of {count}, {len(model.tasks)}")
        added = calls(model.add_task, f"added to {count}", classes=5)
        found.append((added, calls(model.load_task, tmp_path, name=f"loaded into {count}")))
    assert all(abs(few - many) < 100 for few, many in zip(*found, strict=True)), found


def test_the_widest_head():
    """Found among the heads that are left, when one goes."""
    model = TapsModel(network(), head="4")
    for task, classes in (("a", 5), ("b", 7), ("c", 2)):
        model.add_task(task, classes=classes)
    x, widths = torch.randn(2, 6), []
    for task in ("c", "b", "a"):
        widths.append(model(x, tasks=[None, task]).shape[1])
        model.remove_task(task)
    assert [*widths, model(x, tasks=[None, None]).shape[1]] == [7, 7, 5, 3]


@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_batches_of_few_tasks(prepared, monkeypatch):
    """Also of a prepared model, whose layers have tables of all."""
    model, x = TapsModel(network(), [f"t{i}" for i in range(20)], head="4").eval(), torch.randn(4, 6)
    for parameter in model.parameters():
        parameter.add_(torch.rand_like(parameter))
    mixes = ["t3", "t7", "base", "t3"], ["t7"] * 4, ["base"] * 4, torch.tensor([-1, 19, 0, 0])
    want = [model(x, tasks=tasks) for tasks in mixes]
    if prepared:
        model.prepare_inference(x)
    touched = []

    def counted(modules, *settings):
        touched.append(len(modules))
        return per_task.ordinary(modules, *settings)

    for module in (head, norm):
        monkeypatch.setattr(module, "ordinary", counted)
    seen = []
    for tasks, y in zip(mixes, want, strict=True):
        touched.clear()
        torch.testing.assert_close(model(x, tasks=tasks), y)
        seen.append(max(touched))
    assert seen == [3, 2, 1, 3]  # with the base
