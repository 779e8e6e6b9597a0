"""FastTapsLinear and FastTapsConv2d: what they compute, what trains, and that they stand in for torch's own."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from taps_fast import FastTapsConv2d, FastTapsLinear, TaskBatch
from taps_fast.formats import SignBits
from taps_fast.nn import gates
from taps_fast.testing import assert_no_worse_than_torch

IDS = [1, -1, 0, 1, 1]
CONVS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 1, "groups": 4},
]


def randomise(layer):
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if "scores" not in name:
                value.copy_(torch.randn_like(value))
    return layer


def linear(**options):
    torch.manual_seed(0)
    return randomise(FastTapsLinear(5, 4, dtype=torch.float64, tasks=["cubs", "cars"], **options))


def conv(kwargs):
    torch.manual_seed(0)
    return randomise(FastTapsConv2d(4, 8, **kwargs, dtype=torch.float64, tasks=["cubs", "cars"]))


def by_hand(layer, task):
    """The ordinary layer with base + gate·delta for its parameters, written out."""
    is_open = task is not None and layer.scores[task] >= layer.threshold
    weight = layer.base + layer.deltas[task] if is_open else layer.base
    bias = layer.base_bias
    if bias is not None and is_open:
        bias = bias + layer.bias_deltas[task]
    if isinstance(layer, FastTapsLinear):
        return lambda x: F.linear(x, weight, bias)
    plain = nn.Conv2d(4, 8, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, device="meta")
    plain.__dict__.update({k: v for k, v in layer.__dict__.items() if k in ("padding", "padding_mode")})
    plain._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
    return lambda x: plain._conv_forward(x, weight, bias)


@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_conv_is_conv2d_with_the_effective_weight(kwargs):
    layer, x = conv(kwargs), torch.randn(5, 4, 7, 6, dtype=torch.float64)
    layer.scores["cars"].data.fill_(0.01)
    ordinary = nn.Conv2d(4, 8, **kwargs, dtype=torch.float64)
    ordinary.load_state_dict({"weight": layer.base} | ({} if layer.base_bias is None else {"bias": layer.base_bias}))
    torch.testing.assert_close(layer(x, tasks="base"), ordinary(x))
    torch.testing.assert_close(layer(x[0], tasks="base"), ordinary(x[0]))  # unbatched
    for task in ("cubs", "cars"):
        torch.testing.assert_close(layer(x, tasks=task), by_hand(layer, task)(x))
    mixed = layer(x, tasks=IDS)
    for i, t in enumerate(IDS):
        torch.testing.assert_close(mixed[i], by_hand(layer, [None, "cubs", "cars"][t + 1])(x[i : i + 1])[0])
    torch.testing.assert_close(layer.merged("cubs")(x), layer(x, tasks="cubs"))


@pytest.mark.parametrize("score", [0.15, 0.05])
@pytest.mark.parametrize("gate", gates.GATES)
def test_gradients_are_those_of_the_formula(gate, score):
    layer, x = linear(gate=gate), torch.randn(6, 5, dtype=torch.float64)
    layer.scores["cubs"].data.fill_(score)
    (layer(x, tasks="cubs") ** 2).sum().backward()
    s = torch.tensor(score, dtype=torch.float32).double().requires_grad_()
    delta = layer.deltas["cubs"].detach().requires_grad_()
    bias_delta = layer.bias_deltas["cubs"].detach().requires_grad_()
    coefficient = s if gate == "raw" else s + float(score >= 0.1) - s.detach()
    y = F.linear(x, layer.base + coefficient * delta, layer.base_bias + coefficient * bias_delta)
    (y**2).sum().backward()
    torch.testing.assert_close(layer.scores["cubs"].grad, s.grad.float())
    torch.testing.assert_close(layer.deltas["cubs"].grad, delta.grad)
    torch.testing.assert_close(layer.bias_deltas["cubs"].grad, bias_delta.grad)
    assert s.grad != 0 and layer.base.grad is None and layer.scores["cars"].grad is None
    assert (gate == "ste" and score < 0.1) == bool((layer.deltas["cubs"].grad == 0).all())


def test_mixed_gradients_are_the_sums_of_separate_ones():
    layer, x = linear(), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    layer.scores["cars"].data.fill_(0.02)
    (layer(x, tasks=IDS) ** 2).sum().backward()
    mixed = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    for task, t in (("base", -1), ("cubs", 0), ("cars", 1)):
        rows = [i for i, id in enumerate(IDS) if id == t]
        (layer(x[rows], tasks=task) ** 2).sum().backward()
    for name, value in mixed.items():
        torch.testing.assert_close(value, x.grad if name == "x" else layer.get_parameter(name).grad)


def test_the_comparison_is_greater_or_equal_in_every_dtype():
    for dtype, threshold in itertools.product((torch.float32, torch.float64), (0.1, 0.3, 0.7)):
        layer = FastTapsLinear(2, 2, dtype=dtype, tasks=["cubs"], threshold=threshold, initial_score=threshold)
        layer.deltas["cubs"].data.fill_(1.0)
        assert layer.is_open("cubs") and not torch.equal(layer.weight, layer.base)


def test_ways_to_say_tasks_agree():
    layer, x = linear(), torch.randn(5, 5, dtype=torch.float64)
    want = layer(x, tasks=IDS)
    for ids in ([1, -1, 1, 1, 1], [-1] * 5):  # with and without the tasks that have no rows
        torch.testing.assert_close(layer(x, tasks=TaskBatch.from_ids(ids, 2)), layer(x, tasks=ids))
    names = ["cars", None, "cubs", "cars", "cars"]
    for tasks in (
        torch.tensor(IDS, dtype=torch.int32),
        TaskBatch.from_ids(IDS, 2),
        names,
        [name or "base" for name in names],
    ):
        assert torch.equal(layer(x, tasks=tasks), want)
    rows = x.repeat_interleave(3, 0)
    torch.testing.assert_close(layer(rows, tasks=IDS)[::3], want)  # ids follow rows; more of them sum in another order
    square = x[None].expand(5, -1, -1)
    for axis in (1, -2):
        torch.testing.assert_close(layer(square, tasks=IDS, batch_dim=axis)[1], want)
    with pytest.raises(ValueError, match=r"batch_dim must be one of the 2 axes of x before its features, got -1 \(x"):
        layer(square, tasks=IDS, batch_dim=-1)
    for ids in (IDS, [0] * 5):
        with pytest.raises(ValueError, match=r"batch_dim must be an axis of its input, got 3 \(\(5, 5, 5\)\)"):
            layer(square, tasks=ids, batch_dim=3)


def test_default_task():
    x = torch.randn(3, 5, dtype=torch.float64)
    layer = linear()
    with pytest.raises(
        ValueError, match=r"tasks must be said where there are several, got None \(tasks: cubs, cars; pass .*sample\)"
    ):
        layer(x)
    layer.remove_task("cars")
    assert torch.equal(layer(x), layer(x, tasks="cubs"))
    with pytest.raises(ValueError, match="FastTapsLinear: task must be one of its tasks, got 'cars'"):
        layer(x, tasks=["cubs", "cars", "cubs"])
    layer.add_tasks(["cars"])
    assert not layer.deltas["cars"].any()
    assert torch.equal(FastTapsLinear.from_linear(layer.merged(None))(x), layer(x, tasks="base"))


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ("cub", r"task must be one of its tasks, got 'cub' \(did you mean 'cubs'\? known: cubs, cars\)"),
        (["cubs", "birds", "cubs"], r"got 'birds' \(known: cubs, cars\)"),
        ([0, 1, 2], r"tasks must be ids in \[-1, 2\), -1 being the base, got 2"),
        ([0, 1], r"rows % ids == 0, got 2 ids and 3 rows along axis 0"),
        (TaskBatch.from_ids([0, 0, 0], 1), r"TaskBatch of 2 tasks, got one of 1"),
    ],
)
def test_wrong_tasks(tasks, text):
    with pytest.raises(ValueError, match=text):
        linear()(torch.randn(3, 5, dtype=torch.float64), tasks=tasks)


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        (0, "tasks must be a name, or a name or id for each sample, got 0"),
        ([0.9, 1.7, 0.0], "tasks must be a name or id for each sample, got 0.9 for a sample"),
        ([1, True, 0], "got True for a sample"),
        ([[0], [1], [0]], r"got \[0\] for a sample"),
    ],
)
def test_tasks_of_another_type(tasks, text):
    with pytest.raises(TypeError, match=text):
        linear()(torch.randn(3, 5, dtype=torch.float64), tasks=tasks)


@pytest.mark.parametrize("name", ["", "a.b", "base", "keys", "train", "forward", "values", "training"])
def test_names_that_cannot_be_parameters(name):
    with pytest.raises(ValueError, match="task must be a name"):
        FastTapsLinear(2, 2, tasks=[name])


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="task must be a name, got 3"):
        FastTapsLinear(2, 2, tasks=[3])
    with pytest.raises(ValueError, match="task must be new, got 'a'"):
        FastTapsLinear(2, 2, tasks=["a", "a"])
    with pytest.raises(ValueError, match="gate must be one of ste, raw, got 'soft'"):
        FastTapsConv2d(2, 2, 1, gate="soft")
    with pytest.raises(ValueError, match="FastTapsLinear: delta_linear: x must be"):
        FastTapsLinear(3, 2)(torch.randn(2, 4))
    with pytest.raises(TypeError, match="FastTapsConv2d: delta_conv2d: base must be"):
        FastTapsConv2d(3, 2, 1)(torch.randn(2, 3, 4, 4).double())


def test_weight_and_bias_are_effective_and_differentiable():
    layer, x = linear(), torch.randn(3, 5, dtype=torch.float64)
    layer.context.default = "cubs"
    assert torch.equal(layer.weight, layer.base + layer.deltas["cubs"])
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.sum().backward()
    assert bool((layer.deltas["cubs"].grad == 1).all())
    layer.context.enter(layer.context.resolve([0, 1, 1]))
    for name, base in (("weight", layer.base), ("bias", layer.base_bias)):
        stand_in = getattr(layer, name)
        assert (stand_in.shape, stand_in.dtype, stand_in.device) == (base.shape, base.dtype, base.device)
        assert x.float().to(stand_in).dtype == base.dtype and repr(stand_in).startswith("MixedWeight(")
        for use in (
            lambda w: w + 1,
            torch.sum,
            torch.Tensor.detach,
            lambda w: w.data,
            lambda w: F.linear(x, w),
            copy.deepcopy,
        ):
            with pytest.raises(RuntimeError, match=f"{name} must be used with one task active, got a mixed batch"):
                use(stand_in)


def test_a_task_without_a_delta_is_the_base_and_can_get_one():
    layer, x = linear(), torch.randn(5, 5, dtype=torch.float64)
    del layer.deltas["cars"], layer.bias_deltas["cars"]
    assert not layer.is_open("cars")
    assert torch.equal(layer(x, tasks="cars"), layer(x, tasks="base"))
    cubs, base = layer(x, tasks="cubs"), layer(x, tasks="base")
    mixed = layer(x, tasks=IDS)
    torch.testing.assert_close(mixed[2], cubs[2])
    torch.testing.assert_close(mixed[[0, 1, 3, 4]], base[[0, 1, 3, 4]])
    layer.add_task("cars")
    assert layer.is_open("cars") and bool((layer.deltas["cars"] == 0).all())


@pytest.mark.parametrize("make", [lambda delta: delta, SignBits.from_dense], ids=["dense", "bits"])
def test_a_delta_that_is_set_is_a_copy(make):
    layer = linear()
    layer.set_delta("cars", make(layer.delta("cars")))
    layer.set_delta("cubs", layer.delta("cars"))
    held = {name: value.data_ptr() for name, value in layer.deltas.state_dict().items()}
    assert len(set(held.values())) == len(held)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_state_dicts(kind):
    new = (lambda: linear()) if kind == "linear" else (lambda: conv({"kernel_size": 3}))
    layer = new()
    other = randomise(new())
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    ordinary = nn.Linear(5, 4) if kind == "linear" else nn.Conv2d(4, 8, 3)
    deltas = layer.deltas["cubs"].clone()
    state = ordinary.state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer.base.float(), ordinary.weight) and torch.equal(layer.base_bias.float(), ordinary.bias)
    assert torch.equal(layer.deltas["cubs"], deltas) and list(state) == ["weight", "bias"]
    with pytest.raises(RuntimeError, match="size mismatch for base"):
        layer.load_state_dict({"weight": torch.zeros(1, 1), "bias": ordinary.bias})
    with pytest.raises(RuntimeError, match='Missing key.* "base_bias". $'):
        layer.load_state_dict({"weight": ordinary.weight})
    layer.set_delta("cubs", SignBits.from_dense(deltas))
    layer.load_state_dict(state)


def test_only_the_tasks_train():
    trains = {name for name, p in linear().named_parameters() if p.requires_grad}
    assert trains == {f"{kind}.{task}" for kind in ("deltas", "bias_deltas", "scores") for task in ("cubs", "cars")}


def test_from_an_ordinary_layer_shares_its_storage():
    ordinary = nn.Conv2d(3, 4, 3, padding_mode="circular", padding=1).eval()
    layer = FastTapsConv2d.from_conv2d(ordinary, ["cubs"], initial_score=0.5)
    assert layer.base.data_ptr() == ordinary.weight.data_ptr() and ordinary.weight.requires_grad and not layer.training
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), ordinary(x))
    back = layer.merged("cubs")
    assert type(back) is nn.Conv2d and back.weight.data_ptr() != ordinary.weight.data_ptr()
    torch.testing.assert_close(back(x), ordinary(x))


def test_copies_and_dtypes():
    layer = linear()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(5, 5, dtype=torch.float64)
        assert torch.equal(twin(x, tasks=IDS), layer(x, tasks=IDS))
        twin.deltas["cubs"].data.zero_()
        assert not torch.equal(twin(x, tasks=IDS), layer(x, tasks=IDS))
    layer.scores["cubs"].data.fill_(0.1)  # in float16 this is below the threshold
    half = copy.deepcopy(layer).half()
    assert half.base.dtype == half.deltas["cubs"].dtype == torch.float16 and half.scores["cubs"].dtype == torch.float32
    assert half(torch.randn(5, 5).half(), tasks=IDS).dtype == torch.float16 and half.is_open("cubs")


@pytest.mark.parametrize("tasks", ["cubs", IDS], ids=["single", "mixed"])
def test_autocast_casts_as_the_ordinary_layer(tasks):
    layer, x = linear(), torch.randn(5, 5, dtype=torch.float64)
    exact = layer(x, tasks=tasks)
    layer = layer.float()
    names = ["cubs"] * 5 if tasks == "cubs" else ["cars", None, "cubs", "cars", "cars"]
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.stack([layer.merged(name)(row) for name, row in zip(names, x.float(), strict=True)])
        y = layer(x.float(), tasks=tasks)
        y.float().sum().backward()
    assert_no_worse_than_torch(y, exact, low)
    assert layer.deltas["cubs"].grad.dtype == torch.float32


def test_a_batch_without_samples():
    layer = linear()
    assert layer(torch.empty(0, 5, dtype=torch.float64), tasks=[]).shape == (0, 4)
    assert layer(torch.empty(0, 5, dtype=torch.float64), tasks="cubs").shape == (0, 4)


def test_a_layer_alone_can_be_checkpointed():
    layer, x = linear(), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    for tasks in ({"tasks": IDS}, {"tasks": "cubs"}, {}):
        if not tasks:
            layer.remove_task("cars")  # one is left, which is the default
        y = checkpoint(layer, x, use_reentrant=False, **tasks)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(layer(x, **tasks).sum(), x))


def test_threads_do_not_see_each_others_task():
    layer, barrier = linear(), Barrier(2)

    def active(task):
        layer.context.enter(layer.context.resolve(task))
        barrier.wait()
        return layer.selected().task

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(active, ["cubs", "cars"])) == ["cubs", "cars"]
    assert layer.context.active is None


def test_penalty_and_gate():
    scores = [torch.tensor(0.2, requires_grad=True), torch.tensor(-0.4, requires_grad=True)]
    loss = gates.penalty(scores, 0.5)
    torch.testing.assert_close(loss, torch.tensor(0.5 / 2 * 0.6))
    loss.backward()
    assert [s.grad.item() for s in scores] == [0.25, -0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ids", ["a", "b", "base", ["b", "a", "base", "c", "b"], ["b", "c", "b", "base", "c"]], ids=str)
def test_without_gradients_gates_are_read_to_the_same_result(dtype, ids):
    """A score at the threshold opens its gate in float32's terms, in every dtype; just below it stays closed."""
    torch.manual_seed(0)
    layer = randomise(FastTapsLinear(9, 6, dtype=dtype, tasks=["a", "b", "c"], threshold=0.3))
    with torch.no_grad():
        layer.scores["a"].copy_(torch.tensor(0.3))
        layer.scores["b"].copy_(torch.tensor(0.3).nextafter(torch.tensor(0.0)))
        layer.scores["c"].fill_(0.1)
    x = torch.randn(5, 9).to(dtype)
    trained = layer(x, tasks=ids).detach()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, tasks=ids), trained)
    opened = [layer.is_open(task) for task in "abc"]
    assert opened == [True, False, False]
    assert ("a" in ([ids] if isinstance(ids, str) else ids)) == (
        not torch.equal(trained, layer(x, tasks="base").detach())
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize(
    "layer", [FastTapsLinear(4, 2, tasks=["cubs", "cars"]), FastTapsConv2d(4, 2, 1, tasks=["cubs", "cars"])]
)
def test_ids_are_counted_whatever_they_are(layer, score, grad):
    x = torch.randn(2, 4) if isinstance(layer, FastTapsLinear) else torch.randn(2, 4, 1, 1)
    for own in layer.scores.values():
        own.data.fill_(score)
    for ids in ([], [0, 0, 0], [-1, -1, -1], [0, 1, 0]):
        for tasks in (ids, TaskBatch.from_ids(ids, 2)):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"got {len(ids)} ids and 2 rows"):
                layer(x, tasks=tasks)
