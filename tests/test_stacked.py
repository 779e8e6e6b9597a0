"""Many compressed deltas as one argument, and what a prepared model makes of them."""

import copy
import functools

import pytest
import torch
from torch import nn

from taps_fast import TapsModel, TaskBatch, delta_conv2d, delta_linear
from taps_fast.formats import Int8, LowRank, MaskBits, SignBits, compress
from taps_fast.stacked import Stack
from taps_fast.testing import assert_no_worse_than_torch

KINDS = ("bits", "rows of bits", "mask", "int8", "lowrank")
IDS = [2, 0, -1, 2, 3, 0, 0, 4]


def draw(kind, shape, dtype, count=5):
    g = torch.Generator().manual_seed(4)
    deltas = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]
    scale = torch.rand(count, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if kind == "mask":
        return [MaskBits.from_mask(d > 0, deltas[0], s) for d, s in zip(deltas, scale, strict=True)]
    if kind == "rows of bits":
        return [
            SignBits(shape, d.codes, d.scale * torch.arange(shape[0])) for d in (compress(d, "bits") for d in deltas)
        ]
    return [compress(d, kind, rank=2 if kind == "lowrank" else None) for d in deltas]


def assert_equal(a, b):
    assert torch.equal(a, b)


@pytest.mark.parametrize("mix", ["one", "all", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_the_list_of_its_parts(kind, dtype, mix):
    torch.manual_seed(0)
    deltas = draw(kind, (9, 70), dtype)
    coeffs = torch.rand(5) if mix == "one" else torch.rand(5, 5) if mix == "all" else torch.rand(5).diag()
    how = {} if mix == "one" else {"tasks": torch.tensor(IDS)}
    x, base = torch.randn(16, 70).to(dtype), torch.randn(9, 70).to(dtype)
    stack = Stack(deltas)
    assert len(stack) == 5 and all(torch.equal(a.dense(), b.dense()) for a, b in zip(stack, deltas, strict=True))
    # Low rank is rounded elsewhere than in a list; the test below has its precision.
    loose = functools.partial(torch.testing.assert_close, rtol=2e-2, atol=0.5)
    same = loose if kind == "lowrank" else assert_equal
    for algorithm in ("auto", "split", "blend"):
        same(*(delta_linear(x, base, given, coeffs, algorithm=algorithm, **how) for given in (stack, deltas)))
    with torch.autocast("cpu", torch.bfloat16):
        same(*(delta_linear(x, base, given, coeffs, **how) for given in (stack, deltas)))

    x.requires_grad_()
    leaves = [t.requires_grad_() for delta in deltas for name, t in delta.tensors.items() if name in delta.trained]
    found = []
    for given in (Stack(deltas), deltas):
        y = delta_linear(x, base, given, coeffs, **how)
        found.append(torch.autograd.grad(y.sum(), [x, *leaves], allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_images():
    deltas = [compress(torch.randn(8, 4, 3, 3), "bits") for _ in range(3)]
    x, base, coeffs = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3), torch.rand(3)
    assert torch.equal(*(delta_conv2d(x, base, given, coeffs) for given in (Stack(deltas), deltas)))


@pytest.mark.parametrize(
    "deltas",
    [
        [],
        [compress(torch.randn(4, 6), "bits"), compress(torch.randn(4, 6), "int8")],
        [compress(torch.randn(4, 6), "bits"), compress(torch.randn(4, 7), "bits")],
        [compress(torch.randn(4, 6), "bits"), compress(torch.randn(4, 6).double(), "bits")],
        [compress(torch.randn(4, 6), "lowrank", rank=1), compress(torch.randn(4, 6), "lowrank", rank=2)],
        [MaskBits.from_mask(torch.rand(4, 6) > 0, torch.randn(4, 6)) for _ in range(2)],
    ],
    ids=["none", "kind", "shape", "dtype", "rank", "tile"],
)
def test_refusals(deltas):
    with pytest.raises(ValueError, match="Stack: deltas must be (at least one, got none|alike, got .* at 1 )"):
        Stack(deltas)


def adapted(ways):
    """A model with a task a way of compression, whose deltas and scores are set."""
    torch.manual_seed(0)
    names = [f"task{n}" for n in range(len(ways))]
    model = TapsModel(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)), names).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "deltas" in name:
                parameter.normal_(0, 0.05)
    for name, way in zip(names, ways, strict=True):
        if way is not None:
            model.compress(name, way, rank=2 if way == "lowrank" else None)
    return model


@pytest.mark.parametrize(
    "ways", [["bits"] * 3, ["int8"] * 3, ["lowrank"] * 2, ["bits", "int8"], ["bits", None], ["bits"]]
)
def test_prepared_models_hold_alike_deltas_side_by_side_and_no_byte_twice(ways):
    model = adapted(ways)
    x, ids = torch.randn(7, 64), [f"task{n % len(ways)}" for n in range(6)] + ["base"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x, tasks=ids)
        model.prepare_inference(x)
        torch.testing.assert_close(model(x, tasks=ids), plain)
        torch.testing.assert_close(copy.deepcopy(model)(x, tasks=ids), plain)
        for n in range(len(ways)):
            rows = [row for row, task in enumerate(ids) if task == f"task{n}"]
            torch.testing.assert_close(model(x, tasks=f"task{n}")[rows], plain[rows])
    for layer in model.conversion.layers.values():
        held = list(layer.deltas.values())
        stacked = len(ways) > 1 and len(set(ways)) == 1
        assert isinstance(layer.frozen.mixed.deltas, Stack) == stacked
        if stacked:
            for name, whole in layer.frozen.mixed.deltas.tensors.items():
                assert {getattr(each, name).untyped_storage().data_ptr() for each in held} == {whole.data_ptr()}
                for single in layer.frozen.single.values():
                    assert all(getattr(d, name).untyped_storage().data_ptr() == whole.data_ptr() for d in single.deltas)
    model.unprepare()
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], value) for name, value in state.items())
    storages = [
        t.untyped_storage() for layer in model.conversion.layers.values() for t in layer.deltas.state_dict().values()
    ]
    assert len({s.data_ptr() for s in storages}) == len(storages)  # a removed task's go with it
    assert sum(s.nbytes() for s in storages) == sum(t.nbytes for name, t in after.items() if ".deltas." in name)


def test_masks_keep_the_tile_they_share():
    model = TapsModel(nn.Sequential(nn.Linear(70, 9)), ["a", "b"]).eval()
    layer, tile = model.conversion.layers["0"], torch.randn(9, 70)
    for task in ("a", "b"):
        layer.set_delta(task, MaskBits.from_mask(torch.rand(9, 70) < 0.5, tile))
    shared = layer.deltas["a"].tile
    x = torch.randn(4, 70)
    with torch.no_grad():
        plain = model(x, tasks=["a", "b", "b", "base"])
        model.prepare_inference()
        torch.testing.assert_close(model(x, tasks=["a", "b", "b", "base"]), plain)
    assert layer.frozen.mixed.deltas.tensors["tile"].data_ptr() == shared.data_ptr()
    model.unprepare()
    assert layer.deltas["a"].tile is shared and layer.deltas["b"].tile is shared


def test_deltas_made_under_inference_mode():
    model = adapted(["bits", "bits"])
    with torch.inference_mode():
        for layer in model.conversion.layers.values():
            for task in ("task0", "task1"):
                layer.set_delta(task, compress(torch.randn(layer.base.shape), "bits"))
        x = torch.randn(2, 64)
        plain = model(x, tasks=["task0", "task1"])
    model.prepare_inference(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x, tasks=["task0", "task1"]), plain)
    model.unprepare()
    with torch.no_grad():
        torch.testing.assert_close(model(x, tasks=["task0", "task1"]), plain)


def test_every_format_can_be_stacked():
    assert {type(draw(kind, (4, 6), torch.float32)[0]) for kind in KINDS} == {SignBits, MaskBits, Int8, LowRank}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 16])
def test_low_rank_side_by_side(dtype, rank):
    """No worse than PyTorch with each task's factors, whatever tasks use: nothing, one or several."""
    torch.manual_seed(0)
    deltas = [LowRank.of(torch.randn(33, rank).to(dtype), torch.randn(rank, 70).to(dtype), 0.5 + k) for k in range(4)]
    base, bias = torch.randn(33, 70).to(dtype), torch.randn(33).to(dtype)
    stack = Stack(deltas)
    mixes = {
        "own": (torch.eye(4), [0, 1, -1, 3, 0, 0]),
        "some": (torch.tensor([[0.0, 0, 0, 0], [1, 0.5, 0, 2], [0, 0, 1, 0]]), [0, 1, -1, 2, 1, 0]),
        "closed": (torch.zeros(2, 4), [0, 1, -1, 1, 1, 0]),
        "one": (torch.tensor([1.0, 0, 2, 0]), None),
        "nobody": (torch.eye(4), []),
    }
    for coeffs, ids in mixes.values():
        for tokens in ((), (5,), (40,)):
            rows = 6 if ids is None else len(ids)
            x = torch.randn(rows, *tokens, 70).to(dtype)
            y = delta_linear(x, base, stack, coeffs, bias, tasks=None if ids is None else torch.tensor(ids).long())

            def run(t, coeffs=coeffs, ids=ids, x=x):
                out = torch.nn.functional.linear(x.to(t), base.to(t), bias.to(t))
                for r in range(len(x)):
                    c = coeffs if ids is None else coeffs[ids[r]] if ids[r] >= 0 else torch.zeros(4)
                    for k, delta in enumerate(deltas):
                        if c[k]:
                            thin = x[r].to(t) @ delta.a.to(t).t()
                            out[r] += c[k].to(t) * delta.scale.to(t) * (thin @ delta.b.to(t).t())
                return out

            if dtype == torch.float64:
                torch.testing.assert_close(y, run(dtype))
            else:
                assert_no_worse_than_torch(y, run(torch.float64), run(dtype), name="low rank")


def test_low_rank_opcheck_and_errors():
    operator = torch.ops.taps_fast.linear_low_rank_
    y, x, a, b = torch.randn(3, 8), torch.randn(3, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 8)
    index = TaskBatch.from_ids([0, 1, -1], 2).tensors
    torch.library.opcheck(operator, (y, x, a, b, torch.ones(2), torch.eye(2), *index, 1))
    for arguments, text in (
        ((y, x, a, b[:1], torch.ones(2)), r"a \[K, r, I\] and b \[K, r, O\], of one type, got \[3, 16\], \[2, 3, 16\]"),
        ((y, x, a.double(), b, torch.ones(2)), "of one type"),
        ((y[:2], x, a, b, torch.ones(2)), r"y must be \[3, 8\] like x"),
        ((y, x, a, b.transpose(1, 2).contiguous().transpose(1, 2), torch.ones(2)), "b contiguous"),
        ((y, x, a, b, torch.ones(3)), "scale must have 2 elements"),
    ):
        with pytest.raises(RuntimeError, match=text):
            operator(*arguments, torch.eye(2), *index, 1)


def test_low_rank_leaves_rows_of_no_delta_alone():
    """Not even a zero is added to them; a task without rows, and 0 features, cost and break nothing."""
    operator = torch.ops.taps_fast.linear_low_rank_
    y, x = torch.full((4, 8), -0.0), torch.randn(4, 16)
    a, b, scale = torch.full((2, 3, 16), torch.nan), torch.randn(2, 3, 8), torch.ones(2)
    operator(
        y, x, a, b, scale, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), *TaskBatch.from_ids([0, -1, 0, 0], 2).tensors, 1
    )
    assert y.signbit().all() and not y.any()
    empty = Stack([LowRank.of(torch.empty(0, 1), torch.randn(1, 4))])
    y = delta_linear(torch.randn(3, 4), torch.empty(0, 4), empty, torch.ones(1), algorithm="split")
    assert y.shape == (3, 0)
