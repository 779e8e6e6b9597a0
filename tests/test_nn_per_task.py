"""A task's own norm or head runs in mixed batches as it does alone, whatever was made of it, however it is called."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from taps_fast import TapsModel
from taps_fast.nn import per_task

KINDS = {
    "bn": lambda: nn.BatchNorm1d(8),
    "ln": lambda: nn.LayerNorm(8),
    "rms": lambda: nn.RMSNorm(8),
    "gn": lambda: nn.GroupNorm(2, 8),
    "head": lambda: nn.Linear(8, 8),
}
IDS = ["a", "b", "base", "a", "b", "a", "base", "b"]


class Net(nn.Module):
    """A layer and a norm or head, which ``call`` calls."""

    def __init__(self, own, call):
        super().__init__()
        self.layer, self.own, self.call = nn.Linear(4, 8), own, call

    def forward(self, x):
        return self.call(self.own, self.layer(x))


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


def made(build, call=lambda own, x: own(x), head=False):
    torch.manual_seed(0)
    model = TapsModel(Net(build(), call), ["a", "b"], head="own" if head else None).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    return model


def alone(model, x):
    """Each sample with the others of its task, as a batch of that task."""
    rows = {task: [i for i, name in enumerate(IDS) if name == task] for task in set(IDS)}
    parts = {task: model(x[mine], tasks=task) for task, mine in rows.items()}
    return torch.stack([parts[task][rows[task].index(i)] for i, task in enumerate(IDS)])


def own_forward(module):
    forward = module.forward
    module.forward = types.MethodType(lambda self, x: forward(x) * 2, module)


def pruned(module):
    prune.random_unstructured(module, "weight", amount=0.5)
    module.weight_orig.data.mul_(3)  # as a step of an optimizer does: a hook makes a weight of it


CHANGES = {
    "a hook": lambda m: m.register_forward_hook(lambda module, args, y: y * 2),
    "a pre-hook": lambda m: m.register_forward_pre_hook(lambda module, args: args[0] * 2 + 1),
    "a forward of its own": own_forward,
    "pruning": pruned,
    "a parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
    "a weight computed elsewhere": lambda m: m.__dict__.update(weight=m._parameters.pop("weight").detach() * 2),
    "another eps": lambda m: setattr(m, "eps", 0.5),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_made_of_a_module(name, change, training):
    model = made(KINDS[name], head=name == "head").train(training)
    x = torch.randn(8, 4, dtype=torch.float64)
    before = model(x, tasks=IDS)
    CHANGES[change](model.modules_of("a")["own"])
    y = model(x, tasks=IDS)
    torch.testing.assert_close(y, alone(model, x))
    assert torch.equal(y, before) == ((name, change) == ("head", "another eps"))
    y.sum().backward()
    model(x, tasks=IDS).sum().backward()  # of a graph of its own


REPLACED = {
    "a subclass": ("bn", lambda: Doubled(8)),
    "another type": ("bn", lambda: nn.LayerNorm(8)),
    "none": ("ln", nn.Identity),
    "other groups": ("gn", lambda: nn.GroupNorm(4, 8)),
    "without parameters": ("gn", lambda: nn.GroupNorm(2, 8, affine=False)),
    "without a bias": ("ln", lambda: nn.LayerNorm(8, bias=False)),
    "a head with an activation": ("head", lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())),
}


@pytest.mark.parametrize("first", [True, False], ids=["of the first task", "of the last task"])
@pytest.mark.parametrize("name", REPLACED)
def test_another_module_in_its_place(name, first):
    kind, build = REPLACED[name]
    model = made(KINDS[kind], head=kind == "head").eval()
    (model.conversion.head or model.conversion.norms["own"]).tasks["a" if first else "b"] = build().double().eval()
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x, tasks=IDS), alone(model, x))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", KINDS)
def test_backward_hooks(name, register):
    model, seen = made(KINDS[name], head=name == "head").train(), []
    getattr(model.modules_of("a")["own"], register)(lambda module, *gradients: seen.append(len(gradients[-1][0])))
    model(torch.randn(8, 4, dtype=torch.float64), tasks=IDS).sum().backward()
    assert seen == [3]


def test_statistics_that_are_not_to_move():
    """Batch norms whose ``track_running_stats`` is switched off later, as nn.BatchNorm1d itself reads it."""
    model = made(KINDS["bn"]).train()
    own = model.modules_of("a")["own"]
    own.track_running_stats = False
    before = copy.deepcopy(own.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(torch.randn(8, 4, dtype=torch.float64), tasks=IDS)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert model.modules_of("b")["own"].num_batches_tracked == 2


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(8, width)

    def forward(self, scale, features, *, shift=0.0):
        return self.layer(features) * scale + shift


CALLS = {
    "a norm": (lambda: nn.LayerNorm(8), lambda own, x: own(input=x)),
    "a batch norm": (lambda: nn.BatchNorm1d(8), lambda own, x: own(input=x)),
    "a head": (lambda: nn.Linear(8, 8), lambda own, x: own(input=x)),
    "others by place": (lambda: Scaled(8), lambda own, x: own(2.0, x, shift=1.0)),
    "others by keyword": (lambda: Scaled(8), lambda own, x: own(shift=1.0, features=x, scale=2.0)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_by_keyword(name, training):
    build, call = CALLS[name]
    head = "norm" not in name
    model = made(build, call, head).train(training)
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x, tasks=IDS), alone(model, x))
    if "others" not in name:
        plain = made(build, head=head).train(training)
        assert torch.equal(model(x, tasks=IDS), plain(x, tasks=IDS))


def test_calls_with_other_tensors_are_refused():
    head = made(KINDS["head"], head=True).conversion.head
    x = torch.randn(2, 8, dtype=torch.float64)
    previous = head.context.enter(head.context.resolve(["a", "b"]))
    for got, args, kwargs in (
        ("several", (x, torch.ones(2)), {}),
        ("several", (x,), {"scales": [torch.ones(2)]}),
        ("none", (), {"xs": [x]}),
        ("none", (), {}),
    ):
        with pytest.raises(
            TypeError, match=f"own: a module of each task must take one tensor in a mixed batch, got {got}"
        ):
            head(*args, **kwargs)
    head.context.enter(previous)


class Pooled(nn.Module):
    """Of a width that is not to be seen."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, width))

    def forward(self, x):
        return x @ self.table


def test_widths_that_cannot_be_known():
    model = TapsModel(Net(Pooled(2), lambda own, x: own(x)), head="own").double()
    for task, width in (("a", 2), ("b", 5), ("c", 2)):
        model.add_task(task, head=Pooled(width).double())
    x = torch.randn(2, 4, dtype=torch.float64)
    assert model(x, tasks=["a", "c"]).shape == (2, 2)
    with pytest.raises(
        ValueError,
        match=r"own: outputs of all tasks must be of one shape in a mixed batch, got \[2\] of "
        r"'a', \[5\] of 'b' a sample \(heads that end in a Linear",
    ):
        model(x, tasks=["a", "b"])


def test_ordinary_norms_run_in_one_pass(monkeypatch):
    """So that the test above does not pass because all run task by task."""
    monkeypatch.setattr(per_task, "task_by_task", None)
    for name, build in KINDS.items():
        made(build, head=name == "head").eval()(torch.randn(8, 4, dtype=torch.float64), tasks=IDS)


def test_attributes_where_no_task_is_active():
    """Code that looks at a network, as initialisers and optimizers' groups do, is not a forward."""
    model = made(KINDS["bn"])
    norm, layer = model.model.own, model.model.layer
    names = ("eps", "affine", "num_features", "momentum", "weight", "running_mean", "nothing", "reset_parameters")
    assert [hasattr(norm, name) for name in names] == [True] * 6 + [False] * 2
    assert (norm.eps, norm.affine, norm.num_features, getattr(norm, "nothing", None)) == (1e-5, True, 8, None)
    model.modules_of("a")["own"].eps = 0.5
    assert not hasattr(norm, "eps") and getattr(norm, "eps", None) is None
    text = r"TapsModel: tasks must be said where there are several, got None \(tasks: a, b;"
    for error in (ValueError, AttributeError):
        with pytest.raises(error, match=text):
            _ = norm.eps
    for owner, shape in ((layer, (8, 4)), (norm, (8,))):
        assert owner.weight.shape == shape and owner.bias.dtype == torch.float64
        with pytest.raises(RuntimeError, match=text):
            nn.init.zeros_(owner.weight)
    model.set_task("a")
    assert norm.eps == 0.5 and norm.weight is model.modules_of("a")["own"].weight and layer.weight.sum().isfinite()
    seen = []
    made(KINDS["head"], head=True).apply(lambda module: seen.append(getattr(module, "out_features", None)))
    assert seen.count(8) == 5  # the layer, the head, and what is in it
    shared = TapsModel(Net(nn.BatchNorm1d(8), None), ["a", "b"], norms="shared").model.own
    assert shared.weight is shared.base.weight


OF_A_NORM = {
    "own forward": own_forward,
    "pruned": lambda norm: prune.random_unstructured(norm, "weight", amount=0.5),
    "hook": lambda norm: norm.register_forward_hook(lambda module, args, y: y * 2),
    "replaced": None,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", OF_A_NORM)
@torch.no_grad()
def test_prepared_models_run_what_a_task_made_of_its_norm(change, when):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model, x = TapsModel(net.eval(), ["a", "b"]).eval(), torch.randn(4, 3, 5, 5)

    def alter():
        tasks = model.conversion.norms["1"].tasks
        if OF_A_NORM[change] is None:
            tasks["a"] = nn.GroupNorm(2, 8).eval()
        else:
            OF_A_NORM[change](tasks["a"])

    if when == "before":
        alter()
    model.prepare_inference(x)
    if when == "after":
        alter()
    ids = ["a", "b", "base", "a"]
    mixed, single = model(x, tasks=ids), model(x, tasks="a")
    model.unprepare()
    torch.testing.assert_close(mixed, model(x, tasks=ids))
    torch.testing.assert_close(single, model(x, tasks="a"))
