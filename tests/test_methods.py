"""TAPS as it was published: the gradients of its formula, its layer restated, how soon gates close, joint training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, Transformer, images
from torch import nn

from taps_fast import FastTapsConv2d, FastTapsLinear, TapsModel, delta_linear
from taps_fast.nn import gates

NETS = {"ConvNet": ConvNet, "Transformer": Transformer}


@pytest.mark.parametrize("score", [0.15, 0.1, 0.05, -0.2])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradient_identities(kind, score):
    """With P = Gᵀ·X: dL/ds = <P, Δ> + λ/L·sign(s) open or closed, dL/dΔ = I·P, dL/dx = G·(W0 + I·Δ)."""
    torch.manual_seed(0)
    if kind == "linear":
        layer = FastTapsLinear(5, 4, bias=False, dtype=torch.float64, tasks=["a"])
        x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        unfold = x
    else:
        layer = FastTapsConv2d(3, 4, 2, bias=False, dtype=torch.float64, tasks=["a"])
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        unfold = F.unfold(x, 2).transpose(1, 2).reshape(-1, 12)  # rows are output pixels
    layer.deltas["a"].data.normal_()
    layer.scores["a"].data.fill_(score)
    y = layer(x)
    g = torch.randn_like(y)
    (y * g).sum().backward()
    gates.penalty([layer.scores["a"]], 0.6, layers=2).backward()
    rows = g if kind == "linear" else g.permute(0, 2, 3, 1).reshape(-1, 4)
    p = (rows.T @ unfold).view_as(layer.base).detach()
    is_open = score >= 0.1
    torch.testing.assert_close(
        layer.scores["a"].grad, ((p * layer.deltas["a"]).sum() + 0.3 * (1 if score > 0 else -1)).float()
    )
    if is_open:
        torch.testing.assert_close(layer.deltas["a"].grad, p)
    else:
        assert layer.deltas["a"].grad is None or not layer.deltas["a"].grad.any()
    assert layer.base.grad is None
    weight = layer.base + is_open * layer.deltas["a"].detach()
    dx = g @ weight if kind == "linear" else F.conv_transpose2d(g, weight)
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize(
    ("optimizer", "lam", "layers", "summed"),
    [
        # As the authors train: the gradients of 8 micro-batches summed, L = 52.
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 1.0, 52, 8),
        # Steps of Adam under a constant gradient are its learning rate, whatever λ and L.
        (lambda p: torch.optim.Adam(p, lr=0.006), 0.1, 49, 1),
        (lambda p: torch.optim.Adam(p, lr=0.006), 1.0, 5, 1),
    ],
)
def test_a_gate_closes_in_nine_steps_under_the_penalty_alone(optimizer, lam, layers, summed):
    layer = FastTapsLinear(2, 2, tasks=["a"])
    steps = optimizer([layer.scores["a"]])
    count = 0
    while layer.is_open("a"):
        count += 1
        steps.zero_grad()
        for _ in range(summed):
            gates.penalty([layer.scores["a"]], lam, layers).backward()
        steps.step()
    assert count == 9


class Published(nn.Module):
    """The published layer from its formula, with none of our code: y = (W0 + I(s)·Δ)·x, the gradient of I is 1."""

    def __init__(self, weight, score):
        super().__init__()
        self.base, self.delta = weight.detach().clone(), nn.Parameter(torch.zeros_like(weight))
        self.score = nn.Parameter(torch.tensor(score))

    def forward(self, x):
        gate = (self.score >= 0.1).float() + self.score - self.score.detach()
        weight = self.base + gate * self.delta
        return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=1)


@pytest.mark.parametrize(
    ("score", "lam", "closes"), [(0.15, 0.0, False), (0.15, 0.4, True), (0.05, 0.0, False)], ids=str
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_twenty_steps_are_those_of_the_published_layer(kind, score, lam, closes):
    """Same weights, data and optimiser: gates that stay open, close on the way, and start closed."""
    torch.manual_seed(0)
    make = (
        (lambda i, o: nn.Linear(i, o, bias=False)) if kind == "linear" else lambda i, o: nn.Conv2d(i, o, 3, bias=False)
    )
    plain = [make(4, 6), make(6, 3)]
    adapt = FastTapsLinear.from_linear if kind == "linear" else FastTapsConv2d.from_conv2d
    for layer in plain if kind == "conv" else ():
        layer.padding, layer._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]
    ours = nn.ModuleList(adapt(layer, ["a"]) for layer in plain)
    for layer in ours:
        layer.scores["a"].data.fill_(score)
    theirs = nn.ModuleList(Published(layer.weight, score) for layer in plain)
    opened = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (theirs, ours)]
    for _ in range(20):
        x = torch.randn(8, 4) if kind == "linear" else torch.randn(4, 4, 5, 5)
        for layers, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            scores = [layer.score if layers is theirs else layer.scores["a"] for layer in layers]
            y = layers[1](torch.tanh(layers[0](x)))
            (((y - 1) ** 2).mean() + lam / 2 * sum(s.abs() for s in scores)).backward()
            optimizer.step()
        opened.append([layer.is_open("a") for layer in ours])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.scores["a"], their.score)
        torch.testing.assert_close(our.deltas["a"], their.delta)
        torch.testing.assert_close(our.weight, their.base + (their.score >= 0.1) * their.delta)
        assert (score < 0.1) == bool((our.deltas["a"] == 0).all())
    assert opened[0] == [score >= 0.1] * 2 and closes == (opened[-1] != opened[0])


def joint(net, dtype=torch.float64):
    torch.manual_seed(0)
    backbone = net().to(dtype).eval()
    model = TapsModel(backbone, head="fc")
    model.add_task("cubs", classes=3)
    model.add_task("cars", classes=5)
    return backbone, model


def step(model, optimizer, x, ids, labels):
    optimizer.zero_grad()
    (F.cross_entropy(model(x, tasks=ids), labels) + model.penalty(model.tasks, lam=0.2)).backward()
    optimizer.step()


def test_the_trained_base_is_the_base_and_a_shared_delta():
    """The gradients of a layer with K = T + 1 deltas, the shared one ungated; and 20 steps of Adam from there."""
    torch.manual_seed(0)
    layer = FastTapsLinear(5, 4, bias=False, dtype=torch.float64, tasks=["cubs", "cars"])
    layer.scores["cars"].data.fill_(0.05)
    base = layer.base.detach().clone()
    shared, *own = deltas = [torch.zeros(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for delta, task in zip(own, ("cubs", "cars"), strict=True):
        delta.data.normal_()
        layer.deltas[task].data.copy_(delta.data)
    layer.train_base()
    optimizers = [torch.optim.Adam(deltas, lr=0.01), torch.optim.Adam([layer.base, *layer.deltas.values()], lr=0.01)]
    coeffs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    ids = torch.tensor([0, 1, 1, 0, 1])
    for _ in range(20):
        x = torch.randn(5, 5, dtype=torch.float64)
        for y, optimizer in zip(
            (delta_linear(x, base, deltas, coeffs, tasks=ids), layer(x, tasks=ids)), optimizers, strict=True
        ):
            optimizer.zero_grad()
            ((y - 1) ** 2).sum().backward()
        torch.testing.assert_close(layer.base.grad, shared.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert shared.abs().max() > 0.05
    torch.testing.assert_close(layer.base, base + shared)
    torch.testing.assert_close(layer.deltas["cubs"], own[0])


@pytest.mark.parametrize("name", NETS)
def test_joint_training_saves_and_loads(name, tmp_path):
    """One backward for all tasks; then folders over the shared backbone, which is an ordinary network."""
    backbone, model = joint(NETS[name])
    before = copy.deepcopy(backbone.state_dict())
    model.train()
    groups = [*model.task_parameters("cubs"), *model.task_parameters("cars"), *model.train_base()]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    x, ids, labels = images(6), torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 4, 2, 1, 3, 1])
    losses = [F.cross_entropy(model(x, tasks=ids), labels)]
    for _ in range(5):
        step(model, optimizer, x, ids, labels)
    losses.append(F.cross_entropy(model(x, tasks=ids), labels))
    assert losses[1] < losses[0]
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    for layer in model.conversion.layers.values():
        assert layer.base.grad.any()
    model.train_base(False)
    assert not any(p.requires_grad for layer in model.conversion.layers.values() for p in layer.base_parameters())

    model.eval()
    for task in model.tasks:
        model.save_task(task, tmp_path / task)
    shared = model.merge("base")
    assert shared.state_dict().keys() == before.keys()
    served = TapsModel(shared, head="fc")
    for task in model.tasks:
        served.load_task(tmp_path / task)
    torch.testing.assert_close(served(x, tasks=ids), model(x, tasks=ids))
    torch.testing.assert_close(model(x, tasks=["base"] * 6), shared(x))
    with pytest.raises(ValueError, match="must be of this model's base"):
        TapsModel(backbone, head="fc").load_task(tmp_path / "cubs")


def test_joint_gradients_of_one_mixed_batch_are_the_sums_of_separate_ones():
    _, model = joint(Transformer)
    model.train_base()
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value) if value.is_floating_point() and value.dim() else 0
    x, labels = images(5), torch.tensor([0, 2, 1, 1, 2])
    ids = torch.tensor([0, 1, 1, 0, 1])
    (F.cross_entropy(model(x, tasks=ids), labels, reduction="sum") + model.penalty(model.tasks)).backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for t, task in enumerate(model.tasks):
        rows = ids == t
        loss = F.cross_entropy(model(x[rows], tasks=task), labels[rows], reduction="sum")
        (loss + model.penalty(task)).backward()
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
    assert any(name.endswith("qkv.base") for name in mixed)


def test_two_steps_take_one_delta_at_a_time():
    """A shared backbone on all tasks without any delta, then sequential TAPS from it."""
    _, model = joint(ConvNet)
    for task in ("cubs", "cars"):
        model.remove_task(task)
    model.add_task("cubs", classes=3, deltas=False)
    model.add_task("cars", classes=5, deltas=False)
    layers = model.conversion.layers.values()
    assert not any(layer.deltas for layer in layers)
    model.train()
    groups = [*model.task_parameters("cubs"), *model.task_parameters("cars"), *model.train_base()]
    optimizer = torch.optim.SGD([g for g in groups if g["name"] != "scores"], lr=0.05)
    x, ids, labels = images(6), torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 4, 2, 1, 3, 1])
    first = F.cross_entropy(model(x, tasks=ids), labels)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x, tasks=ids), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(x, tasks=ids), labels) < first

    model.train_base(False)
    shared = {path: layer.base.clone() for path, layer in model.conversion.layers.items()}
    for task in model.tasks:
        model.reopen(task)
        optimizer = torch.optim.SGD(model.task_parameters(task), lr=0.05)
        step(model, optimizer, x[ids == model.tasks.index(task)], task, labels[ids == model.tasks.index(task)])
        assert all(layer.is_open(task) and layer.deltas[task].any() for layer in layers)
    assert all(torch.equal(layer.base, shared[path]) for path, layer in model.conversion.layers.items())


def test_scores_have_a_rate_of_their_own_and_raw_gates_multiply():
    model = TapsModel(nn.Linear(3, 2), ["a"], gate="raw")
    weights, scores = model.task_parameters("a")
    torch.optim.SGD([weights, {**scores, "lr": 0.0}], lr=0.1)
    model.conversion.layers[""].deltas["a"].data.fill_(1.0)
    x = torch.ones(1, 3)
    torch.testing.assert_close(model(x) - model(x, tasks="base"), torch.full((1, 2), 0.45))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda: FastTapsLinear(2, 2, threshold=0.0), "FastTapsLinear: threshold must be finite and above 0, got 0.0"),
        (lambda: FastTapsConv2d(2, 2, 1, threshold=float("nan")), "threshold must be finite and above 0, got nan"),
        (lambda: TapsModel(nn.Linear(2, 2), threshold=-1.0), "threshold must be finite and above 0, got -1.0"),
        (lambda: FastTapsLinear(2, 2, initial_score=float("inf")), "initial_score must be finite, got inf"),
        (
            lambda: TapsModel(nn.Linear(2, 2), threshold=0.2, initial_score=0.15),
            r"initial_score must be at least the threshold, got 0.15 \(threshold 0.2\): behind a closed gate a zero",
        ),
        (lambda: FastTapsLinear(2, 2, initial_score=0.0, gate="raw"), "initial_score must not be 0 with gate 'raw'"),
        (
            lambda: TapsModel(nn.Linear(2, 2), ["a"]).reopen("a", 0.05),
            r"TapsModel.reopen: score must be at least the threshold, got 0.05 \(threshold 0.1\)",
        ),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"]).reopen("a", float("nan")), "reopen: score must be finite, got nan"),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"], gate="raw").reopen("a", 0.0), "score must not be 0 with gate 'raw'"),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"]).penalty("a", -0.1), "penalty: lam must be finite and at least 0"),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"]).penalty("a", float("nan")), "at least 0, got nan"),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"]).penalty("a", layers=0), "layers must be at least 1, got 0"),
        (lambda: TapsModel(nn.Linear(2, 2), ["a"]).penalty("a", by="sum"), "by must be 'layer' or 'size', got 'sum'"),
        (
            lambda: TapsModel(nn.Linear(2, 2), ["a"]).penalty("a", by="size", layers=52),
            r"layers must go with by='layer', got 52 \(by='size'\)",
        ),
    ],
)
def test_out_of_range(act, text):
    with pytest.raises(ValueError, match=text):
        act()


@pytest.mark.parametrize("gate", gates.GATES)
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.2, 3.0])
def test_new_tasks_train_whatever_the_threshold(threshold, gate):
    model = TapsModel(nn.Linear(3, 2), ["a"], threshold=threshold, gate=gate)
    layer, x = model.conversion.layers[""], torch.randn(4, 3)
    assert layer.scores["a"].item() == pytest.approx(1.5 * threshold)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        ((model(x) - 1) ** 2).sum().backward()
        optimizer.step()
    assert layer.deltas["a"].any() and layer.scores["a"].grad != 0
    layer.scores["a"].data.fill_(-1.0)
    if gate == "ste":
        model.reopen("a")
        assert layer.is_open("a")


def test_the_divisor_of_the_penalty():
    model = TapsModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["a", "b"])
    assert model.penalty("a", 0.5).item() == pytest.approx(0.5 / 2 * 0.3)
    assert model.penalty(["a", "b"], 0.5, layers=52).item() == pytest.approx(2 * 0.5 / 52 * 0.3)


def test_the_penalty_by_size():
    """λ·Σ (n_i/N)·|s_i|: equal layers pay what they pay by layer, and three quarters of the weights three quarters."""
    model = TapsModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 6)), ["a", "b"])
    small, large = (model.conversion.layers[path].scores["a"] for path in "01")
    small.data.fill_(-0.2)
    loss = model.penalty("a", 0.5, by="size")
    assert loss.item() == pytest.approx(0.5 * (0.25 * 0.2 + 0.75 * 0.15))
    loss.backward()
    assert (small.grad.item(), large.grad.item()) == pytest.approx((-0.5 * 0.25, 0.5 * 0.75))
    both = model.penalty(["a", "b"], 0.5, by="size")
    torch.testing.assert_close(both, model.penalty("a", 0.5, by="size") + model.penalty("b", 0.5, by="size"))
    equal = TapsModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["a"])
    torch.testing.assert_close(equal.penalty("a", 0.3, by="size"), equal.penalty("a", 0.3))
