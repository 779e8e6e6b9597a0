"""Models and layers by a device's choices and kernels: what they give and learn is what they do on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from device_route import on_a_device
from nets import ConvNet, Transformer, images, three_tasks
from triton_shim import INTERPRETED

from taps_fast import FastTapsConv2d, FastTapsLinear, TaskBatch, _aten, _images, norms

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="there is a GPU, and test_model_gpu.py")
NETS = {"conv": ConvNet, "transformer": Transformer}
MIX = ["cars", "cubs", None, "dogs", "cars", "cubs"]


def step(model, x, tasks):
    y = model(x, tasks=tasks)
    y.masked_fill(y.isinf(), 0).square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()


@pytest.mark.parametrize("tasks", (MIX, "cubs"), ids=("mixed", "one"))
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", NETS)
def test_a_step(monkeypatch, name, training, tasks):
    """Logits, every gradient, and in training the statistics of the tasks' batch norms."""
    here = three_tasks(NETS[name](), dtype=torch.float32)
    here.probe(images(2, dtype=torch.float32))
    there = copy.deepcopy(here.train(training))
    x = images(len(MIX), dtype=torch.float32)
    expected = step(here, x, tasks)
    with on_a_device(monkeypatch) as operators:
        found = step(there, x, tasks)
    assert operators.calls["conv2d_grad"] >= 1 and operators.calls["linear_grad"] >= (1 if tasks == MIX else 0)
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", (None, "bits", "int8"))
@pytest.mark.parametrize("prepared", (False, True))
@pytest.mark.parametrize("name", NETS)
def test_inference(monkeypatch, name, prepared, format):
    here = three_tasks(NETS[name](), dtype=torch.float32)
    here.probe(images(2, dtype=torch.float32))
    if format:
        for task in ("cubs", "cars", "dogs"):
            here.compress(task, format)
    there, x = copy.deepcopy(here), images(len(MIX), dtype=torch.float32)
    with torch.no_grad():
        expected = [here(x, tasks=tasks) for tasks in (MIX, "dogs")]
        with on_a_device(monkeypatch):
            if prepared:
                there.prepare_inference()
            found = [there(x, tasks=tasks) for tasks in (MIX, "dogs")]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", ("ste", "raw"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("tasks", ([1, -1, 0, 1, 2, 2, 1], [0, 0, 2, 2, -1, 0, 2], "a"), ids=("all", "two", "one"))
@pytest.mark.parametrize("kind", ("linear", "conv"))
def test_every_gradient_of_a_layer(monkeypatch, kind, tasks, bias, gate):
    """Also of scores and biases, which a layer's one node makes of the operator's results."""
    options = {"tasks": ["a", "b", "c"], "bias": bias, "gate": gate, "threshold": 0.1}
    here = FastTapsLinear(6, 4, **options) if kind == "linear" else FastTapsConv2d(6, 4, 3, padding=1, **options)
    with torch.no_grad():
        for name, value in here.named_parameters():
            value.copy_(torch.randn_like(value) if "scores" not in name else {"a": 0.3, "b": 0.02, "c": 0.2}[name[-1]])
    here.train_base()
    x = torch.randn(7, 6) if kind == "linear" else torch.randn(7, 6, 5, 5)
    dy = torch.randn_like(here(x, tasks=tasks))

    def gradients(layer):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        return torch.autograd.grad(layer(leaves[0], tasks=tasks), leaves, dy, allow_unused=True)

    expected = gradients(here)
    with on_a_device(monkeypatch) as operators:
        found = gradients(copy.deepcopy(here))
    assert operators.calls["linear_grad" if kind == "linear" else "conv2d_grad"] == 1
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_hand", (False, True))
@pytest.mark.parametrize("closed", (False, True))
@pytest.mark.parametrize("pairs", ([], [0, 3], [1, 2, 4]))
def test_gradients_of_the_pairs_of_a_convolution(monkeypatch, at_hand, pairs, closed):
    """Of 3 tasks and 2 deltas. Outside the pairs coefficients are 0 and have no gradient."""
    monkeypatch.setattr(_images, "at_hand", lambda x: at_hand)
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 2, 5, 5)
    base, *deltas = torch.randn(3, 2, 3, 3, 3)
    ids, order = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 3, 2, 1])
    index = (ids, order, torch.tensor([0, 0, 2, 3, 4]), 1)
    how = ([1, 1], [1, 1], [1, 1], 1)
    coeffs = torch.randn(3, 2)
    if pairs:
        coeffs.view(-1)[[n for n in range(6) if n not in pairs]] = 0.0
    if closed:
        coeffs.view(-1)[(pairs or [4])[-1]] = 0.0
    _, ddeltas, dcoeffs = _aten.conv2d_grad(
        dy, x, base, deltas, coeffs, None, *how, *index, False, False, pairs, [0, 1], True, False
    )
    products = torch.stack(
        [torch.nn.grad.conv2d_weight(x[ids == t], base.shape, dy[ids == t], padding=1) for t in range(3)]
    )
    wanted = torch.tensor([not pairs or n in pairs for n in range(6)]).view(3, 2)
    expected = torch.einsum("toixy,koixy->tk", products, torch.stack(deltas)) * wanted
    torch.testing.assert_close(dcoeffs, expected, rtol=1e-4, atol=1e-4)
    expected = torch.einsum("toixy,tk->koixy", products, coeffs)
    torch.testing.assert_close(torch.stack(ddeltas), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_hand", (False, True))
def test_what_a_closed_gate_spoils_stays_its_own(monkeypatch, at_hand):
    """A gradient that is not finite, of images whose coefficient is 0, reaches the coefficient alone."""
    monkeypatch.setattr(_images, "at_hand", lambda x: at_hand)
    x, dy = torch.randn(2, 3, 5, 5), torch.randn(2, 2, 5, 5)
    dy[1] = torch.inf
    base, *deltas = torch.randn(3, 2, 3, 3, 3)
    index = (torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 0, 1, 2]), 1)
    _, ddeltas, dcoeffs = _aten.conv2d_grad(
        dy, x, base, deltas, torch.diag(torch.tensor([1.0, 0.0])), None, [1, 1], [1, 1], [1, 1], 1, *index,
        False, False, [0, 3], [0, 1], True, False,
    )  # fmt: skip
    assert ddeltas[0].isfinite().all() and (ddeltas[1] == 0).all()
    assert dcoeffs.isfinite().tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("kind", ("linear", "conv"))
def test_a_closed_gate_keeps_a_diverged_delta_from_a_batch_of_its_task(monkeypatch, kind):
    """Though a device does not know that the gate is closed."""
    layer = FastTapsLinear(6, 4, tasks=["a"]) if kind == "linear" else FastTapsConv2d(6, 4, 3, tasks=["a"])
    x = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        layer.base.normal_()
        layer.deltas["a"].fill_(torch.nan)
        layer.scores["a"].zero_()
    x.requires_grad_()
    with on_a_device(monkeypatch):
        y = layer(x, tasks="a")
        dx, ddelta = torch.autograd.grad(y.sum(), [x, layer.deltas["a"]])
    assert y.isfinite().all() and dx.isfinite().all() and (ddelta == 0).all()
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("format", ("lowrank", "bits"))
def test_a_prepared_models_tasks_take_their_own_delta_alone(monkeypatch, format):
    """What has diverged in one reaches no other's rows."""
    model = three_tasks(Transformer(), dtype=torch.float32)
    model.probe(images(2, dtype=torch.float32))
    for task in ("cubs", "cars", "dogs"):
        model.compress(task, format, **({"rank": 2} if format == "lowrank" else {}))
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if "fc2.deltas.cubs" in name and tensor.is_floating_point():
            tensor.data.fill_(torch.inf)
    x = images(4, dtype=torch.float32)
    with torch.no_grad(), on_a_device(monkeypatch):
        model.prepare_inference()
        y = model(x, tasks=["cars", "cubs", None, "dogs"])
    assert y.isnan().any(1).tolist() == [False, True, False, False]


def test_a_normalised_image_keeps_its_layout(monkeypatch):
    x = torch.randn(3, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    tables = [torch.ones(8)] * 3, [torch.zeros(8)] * 3
    batch = TaskBatch.from_ids([0, 1, -1], 2)
    for center in (True, False):
        expected = norms.group_norm(x, *tables, 2, 1e-5, batch, center=center)
        with on_a_device(monkeypatch):
            y = norms.group_norm(x, *tables, 2, 1e-5, batch, center=center)
        assert y.stride() == expected.stride() == x.stride()
        torch.testing.assert_close(y, expected)
