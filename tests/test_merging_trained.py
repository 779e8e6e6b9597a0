"""Merged models and the methods that train them, each against a restatement: weights summed in a chain by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from taps_fast import merging
from taps_fast.merging import Experts, MergedModel, TaskVectors, agreement, entropy

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A convolution, a norm with statistics, an encoder, a plain layer and a head; ``token`` belongs to no layer."""

    def __init__(self, classes=5, token=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(6, 7)
        self.token = nn.Parameter(torch.zeros(6)) if token else None
        self.head = nn.Linear(7, classes)

    def forward(self, x):
        h = self.bn(self.conv(x)).flatten(2).transpose(1, 2)
        h = self.encoder(h if self.token is None else h + self.token).mean(1)
        return self.head(torch.relu(self.fc(h)))


def tuned(token=False):
    """The base and its task vectors; heads of 2, 3 and 4 classes; what moves is half frozen."""
    torch.manual_seed(0)
    base = Net(token=token).eval().double()  # Adam would make much of float32's noise in gradients that are 0
    states = {}
    for i, task in enumerate(TASKS):
        state = {n: t + 0.3 * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.state_dict().items()}
        state |= {"bn.running_var": state["bn.running_var"].abs(), "encoder.norm1.bias": base.encoder.norm1.bias.data}
        states[task] = state | {"head.weight": torch.randn(2 + i, 7).double(), "head.bias": torch.randn(2 + i).double()}
    return base, TaskVectors.from_checkpoints(base.state_dict(), states, own="head.*")


def batch(sizes=(3, 2, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {task: torch.randn(n, 3, 6, 6, generator=g).double() for task, n in zip(TASKS, sizes, strict=True)}


def chain(vectors, task, coeffs, x, own=None, token=False):
    """The published way: K sums a tensor; ``coeffs(l, k)``; running statistics have no gradient."""
    state = {n: vectors.base[n] for n in vectors.kept} | vectors.own[task]
    for l, (name, deltas) in enumerate(vectors.deltas.items()):
        weight = vectors.base[name]
        for k, delta in enumerate(deltas):
            weight = weight + coeffs(l, k) * delta
        state[name] = weight.detach() if "running" in name else weight
    for name, tensor in (own or {}).items():
        state[name] = tensor if name.startswith("head") else state[name] + tensor
    net = Net(len(state["head.bias"]), token).eval().double()
    return functional_call(net, state, (x,))


@pytest.mark.parametrize(
    ("coeffs", "route"), [("tensor", "whole"), ("tensor", "layer"), ("task", "whole"), ("task", "layer")]
)
def test_outputs_and_gradients(coeffs, route):
    base, vectors = tuned()
    merged = MergedModel(base, vectors, head="head", coeffs=coeffs, route=route)
    with torch.no_grad():
        merged.coeffs.add_(torch.linspace(-0.5, 1.0, merged.coeffs.numel()).view_as(merged.coeffs))
    c = merged.coeffs.detach().clone().requires_grad_()
    used = c.clamp(0, 1)
    loss, other = 0, 0
    for task, y in merged.each(batch()).items():
        wanted = chain(vectors, task, lambda l, k: used[l, k] if coeffs == "tensor" else used[k], batch()[task])
        torch.testing.assert_close(y, wanted)
        loss, other = loss + y.square().mean(), other + wanted.square().mean()
    loss.backward()
    other.backward()
    torch.testing.assert_close(merged.coeffs.grad, c.grad)
    assert not c.grad[c < 0].any() and base.fc.weight.grad is None


def test_different_shapes_run_one_by_one():
    base, vectors = tuned()
    merged = MergedModel(base, vectors, head="head")
    inputs = batch() | {"b": torch.randn(2, 3, 8, 8).double()}
    for task, y in merged.each(inputs).items():
        torch.testing.assert_close(y, chain(vectors, task, lambda l, k: 0.3, inputs[task]))
    assert merged.each({}) == {}
    for x in (inputs["b"], batch()["b"]):
        with pytest.raises(ValueError, match=r"task must be one of its tasks, got 'zz' \(known: a, b"):
            merged.each({"a": inputs["a"], "zz": x})


def test_nothing_is_copied_and_the_layer_route_stores_no_weight():
    base, vectors = tuned()
    merged = MergedModel(base, vectors, head="head", route="layer")
    pointers = {t.data_ptr() for t in vectors.base.values()}
    inside = [p for n, p in merged.network.named_parameters() if "head" not in n]
    assert all(p.data_ptr() in pointers for p in inside)
    assert not {"conv.weight", "fc.weight", "encoder.linear1.weight"} & merged.weights().keys()
    assert {"conv.bias", "bn.weight", "encoder.self_attn.in_proj_weight"} <= merged.weights().keys()


@pytest.mark.parametrize("how", ["whole", "layer", "part"])
def test_moves_as_a_whole(how):
    """Another dtype here; coefficients are not rounded."""
    base, vectors = tuned()
    parts = {"parts": merging.random_parts(vectors, 2), "num_parts": 2, "coeffs": "part"} if how == "part" else {}
    merged = MergedModel(base, vectors, head="head", route="layer" if how == "layer" else "whole", **parts)
    with torch.no_grad():
        merged.coeffs.uniform_()
    x, before = batch()["a"], merged.coeffs.detach().clone()
    want = merged(x, tasks="a").float()
    merged.float()
    torch.testing.assert_close(merged(x.float(), tasks="a"), want, atol=1e-4, rtol=1e-4)
    assert vectors.base["fc.weight"].dtype == torch.float64
    inside = {p.data_ptr() for p in merged.network.parameters()}
    assert {t.data_ptr() for n, t in merged.vectors.base.items() if n.endswith("weight")} <= inside
    merged.bfloat16()
    assert merged(x.bfloat16(), tasks="a").dtype == torch.bfloat16 and torch.equal(merged.coeffs, before)
    assert {t.dtype for t in merged.state("a").values() if t.is_floating_point()} == {torch.bfloat16}


def test_coefficients_are_where_the_vectors_are():
    """Layers that sum their own deltas take them from nowhere else."""
    base, vectors = tuned()
    assert MergedModel(base.to("meta"), vectors.to("meta"), head="head", route="layer").coeffs.device.type == "meta"


@pytest.mark.parametrize("token", [False, True])
def test_experts_move_as_a_whole(token):
    base, vectors = tuned(token)
    experts = Experts(base, vectors, "head")
    inputs = batch()
    want = experts(inputs)
    for task, y in experts.float()({task: x.float() for task, x in inputs.items()}).items():
        torch.testing.assert_close(y, want[task].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [MergedModel, merging.ConcreteModel])
@pytest.mark.parametrize("own", [None, "fc", "encoder.self_attn"])
def test_state_is_a_plain_model(own, kind):
    base, vectors = tuned()
    merged = kind(base, vectors, head="head", own=own)
    with torch.no_grad():
        for parameter in merged.own_parameters():
            parameter.add_(0.1)
    for task in TASKS:
        net = Net(len(vectors.own[task]["head.bias"])).eval().double()
        net.load_state_dict(merged.state(task))
        torch.testing.assert_close(net(batch()[task]), merged.each(batch())[task].detach())
    twin = copy.deepcopy(merged)
    torch.testing.assert_close(twin(batch()["a"], tasks="a"), merged(batch()["a"], tasks="a"))
    assert "head.weight" not in merged.state() and merged.train().training is False


@pytest.mark.parametrize("route", ["whole", "layer"])
def test_state_of_tied_weights(route):
    """All names of a tied tensor are what the forward uses: the merge by the first name's coefficients."""
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    states = [dict.fromkeys(("0.weight", "1.weight"), torch.randn(5, 4)) for _ in range(2)]
    merged = MergedModel(tied, TaskVectors.from_checkpoints(tied.state_dict(), states), route=route)
    merged.coeffs.data = torch.tensor([[0.2, 0.9], [0.6, 0.4]])
    plain = copy.deepcopy(tied)
    plain.load_state_dict(merged.state())
    torch.testing.assert_close(plain(torch.arange(5)), merged(torch.arange(5)))


def test_layers_in_several_places_sum_their_deltas_in_all_of_them():
    """Under two paths, and in a list that modules do not know of."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)
            self.conv = nn.Conv2d(1, 1, 1)
            self.listed = [self.conv]

        def forward(self, x):
            return self.listed[0](self.second(self.first(x))[None, None])

    torch.manual_seed(0)
    base, expert = Twice(), Twice()
    vectors = TaskVectors.from_checkpoints(base.state_dict(), [expert.state_dict()])
    x = torch.randn(3, 4)
    torch.testing.assert_close(MergedModel(base, vectors, route="layer", init=1.0)(x), expert(x))


@pytest.mark.parametrize("token", [False, True])
def test_experts(token):
    """One mixed batch where layers and norms hold all; one by one with a parameter that belongs to none."""
    base, vectors = tuned(token)
    experts = Experts(base, vectors, "head")
    assert experts.mixed is not token
    for task, y in experts(batch()).items():
        one = vectors.index(task)
        wanted = chain(vectors, task, lambda l, k, one=one: float(k == one), batch()[task], token=token)
        torch.testing.assert_close(y, wanted.detach())


def test_experts_of_another_copy_of_the_network():
    """Also a norm that no checkpoint changed is the base's, not that of the module that was given."""
    base, _ = tuned()
    state = base.state_dict() | {"bn.weight": torch.rand(6).double(), "bn.running_mean": torch.rand(6).double()}
    vectors = TaskVectors.from_checkpoints(state, {"a": state | {"conv.bias": torch.ones(6).double()}})
    want = functional_call(base, vectors.expert("a"), (batch()["a"],))
    torch.testing.assert_close(Experts(base, vectors)({"a": batch()["a"]})["a"], want)


STEPS = 3


def batches():
    return [batch(seed=s) for s in range(STEPS)]


def adam(parameters, lr, losses, steps):
    """``losses(step)`` yields one loss for each update."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        for loss in losses(step):
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            optimizer.step()


@pytest.mark.parametrize("route", ["whole", "layer"])
@pytest.mark.parametrize(("coeffs", "plus_plus"), [("tensor", False), ("task", False), ("tensor", True)])
def test_adamerging(coeffs, plus_plus, route):
    base, vectors = tuned()
    seen = []
    merged = merging.adamerging(
        base, vectors, batches(), head="head", coeffs=coeffs, plus_plus=plus_plus, lr=0.05, route=route,
        progress=lambda step, loss: seen.append(loss),
    )  # fmt: skip
    mine = merging.elected(vectors) if plus_plus else vectors
    c = torch.full((len(vectors.names), 3) if coeffs == "tensor" else (3,), 0.3, requires_grad=True)

    def losses(step):
        used, total = c.clamp(0, 1), 0
        for task, x in batches()[step].items():
            p = chain(mine, task, lambda l, k: used[l, k] if coeffs == "tensor" else used[k], x).softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        yield total

    adam([c], 0.05, losses, STEPS)
    rows = [l for l, n in enumerate(vectors.names) if "running" not in n] if coeffs == "tensor" else slice(None)
    torch.testing.assert_close(merged.coeffs.detach()[rows], c.detach()[rows], atol=2e-4, rtol=1e-3)
    assert len(seen) == STEPS and (merged.coeffs != 0.3).any()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_atlas(num_parts):
    base, vectors = tuned()
    labels = {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([2, 0]), "c": torch.tensor([3, 1, 0, 2])}
    data = [{task: (x, labels[task]) for task, x in one.items()} for one in batches()]
    merged = merging.atlas(base, vectors, data, head="head", num_parts=num_parts, lr=0.05, weight_decay=0.0)
    parts = merging.random_parts(vectors, num_parts)
    names = vectors.names
    c = torch.zeros(len(names), num_parts, 3, requires_grad=True)

    def losses(step):
        total = 0
        for task, (x, y) in data[step].items():
            total = total + F.cross_entropy(chain(vectors, task, lambda l, k: c[l, :, k][parts[names[l]].long()], x), y)
        yield total

    adam([c], 0.05, losses, STEPS)
    rows = [l for l, n in enumerate(names) if "running" not in n]
    found = merged.coeffs.detach().view(c.shape)
    torch.testing.assert_close(found[rows], c.detach()[rows], atol=2e-4, rtol=1e-3)
    assert found[rows].abs().max() > 0.1


@pytest.mark.parametrize(
    ("own", "updates", "plus_plus", "route"),
    [(None, "joint", False, "whole"), (None, "sequential", True, "layer"), ("fc", "joint", True, "whole"),
     ("fc", "sequential", False, "layer")],
)  # fmt: skip
def test_tinting(own, updates, plus_plus, route):
    base, vectors = tuned()
    merged = merging.tinting(
        base, vectors, batches(), head="head", own=own, updates=updates, plus_plus=plus_plus, lr=0.05, own_lr=0.05,
        route=route,
    )  # fmt: skip
    c = torch.full((len(vectors.names), 3), 0.3, requires_grad=True)
    if own is None:
        mine = {t: {n: v.clone().requires_grad_() for n, v in vectors.own[t].items()} for t in TASKS}
    else:
        mine = {t: {n: torch.zeros_like(vectors.base[n]).requires_grad_() for n in ("fc.weight", "fc.bias")}
                for t in TASKS}  # fmt: skip

    def loss_of(task, x):
        used = c.clamp(0, 1)
        y = chain(vectors, task, lambda l, k: used[l, k], x, mine[task])
        one = vectors.index(task)
        teacher = chain(vectors, task, lambda l, k: float(k == one), x).detach().softmax(-1)
        p = y.softmax(-1)
        keep = [i for i in range(len(x)) if not (
            plus_plus and p[i].argmax() != teacher[i].argmax() and p[i].max() > teacher[i].max())]  # fmt: skip
        rows = [-p[i, teacher[i].argmax()].log() for i in keep]
        return torch.stack(rows).mean() if rows else 0.0 * c.sum()

    def losses(step):
        each = batches()[step].items()
        if updates == "joint":
            yield sum(loss_of(task, x) for task, x in each)
        else:
            for task, x in each:
                yield loss_of(task, x)

    everything = [c, *(p for t in TASKS for p in mine[t].values())]
    adam(everything, 0.05, losses, STEPS)
    rows = [l for l, n in enumerate(vectors.names) if "running" not in n]
    torch.testing.assert_close(merged.coeffs.detach()[rows], c.detach()[rows], atol=2e-4, rtol=1e-3)
    for task in TASKS:
        state = merged.state(task)
        for name, tensor in mine[task].items():
            got = state[name] if own is None else state[name] - merged.state()[name]
            torch.testing.assert_close(got, tensor.detach(), atol=2e-4, rtol=1e-3)


def test_losses_of_nothing_are_zero():
    """No rows, or none that the filter leaves: zero, with zero gradients."""
    logits = torch.tensor([[0.0, 9.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0]])
    for loss in (
        agreement(logits, teacher, confident=True),
        agreement(logits[:0], teacher[:0]),
        agreement(logits[:0], teacher[:0], confident=True),
        entropy(logits[:0]),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0.0 and not gradient.any()
    assert float(agreement(logits, teacher)) > 8.0


def call(**kwargs):
    def run():
        base, vectors = tuned()
        return MergedModel(base, vectors, **{"head": "head", **kwargs})

    return run


def other_model():
    base, vectors = tuned()
    base.fc = nn.Linear(6, 8).double()
    MergedModel(base, vectors, head="head")


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (call(init=1.5), r"MergedModel: init must be in the clamp \(0.0, 1.0\), got 1.5"),
        (call(coeffs="layer"), "MergedModel: coeffs must be 'tensor', 'task', or 'part' with parts, got 'layer'"),
        (call(route="tile"), "MergedModel: route must be 'whole', or 'layer' without parts, got 'tile'"),
        (call(head=None), "MergedModel: head must be given, got none for vectors with tensors of each task's own"),
        (call(head="fc"), r"MergedModel: head must own all of \['head.weight', 'head.bias'\] \(task 'a'\), got 'fc'"),
        (other_model, r"MergedModel: model must have 'fc.weight' of shape \(7, 6\), got \(8, 6\)"),
        (lambda: merging.tinting(*tuned(), [], head="head", updates="both"), "updates must be 'joint' or 'sequential'"),
        (lambda: merging.tinting(*tuned(), []), "tinting: head or own must name a layer that each task trains"),
        (lambda: merging.random_parts(tuned()[1], 300), r"num_parts must be in \[1, 256\], got 300"),
    ],
)
def test_errors(run, text):
    with pytest.raises(ValueError, match=text):
        run()


def test_a_layer_outside_the_forward():
    merged = call(route="layer")()
    with pytest.raises(RuntimeError, match="MergedModel: a layer must run in the model's forward, got a call from"):
        merged.network.model.fc(torch.randn(1, 6))


def test_no_deltas():
    """K = 0 is the base."""
    base = Net().eval().double()
    vectors = TaskVectors.from_checkpoints(base.state_dict(), [])
    for route in ("whole", "layer"):
        merged = MergedModel(base, vectors, route=route)
        torch.testing.assert_close(merged(batch()["a"]), base(batch()["a"]))
        assert merged.coeffs.shape == (0, 0)
