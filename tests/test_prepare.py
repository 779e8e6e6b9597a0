"""A prepared model outside its forwards: what it saves, what it refuses, and a preparation that fails."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import shutil
import tempfile
import warnings

import pytest
import torch
from nets import ConvNet, images, perturb, three_tasks
from torch import nn

from taps_fast import FastTapsLinear, TapsModel, _prepare
from taps_fast.nn import layer


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("net", [Twice(), nn.Linear(4, 4)], ids=["a layer under two names", "a layer as the model"])
def test_state_dict(net):
    model = perturb(TapsModel(net, ["dogs", "cubs"])).eval()
    model.reopen("cubs")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = {key: value.clone() for key, value in model.model.state_dict().items()}
    model.prepare_inference()
    assert model.conversion.layers[next(iter(model.conversion.layers))].baked
    for state, want in ((model.state_dict(), before), (model.model.state_dict(), part)):
        assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)


@pytest.mark.parametrize("where", [(layer.TapsLayer, "freeze"), (_prepare, "regions")], ids=["freeze", "regions"])
@torch.no_grad()
def test_an_interrupt_changes_nothing(where, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    model, x = three_tasks(ConvNet()), images(2)
    before, want = copy.deepcopy(model.state_dict()), model(x, tasks="cubs")
    monkeypatch.setattr(*where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.prepare_inference()
    assert model.prepared is None and not any(each.baked or each.frozen for each in model.conversion.layers.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x, tasks="cubs"), want)


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupt_while_baking_changes_nothing(at, monkeypatch):
    model = three_tasks(ConvNet())
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(layer, "put", interrupting(layer.put, at))
    with pytest.raises(KeyboardInterrupt):
        model.prepare_inference(originals="memory")
    assert model.prepared is None and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def interrupting(call, at):
    """``call``, which is interrupted after its call number ``at``."""
    calls = itertools.count(1)

    def run(*args):
        call(*args)
        if next(calls) == at:
            raise KeyboardInterrupt

    return run


def failing(call, at):
    """``call``, which raises from its call number ``at`` on."""
    calls = itertools.count(1)

    def run(*args):
        if next(calls) >= at:
            raise OSError("unreadable")
        return call(*args)

    return run


@pytest.mark.parametrize("at", range(1, 7))
def test_deltas_that_cannot_be_read(at, monkeypatch):
    """However far unprepare came: forwards are right, nothing can change the model, and a second try ends it."""
    model, x, mix = three_tasks(ConvNet()), images(4), ["cars", "base", "cubs", "cubs"]
    before, want = copy.deepcopy(model.state_dict()), [model(x, tasks=tasks) for tasks in ("cubs", mix)]
    model.prepare_inference(x)
    assert sum(len(each.baked) for each in model.conversion.layers.values()) > 4
    with monkeypatch.context() as patch:
        patch.setattr(_prepare, "load_file", failing(_prepare.load_file, at))
        with pytest.raises(OSError, match="unreadable"):
            model.train()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for tasks, y in zip(("cubs", mix), want, strict=True):
                torch.testing.assert_close(model(x, tasks=tasks), y)
    with pytest.raises(RuntimeError, match="the model must not be prepared for inference"):
        model.add_task("birds")
    torch.testing.assert_close(model.merge("cubs")(x), want[0])
    model.unprepare()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x, tasks=mix), want[1])


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupt_while_deltas_are_put_back(interrupted, monkeypatch):
    """A layer of which only some are back refuses, and a second try ends it."""
    model, x = three_tasks(ConvNet()), images(2)
    want = model(x, tasks="cubs")
    model.prepare_inference(x)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "put", interrupting(layer.put, interrupted))
        with pytest.raises(KeyboardInterrupt):
            model.unprepare()
    for call in (lambda: model(x, tasks="cubs"), lambda: model.merge("cubs")):
        with pytest.raises(RuntimeError, match="conv2: its deltas must all be put back first, got some"):
            call()
    model.unprepare()
    assert torch.equal(model(x, tasks="cubs"), want)


def test_a_preparation_that_cannot_be_undone(monkeypatch):
    model, x, mix = three_tasks(ConvNet()), images(2), ["cubs", "dogs"]
    want = model(x, tasks=mix)
    with monkeypatch.context() as patch:
        patch.setattr(_prepare, "regions", failing(None, 1))
        patch.setattr(_prepare, "load_file", failing(_prepare.load_file, 4))
        with pytest.raises(OSError, match="unreadable"):
            model.prepare_inference()
    torch.testing.assert_close(model(x, tasks=mix), want)
    model.unprepare()
    assert torch.equal(model(x, tasks=mix), want)


def test_a_folder_of_deltas_that_is_gone(tmp_path, monkeypatch):
    """As after a cleaner of temporary files: what needs a delta says so, what does not goes on."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, x = three_tasks(ConvNet()), images(2)
    want = model(x, tasks="cubs")
    model.prepare_inference(x)
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    for call in (model.train, model.state_dict, lambda: model.save_task("cubs", tmp_path / "task")):
        with pytest.raises(RuntimeError, match=r"got no .*\d.safetensors: the delta of conv2.cubs is lost"):
            call()
    for run in (lambda: model(x, tasks="cubs"), lambda: model.merge("cubs")(x)):
        torch.testing.assert_close(run(), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_a_forked_process_leaves_the_originals_to_the_first():
    kept = _prepare.Originals("disk", {"a": torch.ones(2)})
    folder = kept._file("a").parent
    child = os.fork()
    if child == 0:
        del kept
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(kept.read("a"), torch.ones(2))
    del kept
    assert not folder.exists()


def test_an_input_that_the_model_cannot_take():
    model = three_tasks(ConvNet())
    with pytest.raises((RuntimeError, ValueError), match="channels"):
        model.prepare_inference(images(2)[:, :2])
    assert model.prepared is None and not any(each.baked for each in model.conversion.layers.values())


def test_what_is_made_under_inference_mode_can_be_prepared_and_trained(tmp_path):
    model, x = three_tasks(ConvNet()), images(2)
    model.save_task("cubs", tmp_path / "cubs")
    with torch.inference_mode():
        model.load_task(tmp_path / "cubs", name="loaded")
        model.add_task("added", classes=3)
        model.compress("dogs", "lowrank", rank=1)
        alone = FastTapsLinear(4, 4)
        alone.add_tasks(["cubs"])
        want = model(x, tasks="loaded")
        torch.testing.assert_close(model.prepare_inference(x) and model(x, tasks="loaded"), want)
    owned = [p for task in model.train().tasks for group in model.task_parameters(task) for p in group["params"]]
    assert not any(p.is_inference() for p in (*owned, *alone.deltas.values()))


@torch.no_grad()
def test_a_delta_that_cannot_be_changed_is_not_baked():
    model, x = three_tasks(ConvNet()), images(2)
    with torch.inference_mode():
        model = copy.deepcopy(model)
    want = model(x, tasks="cubs")
    report = model.prepare_inference()
    assert not report.of("baked") and "not baked for cubs, dogs: made under torch.inference_mode" in str(report)
    torch.testing.assert_close(model(x, tasks="cubs"), want)


def test_parts_of_a_prepared_model_stay_as_they_are():
    model = three_tasks(ConvNet())
    model.prepare_inference()
    for part in ("", "conv1", "norm1", "fc"):
        module = model.model.get_submodule(part)
        for name, call in (
            ("to", module.half),
            ("load_state_dict", lambda m=module: m.load_state_dict(m.state_dict())),
        ):
            with pytest.raises(RuntimeError, match=f"{part}.{name}: the model must not be prepared for inference"):
                call()
    assert {p.dtype for name, p in model.named_parameters() if ".scores." not in name} == {torch.float64}
    model.unprepare()
    assert model.half().model.conv1.base.dtype == torch.float16
    assert model.model.conv1.to_empty(device="meta").base.is_meta


class Reads(nn.Module):
    """A forward that reads attributes, and one that it writes."""

    offset = 0.0

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.parts = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
        self.scale, self.table, self.act, self.rows = 2.0, torch.tensor([2.0, 3.0, 4.0, 5.0]), None, None
        self.gain, self.seen = nn.Parameter(torch.ones(4)), []
        self.register_buffer("temperature", torch.tensor(2.0))
        self.config, self.names, self.skipped = {"k": 2.0}, ["a"], {"b"}

    def forward(self, x):
        self.rows = x.shape[0]
        self.seen.append(len(self.seen))
        x = x * self.temperature * self.config["k"] * len(self.names) + len(self.skipped)
        y = self.relu(self.norm(self.conv(x))) * self.scale + self.offset
        y = y if self.act is None else self.act(y)
        return self.parts[1](self.parts[0](y)).mean((2, 3)) * self.table * self.gain


CHANGES = {
    "number": lambda net: setattr(net, "scale", 3.0),
    "tensor": lambda net: setattr(net, "table", torch.ones(4)),
    "other kind": lambda net: setattr(net, "scale", torch.rand(4, 1, 1)),
    "of the class": lambda net: setattr(net, "offset", 1.0),
    "part": lambda net: setattr(net, "relu", nn.Tanh()),
    "part in a list": lambda net: net.parts.__setitem__(0, nn.Conv2d(4, 4, 1)),
    "new part": lambda net: setattr(net, "act", nn.Tanh()),
    "parameter": lambda net: setattr(net, "gain", nn.Parameter(torch.rand(4))),
    "equal parameter": lambda net: setattr(net, "gain", nn.Parameter(torch.ones(4))),
    "buffer": lambda net: setattr(net, "temperature", torch.tensor(3.0)),
    "in a dict": lambda net: net.config.update(k=5.0),
    "in a list": lambda net: net.names.append("b"),
    "in a set": lambda net: net.skipped.add("c"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_and_attributes_that_change_are_noticed(change):
    model, x = TapsModel(Reads(), ["cubs", "cars"]).eval(), images(4, dtype=torch.float32)
    assert model.prepare_inference(x).of("folded")
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for prepared in (model, *twins):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            prepared(x, tasks="cubs")
            prepared(x[:3], tasks=["cubs", "cars", None])  # probes, which runs the own forward
            prepared(x[:2], tasks="cubs")
            prepared.model.scale = float("2")
            prepared(x, tasks="cubs")
        torch.manual_seed(0)
        CHANGES[change](prepared.model)
        with pytest.warns(UserWarning, match="runs unprepared, because a module in it has got hooks, other parts or"):
            found = prepared(x, tasks="cubs")
        prepared.unprepare()
        torch.testing.assert_close(found, prepared(x, tasks="cubs"))


def test_a_backward_through_a_prepared_model_warns_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model, x = TapsModel(net, ["cubs"], head="2").eval(), torch.randn(5, 4)
    for _ in range(2):
        model.prepare_inference(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)  # without a backward it is inference all the same
            twin = copy.deepcopy(model).requires_grad_(False)
            twin(x.clone().requires_grad_()).sum().backward()
        with pytest.warns(UserWarning, match="must not be trained, got a backward through one: its gates, deltas and"):
            model(x).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x).sum().backward()
            model.unprepare()
            model(x).sum().backward()


@pytest.mark.parametrize("first", [nn.Linear(4, 4), nn.Tanh()])
def test_a_norm_that_tasks_share_needs_no_axis_of_samples(first):
    """Also where its rows are not the samples."""
    net = nn.Sequential(first, nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    model = perturb(TapsModel(net, ["a", "b"], norms="shared").eval())
    x, tasks = torch.randn(3, 4), ["a", None, "b"]
    with torch.no_grad():
        before = model(x, tasks=tasks)
        model.prepare_inference(x)
        torch.testing.assert_close(model(x, tasks=tasks), before)
