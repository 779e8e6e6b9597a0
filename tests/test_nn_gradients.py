"""Gradients of whole layers: of what coefficients and biases are made of, in the one node that a layer records."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from taps_fast import FastTapsConv2d, FastTapsLinear, _call
from taps_fast._dispatch import Choice
from taps_fast.formats import SignBits

IDS = [1, -1, 0, 1, 2, 2, 1]
TASKS = ["a", "b", "c"]
SCORES = {"a": 0.3, "b": 0.02, "c": 0.2}  # b is closed behind the threshold of 0.1


def make(kind, bias, gate, dtype=torch.float64):
    torch.manual_seed(0)
    options = {"bias": bias, "gate": gate, "dtype": dtype, "tasks": TASKS}
    layer = FastTapsLinear(6, 4, **options) if kind == "linear" else FastTapsConv2d(6, 4, 3, padding=1, **options)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(torch.randn_like(value) if "scores" not in name else value)
        for task, score in SCORES.items():
            layer.scores[task].fill_(score)
    x = torch.randn(7, 6, dtype=dtype) if kind == "linear" else torch.randn(7, 6, 5, 5, dtype=dtype)
    return layer, x.requires_grad_()


def by_hand(layer, x, ids):
    """Row by row, the straight-through gate written out."""
    rows = []
    for row, t in zip(x, ids, strict=True):
        weight, bias = layer.base, layer.base_bias
        task = TASKS[t] if t >= 0 else None
        if task in layer.deltas:
            score = layer.scores[task]
            gate = score if layer.gate == "raw" else (score >= layer.threshold).to(score) + (score - score.detach())
            weight = weight + gate.to(weight) * layer.deltas[task]
            bias = None if bias is None else bias + gate.to(bias) * layer.bias_deltas[task]
        rows.append(F.linear(row, weight, bias) if x.dim() == 2 else F.conv2d(row[None], weight, bias, padding=1)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("trained", ["tasks", "base too", "scores", "biases"])
@pytest.mark.parametrize("ids", [IDS, [1] * 7, [0] * 7, [0, 0, 2, 2, -1, 0, 2]], ids=["all", "closed", "one", "two"])
@pytest.mark.parametrize("gate", ["ste", "raw"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_those_written_out(kind, bias, gate, ids, trained):
    layer, x = make(kind, bias, gate)
    if trained == "base too":
        layer.train_base()
    for name, parameter in layer.named_parameters():
        if trained in ("scores", "biases"):
            parameter.requires_grad_({"scores": "scores", "biases": "bias_deltas"}[trained] in name)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    dy = torch.randn(7, 4, *x.shape[2:], dtype=x.dtype)
    alone = len(set(ids)) == 1
    y = layer(x, tasks=TASKS[ids[0]] if alone else ids)
    want = by_hand(layer, x, ids)
    torch.testing.assert_close(y, want)
    found = torch.autograd.grad(y, [x, *wanted], dy, allow_unused=True)
    hand = torch.autograd.grad(want, [x, *wanted], dy, allow_unused=True)
    for got, should in zip(found, hand, strict=True):
        assert (got is None) == (should is None)
        if got is not None:
            torch.testing.assert_close(got, should, check_dtype=False)


@pytest.mark.parametrize("tasks", ["a", "b", IDS], ids=["open", "closed", "mixed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_records_one_node(kind, tasks):
    layer, x = make(kind, True, "ste", torch.float32)
    y = layer(x, tasks=tasks)  # which keeps the node: by itself it is an empty shell
    node = y.grad_fn
    below = [after for after, _ in node.next_functions if after is not None]
    assert type(node).__name__ == "DeltaBackward"
    assert {type(after).__name__ for after in below} == {"AccumulateGrad"}


def test_a_task_without_a_delta_takes_part_as_the_base():
    layer, x = make("linear", True, "ste")
    layer.close("b")
    layer.train_base()
    y, want = layer(x, tasks=IDS), by_hand(layer, x, IDS)
    torch.testing.assert_close(y, want)
    wanted = [p for name, p in layer.named_parameters() if p.requires_grad and name != "scores.b"]
    dy = torch.randn_like(y)
    for got, should in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(want, wanted, dy), strict=True):
        torch.testing.assert_close(got, should, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tasks", ["a", IDS], ids=["single", "mixed"])
def test_gradients_have_the_dtype_of_what_they_belong_to(tasks, dtype):
    layer, x = make("linear", True, "ste", dtype)
    layer.train_base()
    layer(x, tasks=tasks).sum().backward()
    for task in ["a"] if tasks == "a" else TASKS:
        assert layer.scores[task].grad.dtype == torch.float32
        assert layer.bias_deltas[task].grad.dtype == dtype
        assert layer.scores[task].grad.shape == ()
    assert layer.base_bias.grad.dtype == dtype


@pytest.mark.parametrize("tasks", ["a", IDS], ids=["single", "mixed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_gives_parameters_gradients_of_their_own_dtype(kind, tasks):
    layer, x = make(kind, True, "ste", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, tasks=tasks)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    ids = [0] * 7 if tasks == "a" else IDS
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    by_hand(layer, x, ids).sum().backward()
    for name, gradient in found.items():
        want = layer.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, want, atol=0.02 * want.abs().max().item() + 1e-3, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tasks", ["a", IDS], ids=["single", "mixed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_backward_inside_autocast_is_that_outside(kind, tasks, dtype):
    layer, x = make(kind, True, "ste", torch.float32)
    with torch.autocast("cpu", dtype):
        y = layer(x, tasks=tasks)
        leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
        dy = torch.full_like(y, 3000.0)  # sums of it are beyond float16
        inside = torch.autograd.grad(y, leaves, dy, allow_unused=True, retain_graph=True)
    outside = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    for got, want in zip(inside, outside, strict=True):
        assert (got is None) == (want is None)
        assert got is None or (torch.equal(got, want) and (got.dtype == want.dtype) and bool(got.isfinite().all()))


@pytest.mark.parametrize("how", ["reference", "compressed", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_other_ways_give_the_same_gradients(how, bias, monkeypatch):
    layer, x = make("linear", bias, "ste")
    ids = [0] * 7
    if how == "compressed":
        layer.set_delta("a", SignBits.from_dense(layer.deltas["a"]))
        layer.scores["a"].requires_grad_()
    dy = torch.randn(7, 4, dtype=x.dtype)
    if how == "reference":
        monkeypatch.setattr(_call, "select", lambda *_: Choice("reference", "split"))
        assert type(layer(x, tasks="a").grad_fn).__name__ != "DeltaBackward"
    y = torch.stack([layer(row, tasks="a") for row in x]) if how == "unbatched" else layer(x, tasks="a")
    if how == "compressed":
        dense = layer.delta("a").dense(x.dtype)
        gate = 1 + (layer.scores["a"] - layer.scores["a"].detach())
        bias_of_a = layer.base_bias + gate.to(x) * layer.bias_deltas["a"] if bias else None
        want = F.linear(x, layer.base + gate.to(x) * dense, bias_of_a)
    else:
        want = by_hand(layer, x, ids)
    leaves = [x, layer.scores["a"], *([layer.bias_deltas["a"]] if bias else [])]
    for got, should in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(got, should, check_dtype=False)


def test_values_need_not_be_there():
    with FakeTensorMode():
        layer = FastTapsLinear(6, 4, tasks=TASKS)
        layer(torch.randn(7, 6), tasks="a").sum().backward()
        assert layer.scores["a"].grad.shape == ()
        with torch.no_grad():
            assert layer(torch.randn(7, 6), tasks="a").shape == (7, 4)


def test_a_bias_delta_changed_before_the_backward_is_an_error():
    layer, x = make("linear", True, "ste", torch.float32)
    y = layer(x, tasks="a")
    with torch.no_grad():
        layer.bias_deltas["a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Doubled(torch.nn.Module):
    def forward(self, stored):
        return 2 * stored


@pytest.mark.parametrize("tasks", ["a", IDS], ids=["single", "mixed"])
@pytest.mark.parametrize("owned", ["deltas", "bias_deltas", "scores"])
def test_what_parametrizations_make_has_a_graph(owned, tasks):
    layer, x = make("linear", True, "raw")
    plain, _ = make("linear", True, "raw")
    parametrize.register_parametrization(getattr(layer, owned), "a", Doubled())
    stored = getattr(layer, owned).parametrizations["a"].original
    with torch.no_grad():
        stored.div_(2)
    dy = torch.randn(7, 4, dtype=x.dtype)
    (found,) = torch.autograd.grad(layer(x, tasks=tasks), stored, dy)
    (want,) = torch.autograd.grad(plain(x, tasks=tasks), getattr(plain, owned)["a"], dy)
    torch.testing.assert_close(found, 2 * want)


def test_every_pair_of_tasks_in_a_batch():
    layer, x = make("linear", True, "ste")
    for pair in itertools.permutations(range(3), 2):
        ids = [pair[r % 2] for r in range(7)]
        leaves = [layer.scores[TASKS[t]] for t in pair]
        found = torch.autograd.grad(layer(x, tasks=ids).square().sum(), leaves)
        want = torch.autograd.grad(by_hand(layer, x, ids).square().sum(), leaves)
        torch.testing.assert_close(found, want)
