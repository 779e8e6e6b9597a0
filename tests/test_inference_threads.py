"""`prepare_inference` while other threads run models."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nets import ConvNet, images, three_tasks
from torch import nn

from taps_fast import TapsModel, _regions
from taps_fast.store import read_task


class Meanwhile(nn.Module):
    """Another thread does something while this runs, or is traced."""

    def __init__(self, other):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), [other]

    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.other[0]).result()
        return self.norm(self.conv(x)).relu()


def prepared(other):
    model = TapsModel(Meanwhile(other), ["cubs", "cars"]).eval()
    report = model.prepare_inference(torch.randn(2, 3, 4, 4))
    assert [row.path for row in report.of("folded")] == ["conv"]


def test_models_of_other_threads_run_while_one_is_traced():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    net.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    x = torch.randn(2, 3)
    want = net(x) * net.scale

    def run():
        y = net(x) * net.scale
        assert type(y) is torch.Tensor and torch.equal(y, want)

    prepared(run)


def test_models_are_traced_one_after_the_other():
    call = nn.Module.__call__
    models = [TapsModel(Meanwhile(lambda: None), ["cubs"]).eval() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda model: model.prepare_inference(torch.randn(2, 3, 4, 4)), models))
    assert nn.Module.__call__ is call and all(len(report.of("folded")) == 1 for report in reports)


@pytest.mark.parametrize("same", [True, False])
def test_no_thread_runs_a_graph_that_has_not_been_compared(same, monkeypatch):
    model = TapsModel(Meanwhile(lambda: None), ["cubs"]).eval()
    report, seen = model.prepare_inference(), []

    def agree(want, found):
        seen.extend(region.verified for region in report.regions)
        return same

    monkeypatch.setattr(_regions, "_agree", agree)
    with torch.no_grad(), ThreadPoolExecutor(1) if same else pytest.warns(UserWarning, match="is left as it is"):
        model(torch.randn(2, 3, 4, 4))
    assert seen == [False] and report.regions[0].verified and (report.regions[0].gave_up is None) == same


@pytest.mark.parametrize("originals", ["disk", "memory"])
def test_forwards_while_the_model_is_prepared_and_back(originals, tmp_path):
    """Every forward, saved task and merged task meanwhile is right; nothing raises."""
    model, x, mix = three_tasks(ConvNet()), images(4), ["cars", "base", "cubs", "cubs"]
    stop, ran = threading.Event(), []
    with torch.no_grad():
        want, alone = model(x, tasks=mix), model(x, tasks="cubs")
        state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_task("cubs", tmp_path / "before")
    folder = read_task(tmp_path / "before")[0]

    def serve(grad):
        with torch.set_grad_enabled(grad):
            while not stop.is_set():
                torch.testing.assert_close(model(x, tasks=mix), want)
                torch.testing.assert_close(model(x, tasks="cubs"), alone)
                ran.append(model.prepared)

    def read():
        while not stop.is_set():
            torch.testing.assert_close(model.merge("cubs")(x), alone)
            model.save_task("cubs", tmp_path / "saved")
            found = read_task(tmp_path / "saved")[0]
            assert all(torch.equal(found[name], value) for name, value in folder.items())
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(serve, False), pool.submit(serve, True), pool.submit(read)]
        for k in range(20):
            model.prepare_inference(*([x] if k % 2 else []), originals=originals)
            time.sleep(0.01)
            (model.unprepare if k % 3 else model.prepare_inference)()
        stop.set()
        for each in running:
            each.result()
    assert {report is None for report in ran} == {True, False}


def test_preparing_waits_for_a_forward_and_the_next_forward_for_it():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def slow(module, args):
        entered.set()
        assert leave.wait(60)
        seen.append(len(model.conversion.layers["0"].baked))

    model = TapsModel(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), ["cubs"]).eval()
    model.model[1].register_forward_pre_hook(slow)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(model, torch.randn(2, 4))]
        assert entered.wait(60)
        running.append(pool.submit(model.prepare_inference))
        while not model.turns._changes:
            time.sleep(0.001)
        running.append(pool.submit(model, torch.randn(2, 4)))
        time.sleep(0.05)
        assert not model.conversion.layers["0"].baked
        leave.set()
        for each in running:
            each.result()
    assert seen[0] == 0 and set(seen[1:]) == {1}


def test_a_hook_cannot_prepare_its_model_but_run_it():
    model = TapsModel(nn.Sequential(nn.Linear(4, 4)), ["cubs"]).eval()
    x, calls = torch.randn(2, 4), []

    def hook(*_):
        calls.append(None)
        if len(calls) == 1:
            calls[0] = model(x)
            with pytest.raises(RuntimeError, match="must be called outside of forwards, got a call within one"):
                model.prepare_inference()

    model.model[0].register_forward_hook(hook)
    assert torch.equal(model(x), calls[0]) and model.prepared is None
    twin = copy.deepcopy(model)
    assert twin.prepare_inference() and twin.turns is not model.turns


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads
def test_a_fork_does_not_wait_for_forwards_of_its_parent():
    entered, leave = threading.Event(), threading.Event()
    model = TapsModel(nn.Sequential(nn.Linear(4, 4)), ["cubs"]).eval()
    model.model[0].register_forward_hook(lambda *_: entered.set() or leave.wait(60))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model, torch.randn(2, 4))
        assert entered.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                with model.turns.change([torch.device("cpu")]):
                    os._exit(0)
            finally:
                os._exit(1)
        leave.set()
        running.result()
    assert os.waitpid(child, 0)[1] == 0
