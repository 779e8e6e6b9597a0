"""Which task each sample of a batch is of: what may be said, what is refused, and how long it holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nets import TASKS, ConvNet, PadConv2d, Transformer, images, perturb, three_tasks
from torch import nn

from taps_fast import FastTapsConv2d, FastTapsLinear, TapsModel, TaskBatch

ROWS = ["cars", "cubs", None, "dogs", "cars", "cubs"]


def test_default_and_active_task():
    model, x = three_tasks(ConvNet()), images(2)
    with pytest.raises(ValueError, match=r"tasks: .*; pass tasks='cubs' by keyword.*, or call set_task\)$"):
        model(x)
    model.set_task("cars")
    assert torch.equal(model(x), model(x, tasks="cars"))
    model.set_task("base")
    assert torch.equal(model(x), model(x, tasks="base"))
    model.set_task(None)
    for task in ("dogs", "cars"):
        model.remove_task(task)
    assert torch.equal(model(x), model(x, tasks="cubs"))
    model.remove_task("cubs")
    assert torch.equal(model(x), model(x, tasks="base")) and not list(p for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda m: m(images(2), tasks="cub"), r"task must be one of its tasks, got 'cub' \(did you mean 'cubs'\?"),
        (lambda m: m(images(2), tasks=["cubs", "birds"]), r"got 'birds' \(known: cubs, cars, dogs\)"),
        (lambda m: m(images(2), tasks=[0, 3]), r"tasks must be ids in \[-1, 3\), -1 being the base, got 3"),
        (lambda m: m(images(3), tasks=[0, 1]), "one id a sample, got 2 ids and no input"),
        (
            lambda m: (m.probe(images(2)), m(images(3), tasks=[0, 1])),
            "one id a sample, got 2 ids and an input of 3 samples",
        ),
        (lambda m: m.merge("cub"), "did you mean 'cubs'"),
        (lambda m: m.set_task("cub"), "did you mean 'cubs'"),
        (lambda m: m.penalty("cub"), "did you mean 'cubs'"),
        (lambda m: m.remove_task("cub"), "did you mean 'cubs'"),
        (lambda m: m.task_parameters("cub"), "did you mean 'cubs'"),
        (lambda m: m.add_task("cubs"), "task must be new, got 'cubs'"),
        (lambda m: m.add_task("a.b"), "task must be a name"),
    ],
)
def test_bad_input(act, text):
    model = three_tasks(ConvNet())
    with pytest.raises(ValueError, match=text):
        act(model)
    assert model.tasks == list(TASKS) and model.context.active is None


def test_wrong_types_name_the_layer():
    model = three_tasks(ConvNet())
    with pytest.raises(
        TypeError, match="^layer 'conv1': delta_conv2d: base must be torch.float32 like x, got torch.float64 "
    ):
        model(images(2, dtype=torch.float32), tasks="cubs")
    with pytest.raises(TypeError, match="tasks must be integers, got torch.float32"):
        model(images(2), tasks=torch.tensor([0.0, 1.0]))
    for whole in (nn.Linear(4, 2), PadConv2d(3, 8, 3)):
        with pytest.raises(TypeError, match=r"^layer '\(root\)': delta_(linear|conv2d): \w+ must be "):
            TapsModel(whole.double(), ["cubs"])(images(2, 4, torch.float32))


def test_a_selection_does_not_outlive_its_forward():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("inside")

    model = three_tasks(nn.Sequential(nn.Conv2d(3, 4, 1), Fails()), head=None)
    with pytest.raises(KeyError, match="inside"):
        model(images(2), tasks="cubs")
    assert model.context.active is None
    with pytest.raises(ValueError, match="tasks must be said where there are several"):
        model.model[0](images(2))


def test_threads():
    model = three_tasks(ConvNet())
    model.probe(images(2))
    x = images(3)
    tasks = ["cubs", "cars", "dogs", "base", (0, 1, 2), (2, -1, 0)] * 4
    say = [task if isinstance(task, str) else torch.tensor(task) for task in tasks]
    want = {task: model(x, tasks=s) for task, s in zip(tasks, say, strict=True)}
    with ThreadPoolExecutor(4) as pool:
        for task, y in zip(tasks, pool.map(lambda s: model(x, tasks=s), say), strict=True):
            assert torch.equal(y, want[task])


@pytest.mark.parametrize("net", [ConvNet, Transformer])
@pytest.mark.parametrize("ids", [[], TaskBatch.from_ids([], 3)])
def test_a_first_batch_without_samples(net, ids):
    model, x = three_tasks(net()), images(4)
    y = model(x[:0], tasks=ids)
    with pytest.raises(ValueError, match="tasks must have one id a sample, got 0 ids"):
        model(x, tasks=ids)
    assert y.shape == model(x, tasks=[0, 1, 2, -1])[:0].shape
    y.sum().backward()
    for task in model.tasks:
        parameters = [p for group in model.task_parameters(task) for p in group["params"]]
        assert not any(bool(p.grad.any()) for p in parameters if p.grad is not None)
        assert any(p.grad is not None for p in parameters)


class Weighs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, weights=None):
        h = self.a(x).relu()
        return self.b(h if weights is None else h * weights)


@pytest.mark.parametrize("slice", [None, 2])
@pytest.mark.parametrize("ids", [["cubs", None, "cars", "cubs"], ["cubs"] * 4], ids=["mixed", "one task"])
def test_an_optional_input_comes_and_goes(slice, ids):
    x, weights = (torch.randn(4, n, dtype=torch.float64) for n in (5, 1))
    for first, second in ((weights, None), (None, weights), (weights, weights[:1]), (weights[:1], weights)):
        model = three_tasks(Weighs(), head=None, slice=slice)
        model(x, first, tasks=ids)
        y = model(x, second, tasks=ids)
        for i, task in enumerate(ids):
            own = second if second is None or len(second) == 1 else second[i : i + 1]
            torch.testing.assert_close(y[i : i + 1], model.merge(task or "base")(x[i : i + 1], own))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("count", [0, 3, 7])
def test_ids_are_counted_whatever_they_are(count, grad):
    """Also where no layer is open, and where as many ids as features are given."""
    x = torch.randn(6, 7)
    for score in (0.0, 1.0):
        model = TapsModel(nn.Linear(7, 2), ["cubs", "cars"]).eval()
        model.probe(x)
        for task in model.tasks:
            model.conversion.layers[""].scores[task].data.fill_(score)
        for ids in ([0] * count, [-1] * count, ([0, 1] * 4)[:count]):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"{count} ids and an input of 6"):
                model(x, tasks=ids)


@pytest.mark.parametrize(
    "make",
    [
        lambda tasks: TapsModel(nn.Linear(2, 2), tasks),
        lambda tasks: FastTapsLinear(2, 2, tasks=tasks),
        lambda tasks: FastTapsLinear.from_linear(nn.Linear(2, 2), tasks),
        lambda tasks: FastTapsConv2d(2, 2, 1, tasks=tasks),
        lambda tasks: FastTapsConv2d.from_conv2d(nn.Conv2d(2, 2, 1), tasks),
    ],
)
def test_a_text_is_one_name(make):
    assert make("cubs").context.tasks == make(["cubs"]).context.tasks == ["cubs"]


class Writer(nn.Module):
    """What has an outer loop of its own: each step takes what all steps before it wrote."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.fc = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.norm(self.layer(x)).relu())

    @torch.no_grad()
    def generate(self, x, steps=3, beams=1):
        x = x.repeat_interleave(beams, 0)
        for _ in range(steps):
            x = torch.cat([x, self(x)[:, -1:]], 1)
        return x


def test_an_outer_call_runs_on_a_mixed_batch():
    model = perturb(TapsModel(Writer().double().eval(), ["cubs", "cars"]))
    x, rows = torch.randn(3, 2, 4).double(), ["cars", "cubs", None]
    with pytest.raises(RuntimeError, match="running: the model must have been probed for a mixed batch"):
        model.running(rows)
    model.probe(x)
    alone = [model.merge(task or "base") for task in rows]
    with model.running(rows):
        y, one = model.model.generate(x), model(x)
        with model.running("cubs"):
            torch.testing.assert_close(model.model.generate(x), model.merge("cubs").generate(x))
        with pytest.raises(ValueError, match="layer: tasks must divide its batch: .* got 3 ids and 4 rows"):
            model.model(torch.randn(4, 2, 4).double())
        with pytest.raises(ValueError, match="the probe must have seen a like input, got 2 rows a sample"):
            model.model.generate(x, beams=2)
    with model.running([task for task in rows for _ in range(2)]):
        beams = model.model.generate(x, beams=2)
    for i, plain in enumerate(alone):
        torch.testing.assert_close(y[i : i + 1], plain.generate(x[i : i + 1]))
        torch.testing.assert_close(one[i : i + 1], plain(x[i : i + 1]))
        torch.testing.assert_close(beams[2 * i : 2 * i + 2], plain.generate(x[i : i + 1], beams=2))
    assert model.context.active is None


def test_an_outer_call_in_training_mode_needs_a_forward_before():
    model, x = TapsModel(Writer(), ["cubs", "cars"]).train(), torch.randn(3, 2, 4)
    for tasks in ("cubs", [0, 1, 0]):
        with pytest.raises(RuntimeError, match="in training mode have run a forward of this kind"):
            model.running(tasks)
        model(x, tasks=tasks)
        with model.running(tasks):
            assert torch.equal(model.model(x), model(x, tasks=tasks))
    with pytest.raises(ValueError, match="task must be one of its tasks, got 'dogs'"):
        model.running("dogs")


def test_samples_that_meet_are_refused_in_an_outer_call_too():
    class Mean(Writer):
        def forward(self, x):
            return super().forward(x - self.layer(x).mean(0))

    model = TapsModel(Mean().eval(), ["cubs", "cars"])
    model.probe(torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match="samples must not change each other in a mixed batch"):
        model.running([0, 1])


def test_a_network_that_takes_tasks_itself():
    class Chooses(nn.Linear):
        def forward(self, x, tasks=1):
            return super().forward(x) * tasks

    with pytest.warns(UserWarning, match="whose forward has a parameter of that name .give it by position") as seen:
        model = TapsModel(Chooses(4, 4).eval(), ["cubs"])
    assert seen[0].filename == __file__
    x = torch.randn(2, 4)
    with model.running("cubs"):
        assert torch.equal(model.model(x, tasks=2), model(x, 2, tasks="cubs"))
