"""TapsModel end to end: one mixed forward is the separate models', and only what should train trains."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import TASKS, ConvNet, StdConv2d, Transformer, assert_rows_as_separate, images, three_tasks
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from taps_fast import TapsModel, TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

NETS = {"conv": ConvNet, "standardised": lambda: ConvNet(StdConv2d), "transformer": Transformer}
ROWS = ["cars", "cubs", None, "dogs", "cars", "cubs"]


def by_hand(net, model, task):
    """``net`` with base + gate·delta in its weights and the task's norms and head: written out, by parameter names."""
    state = dict(copy.deepcopy(net).double().state_dict())
    for path, layer in model.conversion.layers.items():
        if layer.scores[task] >= model.threshold:
            state[f"{path}.weight"] = state[f"{path}.weight"] + layer.deltas[task]
            if f"{path}.bias" in state:
                state[f"{path}.bias"] = state[f"{path}.bias"] + layer.bias_deltas[task]
    plain = copy.deepcopy(net).double()
    plain.fc = nn.Linear(plain.fc.in_features, model.widths[task]).double()
    for path, norm in (*model.conversion.norms.items(), ("fc", model.conversion.head)):
        state |= {f"{path}.{key}": value for key, value in norm.tasks[task].state_dict().items()}
    plain.load_state_dict(state)
    return plain.train(net.training)


@pytest.mark.parametrize("name", NETS)
def test_one_task_and_merged_are_the_network_by_hand(name):
    net = NETS[name]()
    model = three_tasks(net)
    x = images(4)
    torch.testing.assert_close(model(x, tasks="base"), net(x))
    torch.testing.assert_close(model.merge("base")(x), net(x))
    for task in TASKS:
        want = by_hand(net, model, task)(x)
        torch.testing.assert_close(model(x, tasks=task), want)
        plain = model.merge(task)
        torch.testing.assert_close(plain(x), want)
        assert not any("taps_fast" in type(m).__module__ for m in plain.modules())
        assert list(plain.state_dict()) == list(net.state_dict()) and all(p.requires_grad for p in plain.parameters())
        assert [type(m) for m in plain.modules()] == [type(m) for m in net.modules()]
    assert len({model(x, tasks=task)[0, 0].item() for task in (*TASKS, "base")}) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_mixed_batch_is_the_separate_models(name, dtype):
    model = three_tasks(NETS[name](), dtype=dtype)
    x = images(6, dtype=dtype)
    with torch.no_grad():
        y = assert_rows_as_separate(model, x, ROWS)
    assert y.shape == (6, 7) and model.widths == {"cubs": 3, "cars": 5, "dogs": 7}
    ids = [-1 if name is None else TASKS.index(name) for name in ROWS]
    for tasks in (ids, torch.tensor(ids), torch.tensor(ids, dtype=torch.int8), TaskBatch.from_ids(ids, 3)):
        with torch.no_grad():
            assert torch.equal(model(x, tasks=tasks), y)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETS)
def test_mixed_gradients_and_statistics_are_the_separate_models(name, training):
    net = NETS[name]()
    model = three_tasks(net).train(training)
    x = images(8).requires_grad_()
    rows = [*ROWS, "dogs", None]
    plain = {task: by_hand(net.train(training), model, task) for task in TASKS}
    y = model(x, tasks=rows)
    dy = torch.randn_like(y)
    y.nan_to_num(neginf=0.0).backward(dy)
    for task in TASKS:
        mine = [i for i, row in enumerate(rows) if row == task]
        alone = x.detach()[mine].requires_grad_()
        width = model.widths[task]
        want = plain[task](alone)
        torch.testing.assert_close(y[mine, :width], want)
        want.backward(dy[mine, :width])
        torch.testing.assert_close(x.grad[mine], alone.grad)
        for path, layer in model.conversion.layers.items():
            weight = plain[task].get_parameter(f"{path}.weight")
            gate = float(layer.is_open(task))
            torch.testing.assert_close(layer.deltas[task].grad, weight.grad * gate)
            score = (weight.grad * layer.deltas[task]).sum()
            if layer.base_bias is not None:
                bias = plain[task].get_parameter(f"{path}.bias")
                torch.testing.assert_close(layer.bias_deltas[task].grad, bias.grad * gate)
                score = score + (bias.grad * layer.bias_deltas[task]).sum()
            torch.testing.assert_close(layer.scores[task].grad, score.float())
        for path, module in model.modules_of(task).items():
            theirs = plain[task].get_submodule(path)
            for key, parameter in module.named_parameters():
                torch.testing.assert_close(parameter.grad, theirs.get_parameter(key).grad)
            for key, buffer in module.named_buffers():
                torch.testing.assert_close(buffer, theirs.get_buffer(key))
    assert all(p.grad is None or not p.grad.any() for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", NETS)
def test_tasks_that_a_batch_lacks_get_no_gradient(name):
    """As in separate runs, where ids are on the host: an optimizer leaves them alone."""
    model = three_tasks(NETS[name]()).train()
    model(images(4), tasks=["dogs", "cars", "dogs", "cars"]).nan_to_num(neginf=0).sum().backward()
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad is None) == (".cubs" in parameter_name), parameter_name
    assert all(
        norm.tasks["cubs"].num_batches_tracked == 0
        for norm in model.conversion.norms.values()
        if hasattr(norm.base, "num_batches_tracked")
    )


@torch.no_grad()
def test_batches_that_are_all_base_or_all_one_task():
    model, x = three_tasks(ConvNet()), images(4)
    for task in (None, "cars"):
        assert_rows_as_separate(model, x, [task] * 4)
    bare = TapsModel(ConvNet().double().eval(), head="fc")
    torch.testing.assert_close(bare(x, tasks=[-1] * 4), bare(x))


def test_one_task_trains_alone():
    model = three_tasks(ConvNet()).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.task_parameters("cubs"), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        (F.cross_entropy(model(images(4), tasks="cubs"), torch.tensor([0, 1, 2, 0])) + model.penalty("cubs")).backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    mine = {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if ".cubs" in name}
    assert trained == {name for name in mine if name in dict(model.named_parameters())} and changed <= mine
    assert changed == mine


def test_task_parameters_are_all_of_a_task_once():
    model = three_tasks(ConvNet())
    weights, scores = model.task_parameters("cars")
    mine = {id(p) for name, p in model.named_parameters() if ".cars" in name}
    found = [id(p) for group in (weights, scores) for p in group["params"]]
    assert set(found) == mine and len(found) == len(mine) and all(p.dim() == 0 for p in scores["params"])
    assert (weights["name"], scores["name"]) == ("weights", "scores")


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(4, 1))

    def forward(self, delta):
        return delta * self.factors


def test_task_parameters_of_deltas_that_are_computed():
    model = TapsModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["cubs", "cars"])
    layer = model.model[1]
    parametrize.register_parametrization(layer.deltas, "cubs", Rows())
    made = layer.deltas.parametrizations["cubs"]
    weights, scores = model.task_parameters("cubs")
    assert {id(p) for p in weights["params"]} >= {id(made.original), id(made[0].factors)} and len(scores["params"]) == 2
    optimizer = torch.optim.SGD([weights, scores], lr=0.1)
    for _ in range(2):  # the delta starts as 0, which gives the factors no gradient
        model(torch.randn(3, 4), tasks="cubs").square().sum().backward()
        optimizer.step()
    assert bool(made.original.any()) and not torch.equal(made[0].factors, torch.ones(4, 1))
    prune.random_unstructured(layer.deltas, "cars", 0.5)
    with pytest.raises(ValueError, match="task 'cars' trains in '1' must be a parameter, .* got a Tensor that was"):
        model.task_parameters("cars")


def test_accumulated_gradients_are_sums():
    model, x = three_tasks(Transformer()), images(6)
    model(x, tasks=ROWS).nan_to_num(neginf=0).sum().backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        model(x[part], tasks=ROWS[part]).nan_to_num(neginf=0).sum().backward()
    assert once.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


def test_penalty_is_the_mean_absolute_score():
    model = three_tasks(ConvNet())
    scores = {task: [layer.scores[task].item() for layer in model.conversion.layers.values()] for task in TASKS}
    torch.testing.assert_close(model.penalty("cubs", lam=0.5), torch.tensor(0.5 * sum(scores["cubs"]) / 3))
    both = model.penalty(["cubs", "cars"])
    torch.testing.assert_close(both, model.penalty("cubs") + model.penalty("cars"))
    both.backward()
    assert all(layer.scores["dogs"].grad is None for layer in model.conversion.layers.values())


def test_copies():
    model, x = three_tasks(ConvNet()), images(6)
    want = model(x, tasks=ROWS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, tasks=ROWS), want) and twin.tasks == list(TASKS)
        with torch.no_grad():
            twin.conversion.layers["conv3"].deltas["cubs"].add_(1)  # the report's layers are the copy's own
        assert not torch.equal(twin(x, tasks=ROWS), want) and torch.equal(model(x, tasks=ROWS), want)
        twin.remove_task("cubs")
        assert model.tasks == list(TASKS)


def test_state_dict_round_trip():
    net = ConvNet()
    model, x = three_tasks(net), images(6)
    state = model.state_dict()
    for kind in ("base", "deltas.cubs", "scores.cars"):
        assert f"model.conv1.{kind}" in state
    assert {"model.norm1.tasks.cubs.running_mean", "model.fc.tasks.cars.weight"} <= state.keys()
    other = TapsModel(ConvNet().double().eval(), head="fc")
    for task, classes in zip(TASKS, (3, 5, None), strict=True):
        other.add_task(task, classes)
    other.load_state_dict(state)
    assert torch.equal(other(x, tasks=ROWS), model(x, tasks=ROWS))


def test_dtypes():
    model = three_tasks(ConvNet(), dtype=torch.float32)
    model.half()
    assert all(layer.scores["cubs"].dtype == torch.float32 for layer in model.conversion.layers.values())
    assert model.bfloat16()(images(6, dtype=torch.bfloat16), tasks=ROWS).dtype == torch.bfloat16
    model.to(torch.float64)
    assert_rows_as_separate(model, images(6), ROWS)


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_autocast(name):
    model = three_tasks(NETS[name](), dtype=torch.float32)
    x = images(6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, tasks=ROWS)
        merged = {task: model.merge(task or "base") for task in set(ROWS)}
        low = [merged[task](v[None])[0] for task, v in zip(ROWS, x, strict=True)]
    y.nan_to_num(neginf=0).sum().backward()
    trained = [layer.deltas["cubs"].grad for layer in model.conversion.layers.values() if layer.is_open("cubs")]
    assert trained and all(grad.dtype == torch.float32 and grad.any() for grad in trained)
    exact = model.double()(x.double(), tasks=ROWS)
    own = [slice(len(alone)) for alone in low]
    got, ref = (torch.cat([row[w] for row, w in zip(t, own, strict=True)]) for t in (y, exact))
    assert_no_worse_than_torch(got, ref, torch.cat(low))


class Checkpointed(ConvNet):
    context_fn = None

    def forward(self, x):
        options = {} if self.context_fn is None else {"context_fn": self.context_fn}
        return checkpoint(super().forward, x, use_reentrant=False, **options)


def test_activation_checkpointing_needs_the_selection():
    model, x = three_tasks(Checkpointed()), images(6)
    with pytest.raises(RuntimeError, match="conv1: tasks must be known, but this forward is recomputed in a backward"):
        model(x, tasks=ROWS).nan_to_num(neginf=0).sum().backward()
    model.zero_grad()
    model.model.context_fn = model.checkpoint_context
    model(x, tasks=ROWS).nan_to_num(neginf=0).sum().backward()
    plain = three_tasks(ConvNet())
    plain.load_state_dict(model.state_dict())
    plain(x, tasks=ROWS).nan_to_num(neginf=0).sum().backward()
    for name, p in plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, p.grad)


def test_several_backwards_recompute_one_checkpointed_forward():
    model, x = three_tasks(Checkpointed()), images(6)
    model.model.context_fn = model.checkpoint_context
    parameters = list(model.conversion.layers["conv1"].deltas.parameters())
    y = model(x, tasks=ROWS)[:, 0]
    want = torch.autograd.grad(y.sum(), parameters, retain_graph=True)
    parts = [torch.autograd.grad(part, parameters, retain_graph=True) for part in (y[:3].sum(), y[3:].sum())]
    torch.testing.assert_close([a + b for a, b in zip(*parts, strict=True)], list(want))
    assert model.context.active is None


def test_a_task_can_be_added_and_removed_at_any_time():
    model, x = three_tasks(ConvNet()), images(3)
    cubs = model(x, tasks="cubs")
    model.remove_task("cars")
    model.add_task("birds", classes=2)
    assert model.tasks == ["cubs", "dogs", "birds"] and list(model.widths) == ["cubs", "dogs", "birds"]
    assert torch.equal(model(x, tasks="cubs"), cubs)
    assert_rows_as_separate(model, x, ["birds", "dogs", "cubs"])  # ids follow names, not the order of adding
    assert torch.equal(model(x, tasks=[2, 1, 0]), model(x, tasks=["birds", "dogs", "cubs"]))


def test_raw_gates():
    model = TapsModel(nn.Linear(4, 4).double(), ["cubs"], gate="raw", initial_score=0.5)
    torch.nn.init.normal_(model.model.deltas["cubs"])
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        model(x), F.linear(x, model.model.base + 0.5 * model.model.deltas["cubs"], model.model.base_bias)
    )
    torch.testing.assert_close(model.merge("cubs")(x), model(x))
