"""Tasks are there as a whole or not at all, also for other threads, and after an error or an interrupt."""

from __future__ import annotations

import pytest
import torch
from nets import Transformer, images, three_tasks
from test_peft import folder, pair
from torch import nn

from taps_fast import FastTapsLinear, TapsModel
from taps_fast.nn import TaskHead
from taps_fast.nn.layer import TapsLayer


@pytest.fixture
def adding(tmp_path):
    """A model, and what adds a task to it in each way."""
    net = Transformer().double().eval()
    three_tasks(net).save_task("cars", tmp_path)
    lora = folder(tmp_path / "lora", pair("block.fc1", 16, 8))
    model = TapsModel(net, ["cubs"], head="fc")
    return model, {
        "add_task": lambda: model.add_task("cars", classes=5),
        "load_task": lambda: model.load_task(tmp_path),
        "load_lora": lambda: model.load_lora(lora, "cars", classes=5),
    }


@pytest.mark.parametrize("way", ["add_task", "load_task", "load_lora"])
@pytest.mark.parametrize("owner, method", [(TaskHead, "add_task"), (TapsLayer, "add_task"), (TapsLayer, "set_delta")])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_nothing_is_left_of_a_task_that_could_not_be_added(adding, way, owner, method, error, monkeypatch):
    model, ways = adding
    before, seen, original = list(model.state_dict()), [], getattr(owner, method)
    if method == "set_delta" and way != "load_lora":
        return

    def fail(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append(model.tasks)
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(owner, method, fail)
        ways[way]()
    assert seen == [["cubs"]] and model.tasks == ["cubs"] and list(model.state_dict()) == before
    assert model.conversion.head.widest == 7
    ways[way]()
    assert model.tasks == ["cubs", "cars"]
    assert torch.isfinite(model(images(2), tasks=["cars", "cubs"])[:, :5]).all()


@pytest.mark.parametrize("name", ["each", "values", "training"])
def test_names_that_a_layer_cannot_keep(name):
    model = TapsModel(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"TapsModel: task must be a name that .* is no attribute of .*got '{name}'"):
        model.add_task(name)
    assert model.tasks == []
    with pytest.raises(ValueError, match=f"FastTapsLinear: task must be a name .* got '{name}'"):
        FastTapsLinear(4, 4, tasks=[name])


def test_a_layer_alone_has_no_name_without_its_tensors(monkeypatch):
    layer = FastTapsLinear(4, 4)

    def fail(self, *args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(TapsLayer, "add_task", fail)
        layer.add_tasks(["cubs"])
    assert layer.context.tasks == []
    layer.add_tasks(["cubs"])
    assert layer(torch.randn(2, 4), tasks="cubs").shape == (2, 4)


@pytest.mark.parametrize("rows", [["cars", "dogs", None], [1, 2, -1], torch.tensor([1, 2, -1])])
def test_names_of_a_batch_are_those_of_one_moment(rows, monkeypatch):
    """Another thread removes a task after the names became ids."""
    model = three_tasks(nn.Sequential(nn.Linear(4, 4)), head=None)
    context = model.context
    on_host = type(context)._on_host

    def late(self, *args):
        self.tasks.remove("cubs")
        return on_host(self, *args)

    monkeypatch.setattr(type(context), "_on_host", late)
    assert context.resolve(rows).mix.tasks == ("cars", "dogs")
