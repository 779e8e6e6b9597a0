"""`TapsModel.prepare_inference`: the same results, nothing folded that is not proven, all of it undone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import TASKS, ConvNet, assert_rows_as_separate, images, three_tasks
from torch import nn

from taps_fast import TapsModel

MIX = ["cars", "base", "cubs", "dogs", "cubs"]


class Net(nn.Module):
    """All that can be folded: convolution, norm and activation, as modules and functions, some used twice."""

    def __init__(self, act=nn.ReLU, dims=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.act = act()
        self.norm = nn.BatchNorm2d(8)
        self.fc1, self.fc = nn.Linear(8, 16), nn.Linear(16, 7)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = x + F.relu6(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = self.act(self.norm(torch.cat([x[:, :4], x[:, 4:] * 2], 1)))
        return self.fc(F.gelu(self.fc1(x.mean((2, 3)))))


def folded(report):
    return {row.path: row.reason for row in report.of("folded")}


def fill(model):
    """Statistics of their own too."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU])
@pytest.mark.parametrize("originals", ["disk", "memory"])
def test_same_results_and_back(act, originals):
    model = fill(three_tasks(Net(act)))
    x, one = images(5), images(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        want, alone = model(x, tasks=MIX), model(one, tasks="cars")
        report = model.prepare_inference(x, originals=originals)
        name = act.__name__.lower()
        assert folded(report) == {
            "conv1": f"with bn1 and {name}",
            "conv2": "with bn2 and relu6",
            "conv3": "with bn3",
            "norm": f"with {name}",
            "fc1": "with gelu",
        }
        assert report.baked_bytes == sum(
            layer.deltas[task].nbytes
            for layer in model.conversion.layers.values()
            for task in TASKS
            if layer.is_open(task)
        )
        torch.testing.assert_close(assert_rows_as_separate(model, x, MIX), want)
        torch.testing.assert_close(model(one, tasks="cars"), alone)
        # All of one task is that task, in the width of the widest head.
        torch.testing.assert_close(model(one, tasks=["cars"] * 2)[:, : alone.shape[1]], alone)
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last), tasks=MIX), want)
    for state in (model.state_dict(), model.train().state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
    assert model.prepared is None
    with torch.no_grad():
        assert torch.equal(model.eval()(x, tasks=MIX), want)


def test_the_report():
    model = three_tasks(Net())
    text = str(model.prepare_inference())
    baked = sum(layer.is_open(task) for layer in model.conversion.layers.values() for task in TASKS)
    assert baked == 7 and "conv2  Conv2d" in text and "3 baked" in text and "5 folded" in text
    assert "to be verified by the first forward: 1 traced" in text and "in a temporary folder on disk" in text
    model(images(2), tasks="cars")
    assert "verified" not in str(model.prepared)
    assert "nowhere: save_task and unprepare cannot work" in str(model.prepare_inference(originals="discard"))


class Reads(Net):
    """The convolution's output goes to two places, and one norm's input is no layer's output."""

    def forward(self, x):
        y = self.conv1(x)
        x = self.act(self.bn1(y)) + y
        return self.fc(F.gelu(self.fc1(x.mean((2, 3))), approximate="tanh"))


def test_what_is_read_twice_stays():
    report = three_tasks(Reads()).prepare_inference(images(2))
    assert folded(report) == {"bn1": "with relu"}


class Asks(Net):
    """Takes another way when it is traced."""

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = 2 * x
        return super().forward(x)


def test_a_wrong_trace_is_found():
    model = three_tasks(Asks())
    x = images(5)
    want = model(x, tasks=MIX)
    for first in (x, x[:0]):  # the second shows nothing: the next forward does
        with pytest.warns(UserWarning, match="the model is left as it is: its trace gives another result"):
            model.prepare_inference(first)
            model(x, tasks=MIX)
    assert {row.reason for row in model.prepared.of("left")} == {"its trace gives another result than its forward"}
    torch.testing.assert_close(model(x, tasks=MIX), want)


class Outer(nn.Module):
    """Cannot be traced, but what is inside can."""

    def __init__(self):
        super().__init__()
        self.net, self.other = Net(), ConvNet()
        self.fc = nn.Linear(14, 7)

    def forward(self, x, flip=False):
        x = x if len(x) else x
        return self.fc(torch.cat([self.net(x), self.other(x)], 1))


def test_parts_of_what_cannot_be_traced():
    model = fill(three_tasks(Outer()))
    x = images(5)
    want = model(x, tasks=MIX)
    report = model.prepare_inference(x)
    (left,) = report.of("left")
    assert left.path == "(root)" and left.reason.startswith("cannot be traced: ")
    assert folded(report)["net.conv1"] == "with net.bn1 and relu" and folded(report)["other.conv2"] == "with relu"
    torch.testing.assert_close(model(x, tasks=MIX), want)


def test_hooks_are_not_lost():
    model, seen = three_tasks(Net()), []
    x = images(5)
    model.model.bn2.register_forward_hook(lambda *_: seen.append("before"))
    report = model.prepare_inference(x)
    assert "bn2" not in folded(report).get("conv2", "") and seen
    model.unprepare()
    want = model(x, tasks=MIX)
    model.prepare_inference(x)
    model.model.conv3.register_forward_hook(lambda *_: seen.append("after"))
    with pytest.warns(UserWarning, match="runs unprepared, because a module in it has got hooks"):
        torch.testing.assert_close(model(x, tasks=MIX), want)
    assert "after" in seen


def test_saving_a_prepared_model(tmp_path):
    model = fill(three_tasks(Net()))
    x = images(5)
    want = model(x, tasks=MIX)
    model.save_task("cars", tmp_path / "before")
    model.prepare_inference(x)
    model.save_task("cars", tmp_path / "after")
    before, after = ((next((tmp_path / name).glob("*.safetensors"))).read_bytes() for name in ("before", "after"))
    assert before == after
    twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    model.unprepare()
    for copied in (twin, other):
        assert copied.prepared is not None
        torch.testing.assert_close(copied(x, tasks=MIX), want)
        copied.unprepare()
        states = zip(copied.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        assert torch.equal(copied(x, tasks=MIX), want)
    model.prepare_inference()
    assert not any("Region" in type(v).__name__ for m in model.merge("cubs").modules() for v in vars(m).values())


def test_discarded_deltas():
    model = three_tasks(Net())
    model.prepare_inference(originals="discard")
    for call in (model.unprepare, model.train, model.state_dict, lambda: model.save_task("cubs", "folder")):
        with pytest.raises(RuntimeError, match="TapsModel: deltas must be kept to be saved or put back, got a model"):
            call()
    assert model.prepared is not None and not model.training


def test_refused():
    model = three_tasks(Net())
    with pytest.raises(ValueError, match="prepare_inference: originals must be disk, memory, discard, got 'tape'"):
        model.prepare_inference(originals="tape")
    with pytest.raises(ValueError, match="prepare_inference: the model must be in eval mode, got one in training mode"):
        model.train().prepare_inference()
    model.eval().prepare_inference()
    for name, call in {
        "add_task": lambda: model.add_task("birds"),
        "remove_task": lambda: model.remove_task("cubs"),
        "reopen": lambda: model.reopen("cubs"),
        "train_base": lambda: model.train_base(),
        "requires_grad_": lambda: model.requires_grad_(),
        "task_parameters": lambda: model.task_parameters("cubs"),
        "load_task": lambda: model.load_task("nowhere"),
        "to": lambda: model.double(),
        "load_state_dict": lambda: model.load_state_dict({}),
    }.items():
        with pytest.raises(RuntimeError, match=f"TapsModel.{name}: the model must not be prepared for inference"):
            call()
    with pytest.raises(ValueError, match="slice must be 'auto', None or a number of samples, got -1"):
        TapsModel(Net(), slice=-1)


@pytest.mark.parametrize("ids", [["cars"] * 3, ["cars", "cubs", "cars"]], ids=["one task", "mixed"])
def test_ids_that_do_not_match(ids):
    model = three_tasks(Net())
    model.prepare_inference(images(2))
    with pytest.raises(ValueError, match="one id a sample, got 3 ids|x must have 3 channels"):
        model(images(4, size=10), tasks=ids)


def test_the_probe_of_a_prepared_model():
    model, x = fill(three_tasks(Net())), images(5)
    want = three_tasks(Net())
    want.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare_inference()
        torch.testing.assert_close(model(x, tasks=MIX), want(x, tasks=MIX))


def test_16_bits_are_not_baked():
    model = three_tasks(Net(), dtype=torch.bfloat16)
    x = images(5, dtype=torch.bfloat16)
    want = model(x, tasks=MIX)
    report = model.prepare_inference(x)
    assert report.baked_bytes == 0 and "torch.bfloat16 would round the delta" in str(report)
    got = model(x, tasks=MIX)
    finite = want.isfinite()
    assert (got - want)[finite].abs().max() < 0.05 * want[finite].abs().max()
    assert model.prepare_inference(bake=True).baked_bytes > 0


def test_gradients_of_the_input():
    model = fill(three_tasks(Net()))
    x = images(5).requires_grad_()
    (want,) = torch.autograd.grad(model(x, tasks=MIX)[:, :3].square().sum(), x)
    model.prepare_inference(x)
    (got,) = torch.autograd.grad(model(x, tasks=MIX)[:, :3].square().sum(), x)
    torch.testing.assert_close(got, want)


def test_compiled():
    model = fill(three_tasks(Net()))
    x, ids = images(5), torch.tensor([1, -1, 0, 2, 0])
    with torch.no_grad():
        want = model(x, tasks=ids)
        model.prepare_inference(x)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x, tasks=ids), want)


@torch.no_grad()
def test_compiled_before_its_traces_are_verified():
    model, x, ids = three_tasks(Asks()), images(5), torch.tensor([1, -1, 0, 2, 0])
    want = model(x, tasks=ids)
    model.prepare_inference()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x, tasks=ids), want)
    assert "to be verified by the first forward: 1 traced" in str(model.prepared)
