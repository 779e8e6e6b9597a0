"""Heads of each task: a mixed batch against the separate heads, padded with -inf to the widest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taps_fast import TapsModel
from taps_fast.nn import TaskContext, TaskHead
from taps_fast.nn.context import Layout
from taps_fast.nn.head import new_head

IDS = [2, -1, 0, 2, 0, -1, 1, 0]
TASKS = ["cubs", "cars", "dogs"]


def make(base, heads) -> TaskHead:
    torch.manual_seed(0)
    head = TaskHead(base.double(), TaskContext("test", TASKS), "fc")
    for task, module in zip(TASKS, heads, strict=True):
        head.add_task(task, module.double())
    head.layouts = dict.fromkeys(range(1, 5), Layout())
    return head


def mixed(head, x):
    previous = head.context.enter(head.context.resolve(torch.tensor(IDS)))
    y = head(x)
    head.context.enter(previous)
    return y


def mlp(classes):
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))


def pooled(classes):
    return nn.Sequential(nn.Dropout(0.0), nn.Conv2d(6, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


HEADS = {
    "widths": (nn.Linear(6, 7), [nn.Linear(6, 3), nn.Linear(6, 9), nn.Linear(6, 3)], 9, (8, 6)),
    "base width": (nn.Linear(6, 7), [nn.Linear(6, 7), nn.Linear(6, 2), nn.Linear(6, 7)], 7, (8, 6)),
    "one width": (nn.Linear(6, 4), [nn.Linear(6, 4) for _ in TASKS], 4, (8, 6)),
    "some bias": (
        nn.Linear(6, 2),
        [nn.Linear(6, 4, bias=False), nn.Linear(6, 4), nn.Linear(6, 4, bias=False)],
        4,
        (8, 6),
    ),
    "no bias": (nn.Linear(6, 2, bias=False), [nn.Linear(6, n, bias=False) for n in (4, 5, 5)], 5, (8, 6)),
    "tokens": (nn.Linear(6, 2), [nn.Linear(6, n) for n in (4, 5, 5)], 5, (8, 3, 6)),
    "rows": (nn.Linear(6, 2), [nn.Linear(6, n) for n in (4, 5, 5)], 5, (24, 6)),
    "own": (nn.Linear(6, 2), [mlp(3), nn.Linear(6, 4), mlp(8)], 8, (8, 6)),
    "conv": (nn.Conv2d(6, 2, 1), [nn.Conv2d(6, n, 1) for n in (4, 5, 3)], 5, (8, 6, 3, 2)),
    "conv in a container": (pooled(2), [pooled(n) for n in (4, 5, 3)], 5, (8, 6, 3, 2)),
    "conv1d": (nn.Conv1d(6, 2, 1), [nn.Conv1d(6, n, 1) for n in (4, 5, 3)], 5, (8, 6, 3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_mixed_batch_is_the_separate_heads(name):
    base, heads, widest, shape = HEADS[name]
    head = make(base, heads)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = mixed(head, x)
    axis = 1 if name.startswith("conv") else -1
    assert y.shape[axis] == widest and list(head.widths) == TASKS
    dy = torch.randn_like(y)
    y.nan_to_num(neginf=0.0).backward(dy)
    dx, grads = x.grad, {n: p.grad.clone() for n, p in head.named_parameters()}
    head.zero_grad()
    each = len(x) // len(IDS)
    for i, t in enumerate(IDS):
        rows = slice(i * each, (i + 1) * each)
        mine = x.detach()[rows].requires_grad_()
        alone = head.of(None if t < 0 else TASKS[t])(mine)
        width = alone.shape[axis]
        torch.testing.assert_close(y[rows].narrow(axis, 0, width), alone)
        assert bool((y[rows].narrow(axis, width, widest - width) == -torch.inf).all())
        alone.backward(dy[rows].narrow(axis, 0, width))
        torch.testing.assert_close(dx[rows], mine.grad)
    for n, p in head.named_parameters():
        torch.testing.assert_close(grads[n], p.grad)


def test_softmax_and_loss_of_padded_logits():
    base, heads, _, shape = HEADS["widths"]
    head = make(base, heads)
    y = mixed(head, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(y.softmax(-1).sum(-1), torch.ones(8, dtype=torch.float64))
    assert bool((y.argmax(-1)[[2, 4, 7]] < 3).all())
    F.cross_entropy(y, torch.zeros(8, dtype=torch.int64)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_new_heads_are_like_the_base():
    head = new_head(nn.Conv2d(6, 2, (1, 2), stride=2, bias=False, dtype=torch.float64), 5, "fc")
    assert (head.out_channels, head.kernel_size, head.stride, head.bias) == (5, (1, 2), (2, 2), None)
    assert head.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="classes must go with a Linear or Conv2d head, got Sequential at 'fc'"):
        new_head(mlp(3), 5, "fc")


def test_heads_in_a_model():
    model = TapsModel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), head="1")
    model.add_task("cubs", 3)
    model.add_task("cars", head=mlp(8))
    model.add_task("dogs")
    assert model.widths == {"cubs": 3, "cars": 8, "dogs": 2}
    assert model(torch.randn(3, 4), tasks=["cubs", "cars", "dogs"]).shape == (3, 8)
    assert all(p.requires_grad for p in model.conversion.head.tasks.parameters())
    assert not any(p.requires_grad for p in model.conversion.head.base.parameters())
    with pytest.raises(ValueError, match="classes or head must be given, got both"):
        model.add_task("birds", 3, head=mlp(3))
    with pytest.raises(ValueError, match=r"must go with TapsModel\(..., head=<path>\), .*its last Linear is '1'\)$"):
        TapsModel(nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.ReLU())).add_task("cubs", 3)
    with pytest.raises(ValueError, match=r"must go with .*it has no Linear\)$"):
        TapsModel(nn.Conv2d(2, 2, 1)).add_task("cubs", 3)
    assert model.tasks == ["cubs", "cars", "dogs"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_head_whose_weight_a_hook_computes_is_merged_while_it_trains():
    """The weight that its last forward left has a graph, which deepcopy refuses."""
    model = TapsModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), head="1")
    model.add_task("cubs", head=nn.utils.weight_norm(nn.Linear(4, 3)))
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.merge("cubs")(x), model(x))
    torch.testing.assert_close(model.merge("cubs")(x), model(x))


@pytest.mark.parametrize("classes", [0, -1, 2.5, True, "3"])
def test_refused_classes_leave_no_task(classes):
    model = TapsModel(nn.Linear(4, 6), head="")
    with pytest.raises(
        ValueError, match=f"^TapsModel.add_task: classes must be a whole number .*, got {classes!r} \\(head ''\\)$"
    ):
        model.add_task("cubs", classes)
    assert not model.tasks


def test_a_head_that_is_no_module_leaves_no_task(tmp_path):
    model = TapsModel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), ["cubs"], head="1")
    model.save_task("cubs", tmp_path / "cubs")
    for add in (
        lambda: model.add_task("cars", head="x"),
        lambda: model.load_task(tmp_path / "cubs", name="cars", head="x"),
    ):
        with pytest.raises(TypeError, match="^(TapsModel.add_task|load_task): head must be an nn.Module, got 'x' "):
            add()
    assert model.tasks == ["cubs"] and model.conversion.layers["0"].scores.keys() == {"cubs"}


def test_losses_of_padded_outputs():
    """What the docstrings say: class indices as they are, what weighs all outputs on each task's own."""
    model = TapsModel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), head="1")
    for task, classes in {"cubs": 2, "cars": 5}.items():
        model.add_task(task, classes=classes)
    x, ids = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    labels = torch.tensor([1, 4, 0, 0, 2, 1])
    parameters = [p for p in model.parameters() if p.requires_grad]
    y = model(x, tasks=ids)
    together = torch.autograd.grad(F.cross_entropy(y, labels, reduction="sum"), parameters, retain_graph=True)
    assert not F.cross_entropy(y, labels, label_smoothing=0.1).isfinite()
    for smoothing in (0.0, 0.1):
        loss = torch.zeros(())
        for t, width in enumerate(model.widths.values()):
            mine = ids == t
            loss = loss + F.cross_entropy(y[mine, :width], labels[mine], reduction="sum", label_smoothing=smoothing)
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in found)
        if not smoothing:
            torch.testing.assert_close(found, together)


def test_a_head_that_is_given_is_copied():
    """So one can be given to several tasks, even the base's own, and stays as it is."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    model, head = TapsModel(net, head="1").train(), mlp(3).eval()
    computed = head[0].last = head[0].weight * 2  # has a graph, which deepcopy refuses
    for task, given in (("a", head), ("b", head), ("c", net[1])):
        model.add_task(task, head=given)
    own = model.conversion.head.tasks
    assert not head.training and not net.training and own["a"].training and head[0].last is computed
    before = [p.clone() for p in (*head.parameters(), *net.parameters())]
    with torch.no_grad():
        for p in (*own["a"].parameters(), *own["c"].parameters()):
            p.zero_()
    assert all(torch.equal(p, q) for p, q in zip(before, (*head.parameters(), *net.parameters()), strict=True))
    assert torch.equal(own["b"][0].weight, head[0].weight) and model.model[1].base.weight.any()
