"""Subclasses with a forward of their own, and multi-head attention: their behaviour stays, with each task's weight."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from nets import PadConv2d, StdConv2d, assert_rows_as_separate, perturb
from torch import nn
from torch.utils.checkpoint import checkpoint

from taps_fast import TapsModel
from taps_fast.nn import WrappedLayer

ROWS = ["cars", None, "cubs", "cars", "dogs"]


class ScaledLinear(nn.Linear):
    """Multiplies its weight: not the weight unchanged."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class ShiftedLinear(nn.Linear):
    """Changes its input and output, passes by keyword, and takes an option."""

    def forward(self, x, shift=1.0):
        return F.linear(input=x + shift, weight=self.weight, bias=self.bias).tanh()


class LateBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


class FlatLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class Twice(nn.Linear):
    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight, self.bias)


class InPlaceLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x.mul_(2), self.weight, self.bias)


class OwnGradient(torch.autograd.Function):
    """Its forward runs without gradients, as that of any function; only its own backward knows the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ x, dy.sum(0)


class FunctionLinear(nn.Linear):
    def forward(self, x):
        return OwnGradient.apply(x, self.weight, self.bias)


class CheckpointedLinear(nn.Linear):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, y: y + args[0])
    return layer


LAYERS = {
    "pad": (lambda: PadConv2d(4, 6, 3, stride=2), (5, 4, 7, 6), True),
    "std": (lambda: StdConv2d(4, 6, 3, padding=1), (5, 4, 7, 6), False),
    "scaled": (lambda: ScaledLinear(4, 6), (5, 4), False),
    "shifted": (lambda: ShiftedLinear(4, 6), (5, 3, 4), True),
    "late bias": (lambda: LateBias(4, 6), (5, 4), False),
    "twice": (lambda: Twice(4, 4), (5, 4), False),
    "function": (lambda: FunctionLinear(4, 6), (5, 4), False),
    "checkpointed": (lambda: CheckpointedLinear(4, 6), (5, 4), False),
    "hooked": (hooked, (5, 4), True),
}


def adapt(net, dtype=torch.float64):
    torch.manual_seed(0)
    model = TapsModel(net.to(dtype), ["cubs", "cars", "dogs"])
    return perturb(model, closed=()), model.conversion


def open_all(model):
    for layer in model.conversion.layers.values():
        for score in layer.scores.values():
            score.data.fill_(0.2)
    return model


def by_hand(model, name, x):
    """The original module with base + delta in place of its parameters."""
    layer = next(iter(model.conversion.layers.values()))
    plain = copy.deepcopy(layer.module)
    if name is not None:
        plain.weight.data += layer.deltas[name].data
        plain.bias.data += layer.bias_deltas[name].data
    return plain(x)


@pytest.mark.parametrize("name", LAYERS)
def test_its_own_forward_with_each_tasks_weight(name):
    build, shape, fused = LAYERS[name]
    model, conversion = adapt(build())
    open_all(model)
    (layer,) = conversion.layers.values()
    assert isinstance(layer, WrappedLayer) and layer.fused == fused
    assert ("fused" in conversion.rows[0].reason) == fused and (
        "task by task (its" in conversion.rows[0].reason
    ) != fused
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for task in (None, "cubs", "cars"):
        torch.testing.assert_close(model(x, tasks=task or "base"), by_hand(model, task, x))
    mixed = assert_rows_as_separate(model, x, ROWS)
    (mixed**2).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad} | {"x": x.grad.clone()}
    model.zero_grad()
    x.grad = None
    for i, task in enumerate(ROWS):
        (model(x[i : i + 1], tasks=task or "base") ** 2).sum().backward()
    for n, value in got.items():
        torch.testing.assert_close(value, x.grad if n == "x" else model.get_parameter(n).grad)
    assert type(model.merge("cubs")) is type(build())


@pytest.mark.parametrize("name", LAYERS)
def test_closed_gates_get_their_score_gradient(name):
    build, shape, _ = LAYERS[name]
    model, conversion = adapt(build())
    (layer,) = conversion.layers.values()
    layer.scores["cubs"].data.fill_(0.0)
    # A reentrant checkpoint has gradients only where its input has.
    (model(torch.randn(shape, dtype=torch.float64, requires_grad=True), tasks="cubs") ** 2).sum().backward()
    assert layer.scores["cubs"].grad != 0 and bool((layer.deltas["cubs"].grad == 0).all())


def test_state_dicts_of_the_original_load():
    _, conversion = adapt(PadConv2d(4, 6, 3))
    (layer,) = conversion.layers.values()
    original = PadConv2d(4, 6, 3).double()
    deltas = layer.deltas["cubs"].clone()
    layer.load_state_dict(original.state_dict())
    assert torch.equal(layer.base, original.weight) and torch.equal(layer.base_bias, original.bias)
    assert torch.equal(layer.deltas["cubs"], deltas)
    layer.load_state_dict(layer.state_dict())


def test_an_option_passes_through():
    model, _ = adapt(ShiftedLinear(4, 6))
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x, shift=3.0, tasks=ROWS), model(x + 2.0, tasks=ROWS))


def test_reshaped_rows_in_a_fused_layer_are_an_error_in_a_mixed_batch():
    model, _ = adapt(nn.Sequential(FlatLinear(4, 6)))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    with pytest.raises(RuntimeError, match="0: FlatLinear must keep the leading axes of its input in a mixed batch"):
        model(x, tasks=ROWS)


def test_a_layer_that_changes_its_input_in_place_is_fused():
    _, conversion = adapt(InPlaceLinear(4, 6))
    assert conversion.layers[""].fused


def test_a_trial_that_cannot_run_means_task_by_task():
    class Odd(nn.Linear):
        def forward(self, x):
            assert x.shape[0] > 1
            return super().forward(x)

    _, conversion = adapt(Odd(4, 6))
    assert "a trial forward raised AssertionError" in conversion.rows[0].reason


def test_a_layer_that_leaves_what_its_trial_did_is_an_error():
    class Trains(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2 if self.training else self.weight)

    class Caches(nn.Linear):
        cached = None

        def forward(self, x):
            return F.linear(x, self.weight) if self.cached is None else x @ self.cached

    x = torch.randn(2, 4, dtype=torch.float64)
    model, _ = adapt(nn.Sequential(Trains(4, 6, bias=False)).eval())
    torch.testing.assert_close(model(x, tasks="cubs"), model.merge("cubs")(x))
    with pytest.raises(RuntimeError, match="0: Trains must use its weight as in its trial.*got it used in mul"):
        model.train()(x, tasks="cubs")
    model, conversion = adapt(nn.Sequential(Caches(4, 6)).eval())
    conversion.layers["0"].module.cached = torch.ones(4, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="got it used in nothing"):
        model(x, tasks="cubs")


def test_a_layer_that_does_not_use_its_weight_is_refused():
    class Ignores(nn.Linear):
        def forward(self, x):
            return x

    _, conversion = adapt(nn.Sequential(Ignores(4, 4)))
    assert conversion.rows[0].verdict == "refused" and "does not use its weight" in conversion.rows[0].reason


def test_threads_with_different_tasks():
    model, _ = adapt(StdConv2d(4, 6, 3))
    open_all(model)
    x = torch.randn(4, 4, 9, 9, dtype=torch.float64)
    tasks = ["cubs", "cars", "dogs", "base"] * 8
    want = {task: model(x, tasks=task) for task in set(tasks)}
    with ThreadPoolExecutor(4) as pool:
        for task, y in zip(tasks, pool.map(lambda task: model(x, tasks=task), tasks), strict=True):
            assert torch.equal(y, want[task])


ATTENTION = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "no bias": {"batch_first": True, "bias": False},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_multihead_attention(name):
    """Every option, on the base and on a task, against the original module."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(8, 2, **ATTENTION[name], dtype=torch.float64).eval()
    model, conversion = adapt(original)
    assert list(conversion.layers) == ["in_proj", "out_proj"] and conversion.rows[0].verdict == "converted"
    q, kv, v = (torch.randn(3, n, 8, dtype=torch.float64) for n in (5, 4, 4))
    if not original.batch_first:
        q, kv, v = (t.transpose(0, 1) for t in (q, kv, v))
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, True, False, False]])
    square = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    calls = [
        ((q, q, q), {}),
        ((q, q, q), {"need_weights": False, "attn_mask": square, "is_causal": True}),
        ((q, q, q), {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64), "average_attn_weights": False}),
        ((q, kv, kv), {"key_padding_mask": padding}),
        ((q, kv, v), {"need_weights": False, "key_padding_mask": padding, "attn_mask": torch.randn(5, 4).double()}),
        ((kv, kv, v), {}),
        ((q, kv, q[:4] if not original.batch_first else q[:, :4]), {}),
        ((q[0], kv[0], v[0]), {"need_weights": False}),
        ((q[0], q[0], q[0]), {}),
    ]
    for task, plain in (("base", original), ("cubs", model.merge("cubs"))):
        assert type(plain) is nn.MultiheadAttention
        for args, kwargs in calls:
            got, want = model(*args, **kwargs, tasks=task), plain(*args, **kwargs)
            torch.testing.assert_close(got[0], want[0])
            assert (got[1] is None) == (want[1] is None)
            if want[1] is not None:
                torch.testing.assert_close(got[1], want[1])
    assert not torch.equal(model(q, q, q, tasks="cubs")[0], original(q, q, q)[0])
    with pytest.raises(RuntimeError, match="is_causal must go with an attn_mask"):
        model(q, q, q, is_causal=True, tasks="cubs")


def test_attention_in_a_mixed_batch_by_hand():
    model, conversion = adapt(nn.MultiheadAttention(8, 2))
    layer = conversion.layers["in_proj"]
    x = torch.randn(5, 3, 8, dtype=torch.float64)  # [L, B, E]
    mixed, _ = model(x, x, x, tasks=["cars", "base", "cubs"])
    for i, task in enumerate(["cars", None, "cubs"]):
        plain = nn.MultiheadAttention(8, 2, dtype=torch.float64)
        for target, source in ((plain, layer), (plain.out_proj, conversion.layers["out_proj"])):
            weight, bias = source.base.clone(), source.base_bias.clone()
            if task is not None and source.scores[task] >= 0.1:
                weight, bias = weight + source.deltas[task], bias + source.bias_deltas[task]
            name = "in_proj_" if target is plain else ""
            setattr(target, f"{name}weight", nn.Parameter(weight))
            setattr(target, f"{name}bias", nn.Parameter(bias))
        torch.testing.assert_close(mixed[:, i : i + 1], plain(*[x[:, i : i + 1]] * 3)[0])


def test_attention_trains_with_dropout_as_the_original():
    model, _ = adapt(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).train())
    model.conversion.layers["in_proj"].scores["cubs"].data.fill_(0.2)
    plain = model.merge("cubs").train()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    for need_weights in (True, False):
        torch.manual_seed(5)
        want = plain(x, x, x, need_weights=need_weights)[0]
        torch.manual_seed(5)
        got = model(x, x, x, need_weights=need_weights, tasks="cubs")[0]
        assert need_weights or torch.isfinite(got).all()
        if need_weights:
            torch.testing.assert_close(got, want)
    got.sum().backward()
    assert model.conversion.layers["in_proj"].deltas["cubs"].grad.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
def test_attention_over_no_samples(training):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, mask=None):
            return self.attend(x, x, x, attn_mask=mask)[0]

    model = TapsModel(Net(), ["a"]).train(training)
    x = torch.randn(0, 5, 8)
    for mask in (None, torch.zeros(0, 5, 5)):
        assert model(x, mask, tasks="a").shape == model(x, mask, tasks=[]).shape == x.shape
