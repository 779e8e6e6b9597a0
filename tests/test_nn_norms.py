"""Norms of each task: one mixed forward against the separate norms, in training and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taps_fast import TapsModel, TaskBatch
from taps_fast.nn import TaskContext
from taps_fast.nn.context import Layout
from taps_fast.nn.norm import TaskBatchNorm, TaskNorm, norm_type
from taps_fast.testing import assert_no_worse_than_torch

IDS = [2, -1, 0, 2, 0, -1, 2, 0]  # task 1 has no rows
TASKS = ["cubs", "cars", "dogs"]


class OwnNorm(nn.Module):
    """A norm of a type that nobody knows."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + 1) * self.gain


NORMS = {
    "bn2d": (lambda: nn.BatchNorm2d(4), (8, 4, 3, 2)),
    "bn2d plain": (lambda: nn.BatchNorm2d(4, affine=False, momentum=0.3), (8, 4, 3, 2)),
    "bn2d cumulative": (lambda: nn.BatchNorm2d(4, momentum=None, eps=1e-2), (8, 4, 3, 2)),
    "bn2d untracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (8, 4, 3, 2)),
    "bn2d stateless": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), (8, 4, 3, 2)),
    "bn1d": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "bn1d rows": (lambda: nn.BatchNorm1d(4), (16, 4)),
    "bn1d long": (lambda: nn.BatchNorm1d(4), (8, 4, 5)),
    "bn3d": (lambda: nn.BatchNorm3d(4), (8, 4, 2, 2, 2)),
    "ln": (lambda: nn.LayerNorm(4), (8, 5, 4)),
    "ln two axes": (lambda: nn.LayerNorm((5, 4)), (8, 3, 5, 4)),
    "ln no bias": (lambda: nn.LayerNorm(4, bias=False), (8, 4)),
    "rms": (lambda: nn.RMSNorm(4), (8, 5, 4)),
    "gn": (lambda: nn.GroupNorm(2, 4), (8, 4, 3, 2)),
    "gn plain": (lambda: nn.GroupNorm(2, 4, affine=False), (8, 4)),
    "in": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (8, 4, 3, 2)),
    "own": (lambda: OwnNorm(4), (8, 5, 4)),
}


def randomise(module):
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return module


def make(base, dtype=torch.float64) -> TaskNorm:
    """A norm with three tasks, all different."""
    base = randomise(base.to(dtype))
    norm = norm_type(base)(base, TaskContext("test", TASKS), "net.norm")
    for task in TASKS:
        norm.add_task(task)
        randomise(norm.tasks[task])
    norm.layouts = dict.fromkeys(range(1, 6), Layout())
    return norm


def mixed(norm, x, ids=IDS):
    # A TaskBatch, as ids on a device, keeps the tasks that have no rows; ids on the host would drop them.
    previous = norm.context.enter(norm.context.resolve(TaskBatch.from_ids(ids, len(TASKS))))
    y = norm(x)
    norm.context.enter(previous)
    return y


def rows_of(x, t, axis=0):
    each = x.shape[axis] // len(IDS)
    return torch.tensor([i * each + r for i, id in enumerate(IDS) if id == t for r in range(each)], dtype=torch.int64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NORMS)
def test_mixed_batch_is_the_separate_norms(name, training):
    """Outputs, gradients, running statistics and batch counts, over three forwards; the base never changes."""
    torch.manual_seed(0)
    build, shape = NORMS[name]
    norm = make(build()).train(training)
    frozen = copy.deepcopy(norm.base.state_dict())
    alone = {t: copy.deepcopy(norm.of(None if t < 0 else TASKS[t])) for t in range(-1, 3)}
    assert [m.training for m in alone.values()] == [False, training, training, training]
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = mixed(norm, x)
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(mixed(norm, x), y)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        params = list(norm.parameters())
        grads = torch.autograd.grad(y, params, dy, allow_unused=True) if params else ()
        got = dict(zip([n for n, _ in norm.named_parameters()], grads, strict=True))
        for t, module in alone.items():
            rows = rows_of(x, t)
            if not len(rows):
                continue
            mine = x.detach()[rows].requires_grad_()
            want = module(mine)
            torch.testing.assert_close(y[rows], want)
            own = [p for p in module.parameters()]
            dxs, *dps = torch.autograd.grad(want, [mine, *own], dy[rows])
            torch.testing.assert_close(dx[rows], dxs)
            prefix = "base." if t < 0 else f"tasks.{TASKS[t]}."
            for (n, _), dp in zip(module.named_parameters(), dps, strict=True):
                torch.testing.assert_close(got[prefix + n], dp)
    for t, module in alone.items():
        for key, value in module.state_dict().items():
            torch.testing.assert_close(norm.of(None if t < 0 else TASKS[t]).state_dict()[key], value)
    assert all(torch.equal(a, b) for a, b in zip(frozen.values(), norm.base.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_one_task_is_that_tasks_module(name):
    torch.manual_seed(0)
    build, shape = NORMS[name]
    norm = make(build())
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        norm.train(training)
        for task in (None, "cars"):
            alone = copy.deepcopy(norm.of(task))
            previous = norm.context.enter(norm.context.resolve(task or "base"))
            assert torch.equal(norm(x), alone(x))
            norm.context.enter(previous)
    assert not norm.base.training


def test_a_task_in_eval_mode_keeps_its_statistics_in_a_training_batch():
    torch.manual_seed(0)
    norm = make(nn.BatchNorm2d(4)).train()
    norm.tasks["dogs"].eval()
    alone = {task: copy.deepcopy(norm.tasks[task]) for task in ("cubs", "dogs")}
    x = torch.randn(8, 4, 3, 2, dtype=torch.float64)
    y = mixed(norm, x)
    for t, task in ((0, "cubs"), (2, "dogs")):
        torch.testing.assert_close(y[rows_of(x, t)], alone[task](x[rows_of(x, t)]))
        torch.testing.assert_close(norm.tasks[task].running_var, alone[task].running_var)


def test_tasks_with_settings_of_their_own():
    torch.manual_seed(0)
    norm = make(nn.BatchNorm2d(4)).train()
    for task, momentum, eps in (("cubs", None, 1e-2), ("dogs", 0.7, 1.0)):
        norm.tasks[task].momentum, norm.tasks[task].eps = momentum, eps
    alone = {task: copy.deepcopy(norm.tasks[task]) for task in ("cubs", "dogs")}
    for _ in range(2):
        x = torch.randn(8, 4, 3, 2, dtype=torch.float64)
        y = mixed(norm, x)
        for t, task in ((0, "cubs"), (2, "dogs")):
            torch.testing.assert_close(y[rows_of(x, t)], alone[task](x[rows_of(x, t)]))
            torch.testing.assert_close(norm.tasks[task].running_var, alone[task].running_var)


@pytest.mark.parametrize("name", ["ln", "gn"])
def test_one_eps_for_normalising_once(name):
    build, shape = NORMS[name]
    norm = make(build())
    norm.tasks["dogs"].eps = 2.0
    x = torch.randn(shape, dtype=torch.float64)
    y = mixed(norm, x)
    for t, task in ((0, "cubs"), (2, "dogs")):
        torch.testing.assert_close(y[rows_of(x, t)], norm.tasks[task](x[rows_of(x, t)]))


def test_one_value_a_channel_is_an_error_as_in_torch():
    norm = make(nn.BatchNorm1d(4)).train()
    with pytest.raises(ValueError, match=r"net.norm: a task must have more than 1 value per channel.*'cars'"):
        mixed(norm, torch.randn(8, 4, dtype=torch.float64), [0, 0, 0, 1, 0, 0, -1, 0])
    mixed(norm, torch.randn(8, 4, dtype=torch.float64), [0, 0, 0, 0, 0, 0, -1, 0])  # one row on the base is fine


@pytest.mark.parametrize(("axis", "outer"), [(1, True), (0, False), (2, False)])
def test_the_batch_axis_may_be_any(axis, outer):
    """[L, B, D], and inputs whose samples alternate along the axis."""
    torch.manual_seed(0)
    norm = make(nn.LayerNorm(4))
    layout = Layout(axis, outer)
    norm.layouts = {4: layout}
    shape = [3, 5, 2, 4]
    shape[axis] = 16
    x = torch.randn(shape, dtype=torch.float64)
    y = mixed(norm, x)
    for i in range(16):
        t = IDS[i // 2 if outer else i % 8]
        entry = x.select(axis, i)
        torch.testing.assert_close(y.select(axis, i), norm.of(None if t < 0 else TASKS[t])(entry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bn2d", "ln", "rms", "gn"])
def test_no_worse_than_torch(name, dtype):
    """In the input's dtype, and under autocast with float32 parameters."""
    torch.manual_seed(0)
    build, shape = NORMS[name]
    norm = make(build(), torch.float32).eval()
    for cast in (False, True):
        low = copy.deepcopy(norm) if cast else copy.deepcopy(norm).to(dtype)
        high = copy.deepcopy(low).double()
        if name == "rms":
            for module in high.in_order(TASKS):
                module.eps = torch.finfo(torch.float32).eps  # the default's, in a dtype up to float32
        x = (torch.randn(shape) * torch.logspace(-4, 1, 8).view(-1, *(1,) * (len(shape) - 1))).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast and dtype == torch.bfloat16):
            if cast and dtype != torch.bfloat16:
                continue
            y = mixed(low, x)
            with torch.no_grad():
                inferred = mixed(low, x)
            each = torch.stack([low.of(None if t < 0 else TASKS[t])(v[None])[0] for t, v in zip(IDS, x, strict=True)])
        for found in (y, inferred):
            assert_no_worse_than_torch(found, mixed(high, x.double()), each)


def test_errors():
    norm = make(nn.LayerNorm((8, 4)))
    with pytest.raises(ValueError, match="net.norm: the batch axis must not be normalised over"):
        mixed(norm, torch.randn(8, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"net.norm: the last axes of its input must be \(5, 4\), got \(8, 4, 5\)"):
        mixed(make(nn.LayerNorm((5, 4))), torch.randn(8, 4, 5, dtype=torch.float64))
    norm = make(nn.BatchNorm1d(4))
    norm.layouts = {3: Layout(2)}
    with pytest.raises(ValueError, match="net.norm: the batch axis must be 0 for BatchNorm1d, got 2"):
        mixed(norm, torch.randn(3, 4, 8, dtype=torch.float64))
    later = make(nn.BatchNorm1d(4))
    for norm in (make(nn.SyncBatchNorm(4)), nn.SyncBatchNorm.convert_sync_batchnorm(later)):
        with pytest.raises(RuntimeError, match="SyncBatchNorm must train with one task a forward"):
            mixed(norm.train(), torch.randn(8, 4, dtype=torch.float64))
    shared = TaskBatchNorm(nn.BatchNorm1d(4, track_running_stats=False), TaskContext("test", TASKS), "net.norm")
    with pytest.raises(RuntimeError, match="net.norm: a shared BatchNorm1d must track running statistics"):
        mixed(shared, torch.randn(8, 4))


def test_parametrized_weights_are_read_through_their_parametrization():
    torch.manual_seed(0)
    norm = make(nn.BatchNorm1d(4)).eval()
    torch.nn.utils.parametrize.register_parametrization(norm.tasks["dogs"], "weight", nn.Softplus())
    x = torch.randn(8, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixed(norm, x)[rows_of(x, 2)], norm.tasks["dogs"](x[rows_of(x, 2)]))


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "converted later"])
def test_sync_batch_norm_in_evaluation(later):
    torch.manual_seed(0)
    norm = make(nn.BatchNorm1d(4) if later else nn.SyncBatchNorm(4)).eval()
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm) if later else norm
    x = torch.randn(8, 4, 2, dtype=torch.float64)
    y = mixed(norm, x)
    for t in (-1, 0, 2):
        torch.testing.assert_close(y[rows_of(x, t)], norm.of(None if t < 0 else TASKS[t])(x[rows_of(x, t)]))


def test_attributes_of_a_shared_norm_are_the_bases():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.fc(x)).to(self.norm.weight.dtype) + self.norm.bias

    model = TapsModel(Net(), TASKS, norms="shared")
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x, tasks=[0, 1]), model(x, tasks="base"))


def test_attributes_are_those_of_the_active_tasks_module():
    norm = make(nn.BatchNorm1d(4))
    previous = norm.context.enter(norm.context.resolve("cars"))
    assert norm.weight is norm.tasks["cars"].weight and norm.eps == 1e-5
    norm.context.enter(norm.context.resolve([0, 1]))
    assert norm.eps == 1e-5 and norm.num_features == 4
    assert norm.weight.dtype == torch.float64 and norm.running_mean.shape == (4,)  # values differ, types do not
    with pytest.raises(RuntimeError, match="net.norm: running_mean must be used with one task active"):
        _ = norm.running_mean + 1
    norm.context.enter(previous)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = norm.nothing


def test_a_hooked_norm_runs_its_hooks():
    base = nn.LayerNorm(4)
    base.register_forward_hook(lambda module, args, y: y * 2)
    norm = make(base)
    x = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(mixed(norm, x)[2], norm.tasks["cubs"](x[2]))
    assert norm.how.endswith("task by task")


@pytest.mark.parametrize("norms", ["task", "shared"])
def test_shared_norms_keep_the_bases_statistics_in_training(norms):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(net[1].state_dict())
    model = TapsModel(net, ["cubs", "cars"], norms=norms).train()
    ids = TaskBatch.from_ids([0, 1, 0, -1], 2)
    for tasks in ("cubs", "base", ids):
        model(torch.randn(4, 3, 2, 2), tasks=tasks)
    base = model.model[1].base.state_dict()
    assert all(
        torch.equal(before[key], base[key]) and torch.equal(before[key], net[1].state_dict()[key]) for key in before
    )
    assert (len(model.conversion.norms), len(model.model[1].tasks)) == ((1, 2) if norms == "task" else (0, 0))
    if norms == "task":
        assert not torch.equal(model.model[1].tasks["cubs"].running_mean, before["running_mean"])
