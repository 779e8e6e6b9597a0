"""Self Positioning, fusion, Concrete, generated deltas, ScaLearn and Twin-Merging against plain restatements."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_merging_static import K, check, flattened, random_vectors
from test_merging_trained import batch, batches, chain, tuned
from torch import nn

from taps_fast import merging
from taps_fast.merging import TaskVectors


@pytest.fixture(scope="module")
def vectors():
    return random_vectors()


def slerp(a, b, s):
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    if cosine.abs() > 1 - 1e-9:
        return (1 - s) * a + s * b
    angle = torch.acos(cosine)
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def test_slerp_coefficients(vectors):
    _, tau = flattened(vectors)
    tau = tau.double()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    wanted, total = tau[0], 1.0
    for k in range(1, K):
        total += float(weights[k])
        wanted = slerp(wanted, tau[k], float(weights[k]) / total)
    found = merging.slerp_coefficients(tau @ tau.t(), weights)
    torch.testing.assert_close(found @ tau, wanted)
    parallel = torch.stack([tau[0], 2 * tau[0]])
    halfway = merging.slerp_coefficients(parallel @ parallel.t(), torch.ones(2)) @ parallel
    torch.testing.assert_close(halfway, 1.5 * tau[0])
    assert merging.slerp_coefficients(torch.zeros(0, 0), torch.zeros(0)).shape == (0,)


def test_self_positioning(vectors):
    base, tau = flattened(vectors)
    target = base + 0.9 * tau[2]

    def loss(state):
        return (torch.cat([state[n].flatten() for n in vectors.names]) - target).square().sum()

    start = float(loss(vectors.fold(0.0)))
    state, coeffs = merging.self_positioning(vectors, loss, steps=150, lr=0.05)
    check(state, base + coeffs @ tau)
    assert float(loss(state)) < 0.3 * start and coeffs.argmax() == 2
    again, other = merging.self_positioning(vectors, loss, steps=20, lr=0.05, penalty=100.0)
    assert other.norm() < coeffs.norm()
    with pytest.raises(ValueError, match="self_positioning: init must be 4 positive numbers, got"):
        merging.self_positioning(vectors, loss, init=[1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_fusion(vectors, power):
    base, tau = flattened(vectors)
    share = tau.abs() ** power
    share = share / share.sum(0)
    check(merging.fusion(vectors, power=power), (share * (base + tau)).sum(0))


def test_fusion_with_given_weights(vectors):
    base, tau = flattened(vectors)
    g = torch.Generator().manual_seed(1)
    given = {n: torch.rand((K, *vectors.base[n].shape), generator=g) for n in vectors.names}
    flat = torch.cat([w.flatten(1) for w in given.values()], 1)
    check(merging.fusion(vectors, given), (flat * (base + tau)).sum(0))
    given["norm.w"] = given["norm.w"][1:]
    with pytest.raises(ValueError, match=r"fusion: weights must have 'norm.w' of shape \(4, 3\), got \(3, 3\)"):
        merging.fusion(vectors, given)
    still = TaskVectors({"w": torch.ones(2)}, {"w": [torch.zeros(2), torch.tensor([0.0, 2.0])]}, ["a", "b"])
    assert merging.fusion(still)["w"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusion_in_half_precision(vectors, dtype, given):
    """Squares of small deltas are below the smallest number of float16; weights may be more exact than the model."""
    half = vectors.moved(lambda t: (1e-4 * t).to(dtype))
    weights = {n: torch.full((K, *half.base[n].shape), 1 / K) for n in half.names} if given else None
    state = merging.fusion(half, weights, power=2.0)
    exact = merging.fusion(half.moved(lambda t: t.double()), weights, power=2.0)
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_concrete_in_float16():
    """The sum of many masks, and the squares of small gradients, are beyond its range: logits stay in float32."""
    base = nn.Linear(400, 400).half()
    vectors = TaskVectors.from_checkpoints(base.state_dict(), [{n: t + 0.1 for n, t in base.state_dict().items()}])
    for model in (merging.ConcreteModel(base, vectors), merging.ConcreteModel(base, vectors.moved(torch.Tensor.float))):
        model.half()
        assert {p.dtype for p in model.logits} == {torch.float32}
        torch.testing.assert_close(model.masks()["weight"], torch.ones_like(base.weight))
    inputs = [{"0": torch.randn(2, 400).half()}] * 2
    state = merging.concrete(base, vectors, inputs).state()
    assert all(t.isfinite().all() and t.dtype == torch.float16 for t in state.values())
    with pytest.raises(
        TypeError, match=r"tinting: vectors must be float32, bfloat16 or float64 in .*, got torch.float16"
    ):
        merging.tinting(base, vectors, inputs, own="")


def test_concrete():
    """With noise switched off the training is deterministic, so that the restatement can follow it."""
    base, vectors = tuned()
    model = merging.ConcreteModel(base, vectors, head="head", temperature=0.7, logit=0.2)
    total = 0
    c = torch.full((len(vectors.names), 3), 0.3, dtype=torch.float64, requires_grad=True)
    logits = [torch.full_like(vectors.base[n], 0.2).requires_grad_() for n in vectors.names]
    soft = [torch.sigmoid(x / 0.7) for x in logits]
    mean = torch.cat([m.flatten() for m in soft]).mean()
    for task, y in model.each(batch()).items():
        masked = chain(vectors, task, lambda l, k: c[l, k] * (soft[l] / mean), batch()[task])
        torch.testing.assert_close(y, masked)
        total = total + y.square().mean()
        masked.square().mean().backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(model.coeffs.grad.double(), c.grad, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(model.logits, logits, strict=True):
        torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)

    trained = merging.concrete(base, vectors, batches(), head="head", mask_lr=0.5)
    masks = trained.masks()
    mean = torch.cat([m.flatten() for m in masks.values()]).mean()
    assert not trained.sampling and math.isclose(float(mean.detach()), 1.0, abs_tol=1e-6)
    assert any(m.std() > 0 for m in masks.values())
    torch.testing.assert_close(trained.state("a")["fc.weight"], trained.weights()["fc.weight"].detach())
    trained.sampling = True
    assert not torch.equal(trained.masks()["fc.weight"], trained.masks()["fc.weight"])
    with pytest.raises(ValueError, match="ConcreteModel: route must be 'whole' without parts, got 'layer'$"):
        merging.ConcreteModel(base, vectors, head="head", route="layer")


def test_generated_deltas():
    base = {"w": torch.randn(4, 3), "v": torch.randn(2, 2), "b": torch.randn(4)}
    factors = {t: {"w": (torch.randn(4, 2), torch.randn(2, 3))} for t in "xy"}
    factors["y"]["v"] = (torch.randn(2, 1), torch.randn(1, 2))
    vectors = merging.from_generator(base, factors.__getitem__, ["x", "y"], scale=0.5)
    b, a = factors["y"]["w"]
    torch.testing.assert_close(vectors.expert("y")["w"], base["w"] + 0.5 * b @ a)
    torch.testing.assert_close(vectors.expert("x")["v"], base["v"])
    assert vectors.kept == ["b"]
    for pair, text in (
        ({"w": (torch.ones(4, 2), torch.ones(3, 3))}, r"generate\('x'\) must give \[O, r\] and \[r, I\]"),
        ({"q": (torch.ones(4, 2), torch.ones(2, 3))}, r"for a tensor of base, got \(4, 2\) and \(2, 3\) for 'q'"),
        ({"w": (torch.ones(3, 2), torch.ones(2, 3))}, r"'w' must get factors of \(4, 3\), got \(3, 2\) and \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=text):
            merging.from_generator(base, lambda task, pair=pair: pair, ["x"])


@pytest.mark.parametrize("width", [5, None])
def test_scalearn(width):
    torch.manual_seed(0)
    adapters = [nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())]
    layer = merging.ScaLearn(adapters, width)
    h = torch.randn(2, 3, 5, requires_grad=True)
    with torch.no_grad():
        layer.omega.copy_(torch.randn_like(layer.omega))
    y = layer(h)
    omega = layer.omega.detach().clone().requires_grad_()
    wanted = h + sum(omega[s] * adapter(h) for s, adapter in enumerate(adapters))
    torch.testing.assert_close(y, wanted)
    (y.square().sum() + wanted.square().sum()).backward()
    torch.testing.assert_close(layer.omega.grad, omega.grad)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["omega"]
    with pytest.raises(ValueError, match="ScaLearn: adapters must be at least one module, got none"):
        merging.ScaLearn([])


@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 7)])
def test_twin_merging(shape):
    """The weight of each sample, formed whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 20), nn.GELU(), nn.LayerNorm(20), nn.Linear(20, 10))
    base = model.state_dict()
    states = [{n: t + 0.2 * torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    vectors = TaskVectors.from_checkpoints(base, states)
    inner = nn.Linear(7, 3)

    def router(x):
        return inner(x if x.dim() == 2 else x.mean(1))

    twin = merging.TwinModel(model, vectors, router, shared=0.25, keep=0.3)
    x = torch.randn(*shape)
    gates = router(x).softmax(-1)
    star = {n: base[n] + 0.25 * sum(s[n] - base[n] for s in states) for n in base}
    for b in range(len(x)):
        state = dict(star)
        for name in ("0.weight", "3.weight"):
            rank = round(0.3 * min(base[name].shape))
            for t, tuned_state in enumerate(states):
                u, s, v = torch.linalg.svd(tuned_state[name] - star[name], full_matrices=False)
                state[name] = state[name] + gates[b, t] * (u[:, :rank] * s[:rank]) @ v[:rank]
        wanted = torch.func.functional_call(model, state, (x[b],))
        torch.testing.assert_close(twin(x)[b], wanted, atol=1e-5, rtol=1e-4)
    F.mse_loss(twin(x), torch.zeros_like(twin(x))).backward()
    assert inner.weight.grad.any()
    with pytest.raises(ValueError, match=r"TwinModel: keep must be in \(0, 1\], got 0"):
        merging.TwinModel(model, vectors, router, keep=0)
    first_axis = merging.TwinModel(model, vectors, lambda x: torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"TwinModel: the batch must be the first axis of x, got"):
        first_axis(x)


def test_twin_merging_of_tied_and_repeated_layers():
    torch.manual_seed(0)
    layer, tied = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    tied.weight = layer.weight
    model = nn.Sequential(layer, tied, layer)
    state = dict.fromkeys(model.state_dict(), torch.randn(4, 4))
    twin = merging.TwinModel(
        model, TaskVectors.from_checkpoints(model.state_dict(), [state]), nn.Linear(4, 1), keep=1.0
    )
    x = torch.randn(3, 4)
    torch.testing.assert_close(twin(x), torch.func.functional_call(model, state, (x,)))


@pytest.mark.parametrize("route", ["whole", "layer"])
def test_a_forward_leaves_a_module_with_two_names_as_it_was(route):
    """functional_call restores such a module to what its first name was given, where it looks for ties itself."""
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(layer, norm, layer, norm).eval()
    vectors = TaskVectors.from_checkpoints(
        model.state_dict(), [{n: t + 1 if t.is_floating_point() else t for n, t in model.state_dict().items()}] * 2
    )
    merged = merging.MergedModel(model, vectors, route=route)
    before, x = {n: t.data_ptr() for n, t in merged.state_dict().items()}, torch.randn(3, 4)
    y = merged(x)
    assert {n: t.data_ptr() for n, t in merged.state_dict().items()} == before
    torch.testing.assert_close(copy.deepcopy(merged)(x), y)
    torch.testing.assert_close(torch.func.functional_call(model, merged.state(), (x,)), y)


def test_twin_needs_a_logit_a_task():
    model = nn.Linear(4, 4)
    vectors = TaskVectors.from_checkpoints(model.state_dict(), [model.state_dict()] * 4)
    with pytest.raises(ValueError, match=r"router must return \[B, 4\], one logit a task, got \(3, 2\)"):
        merging.TwinModel(model, vectors, nn.Linear(4, 2))(torch.randn(3, 4))


@pytest.mark.parametrize("pixels", [False, True], ids=["tokens", "pixels"])
def test_classes_of_tokens_and_of_pixels(pixels):
    """Outputs are cut, and their entropy is taken, along the classes, wherever these are."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(4, 8, 1) if pixels else nn.Linear(4, 8)
            self.head = nn.Conv2d(8, 3, 1) if pixels else nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(x).relu())

    base = Net()
    states = {t: {n: p + torch.randn_like(p) for n, p in base.state_dict().items()} for t in "ab"}
    merged = merging.MergedModel(
        base, TaskVectors.from_checkpoints(base.state_dict(), states, own="head.*"), head="head"
    )
    inputs = {t: torch.randn(3, *((4, 5, 7) if pixels else (10, 4))) for t in "ab"}
    alone = {t: torch.func.functional_call(base, merged.state(t), (x,)) for t, x in inputs.items()}
    for t, y in merged.each(inputs).items():
        torch.testing.assert_close(y, alone[t])
    for t, rows in merged.each_rows(inputs).items():
        axis = 1 if pixels else 2
        p = alone[t].softmax(axis)
        torch.testing.assert_close(merging.entropy(rows), -(p * p.log()).sum(axis).mean())
    labels = {t: torch.randint(3, alone[t].argmax(1 if pixels else 2).shape) for t in "ab"}
    trained = merging.atlas(base, merged.vectors, [{t: (x, labels[t]) for t, x in inputs.items()}] * 2, head="head")
    assert trained.coeffs.any() and trained.coeffs.isfinite().all()
