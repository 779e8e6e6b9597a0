"""Models with compressed tasks: they run, train, move, save, load, merge and are counted like others."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import ConvNet, Transformer, assert_rows_as_separate, images, perturb, three_tasks
from torch import nn

from taps_fast import FastTapsLinear, TapsModel, store
from taps_fast.formats import FORMATS, Format, MaskBits, SignBits

WAYS = {"bits": {}, "int8": {}, "lowrank": {"rank": 2}}


def compressed(net, ways=("bits", "int8", "lowrank")):
    """A model whose tasks have a format each."""
    torch.manual_seed(0)
    model = three_tasks(net())
    for task, way in zip(model.tasks, ways, strict=False):
        model.compress(task, way, **WAYS[way])
    return model


@pytest.mark.parametrize("net", [ConvNet, Transformer])
def test_mixed_batches_and_merged_models(net):
    model = compressed(net)
    x = images(7)
    mixed = assert_rows_as_separate(model, x, ["cubs", "dogs", None, "cars", "cubs", "dogs", "cars"])
    assert not torch.equal(mixed, three_tasks(net())(x, tasks=[0, 2, -1, 1, 0, 2, 1]))
    assert not any("taps_fast" in type(m).__module__ for m in model.merge("cubs").modules())


@pytest.mark.parametrize("way", WAYS)
def test_report_is_measured(way):
    torch.manual_seed(0)
    model = three_tasks(Transformer(32))
    dense = {path: layer.delta("cubs").detach().clone() for path, layer in model.conversion.layers.items()}
    x = images(4)
    before, added = model(x, tasks="cubs").detach(), model.sharing().added_bytes("cubs")
    report = model.compress("cubs", way, inputs=x, **WAYS[way])
    after = model(x, tasks="cubs").detach()
    assert report.output_change == pytest.approx(float((after - before).norm() / before.norm()))
    assert report.layers and {record.path for record in report.layers} | set(report.kept) == {
        path for path, layer in model.conversion.layers.items() if layer.is_open("cubs")
    }
    for record in report.layers:
        delta = dense[record.path]
        small = model.conversion.layers[record.path].delta("cubs")
        assert isinstance(small, Format) and small.name == way
        error = float((small.dense().detach() - delta).norm() / delta.norm())
        assert record.error == pytest.approx(error) and 0 < record.error < 1
        assert record.bytes_before == delta.nbytes and record.bytes_after == small.bytes < delta.nbytes
    saved = report.bytes_before - report.bytes_after
    assert model.sharing().added_bytes("cubs") == added - saved
    assert f"cubs as {way}: {len(report.layers)} layers" in str(report) and "output changed by" in str(report)


@pytest.mark.parametrize("way", WAYS)
def test_trains_on(way):
    model = compressed(ConvNet, (way,))
    groups = model.task_parameters("cubs")
    trained = {id(p) for p in groups[0]["params"]}
    optimizer = torch.optim.SGD(groups, lr=0.05)
    x, target = images(6), torch.randn(6, 3, dtype=torch.float64)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append((model(x, tasks="cubs") - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for layer in model.conversion.layers.values():
        if isinstance(layer.delta("cubs"), Format) and layer.is_open("cubs"):
            own = layer.deltas["cubs"]
            for name in own.kind.trained:
                assert id(getattr(own, name)) in trained and getattr(own, name).grad.abs().sum() > 0
            assert layer.scores["cubs"].grad is not None


@pytest.mark.parametrize("net", [ConvNet, Transformer])
def test_folders(net, tmp_path):
    model = compressed(net)
    other = TapsModel(net_of(net), head="fc")
    for task in model.tasks:
        model.save_task(task, tmp_path / task)
        other.load_task(tmp_path / task)
    x = images(5)
    rows = ["cars", "dogs", "cubs", None, "cars"]
    torch.testing.assert_close(other(x, tasks=rows), model(x, tasks=rows))
    tensors, meta = store.read_task(tmp_path / "cubs")
    assert set(meta["formats"].values()) == {"bits"} and any(name.endswith(".delta.codes") for name in tensors)
    assert other.sharing() == model.sharing()


def net_of(net):
    torch.manual_seed(0)
    return net().double().eval()


def test_folders_that_do_not_fit(tmp_path):
    model = compressed(ConvNet, ("bits",))
    model.save_task("cubs", tmp_path)
    tensors, meta = store.read_task(tmp_path)
    meta = {key: value for key, value in meta.items() if key not in ("format", "library", "tensors", "checksum")}
    path = next(iter(meta["formats"]))
    fresh = TapsModel(net_of(ConvNet), head="fc")
    bad = [
        (
            {**meta, "formats": {path: "ternary"}},
            tensors,
            f"format of '{path}' must be one of bits, mask, int8, lowrank",
        ),
        (
            meta,
            {k: v for k, v in tensors.items() if k != f"{path}.delta.scale"},
            f"delta of '{path}' must be a whole bits",
        ),
        (meta, {**tensors, f"{path}.delta.codes": tensors[f"{path}.delta.codes"][:, :0]}, "SignBits: codes must be"),
        ({**meta, "formats": {}}, tensors, "must hold this model's tensors, got"),
    ]
    for number, (document, held, text) in enumerate(bad):
        store.save_task(tmp_path / str(number), held, document)
        with pytest.raises(store.TaskFolderError, match=text):
            fresh.load_task(tmp_path / str(number))
    assert fresh.tasks == []


def test_state_dict_copy_and_dtype():
    model = compressed(Transformer)
    twin = copy.deepcopy(model)
    x = images(3)
    assert torch.equal(twin(x, tasks="cubs"), model(x, tasks="cubs"))
    with torch.no_grad():
        for layer in twin.conversion.layers.values():
            for parameter in layer.deltas.parameters():
                parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x, tasks=[0, 1, 2]), model(x, tasks=[0, 1, 2]))
    low = copy.deepcopy(model).to(torch.bfloat16)
    delta = low.conversion.layers["block.fc1"].delta("cubs")
    assert delta.scale.dtype == torch.float64 and low(x.bfloat16(), tasks="cubs").dtype == torch.bfloat16
    wide = model(x, tasks="cubs")
    assert (low(x.bfloat16(), tasks="cubs").double() - wide).norm() < 0.1 * wide.norm()


def test_tasks_share_one_tile():
    """One tensor for all tasks, also after the model has moved; only the bits are a task's own."""
    tasks = ["cubs", "cars", "dogs"]
    layer = FastTapsLinear(70, 20, tasks=tasks)
    tile = torch.randn(20, 70)
    masks = torch.rand(3, 20, 70) < 0.5
    for task, mask in zip(tasks, masks, strict=True):
        layer.set_delta(task, MaskBits.from_mask(mask, tile))
    layer = layer.to(torch.bfloat16).to(torch.float32)
    held = {layer.delta(task).tile.data_ptr() for task in tasks}
    assert len(held) == 1
    x = torch.randn(6, 70)
    y = layer(x, tasks=["cubs", "cars", "dogs", "base", "cars", "cubs"])
    for row, n in zip(range(6), (0, 1, 2, None, 1, 0), strict=True):
        delta = 0 if n is None else layer.delta(tasks[n]).tile * masks[n]
        torch.testing.assert_close(y[row], nn.functional.linear(x[row], layer.base + delta, layer.base_bias))


def test_refusals():
    model = compressed(ConvNet, ("bits",))
    with pytest.raises(ValueError, match="the delta of 'conv2' must be dense, got one in 'bits' already"):
        model.compress("cubs", "int8")
    with pytest.raises(ValueError, match="TapsModel: task must be one of its tasks, got 'birds'"):
        model.compress("birds", "int8")
    for options, text in (
        ({"format": "int4"}, "^TapsModel.compress: format must be bits, int8 or lowrank, got 'int4'"),
        (
            {"format": "lowrank"},
            "^TapsModel.compress: rank must be given for lowrank and for nothing else, got None for 'lowrank'",
        ),
        ({"format": "bits", "rank": 2}, "rank must be given for lowrank and for nothing else, got 2 for 'bits'"),
        ({"format": "lowrank", "rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"format": "lowrank", "rank": 2.5}, "rank must be a whole number of at least 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=text):
            model.compress("dogs", **options)
    layer = model.conversion.layers["conv3"]
    with torch.no_grad():
        layer.deltas["dogs"][1, 0, 2, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"TapsModel.compress: layer 'conv3': Int8: delta must be finite, got nan at \(1, 20\)|finite"
    ):
        model.compress("dogs", "int8")
    assert not any(isinstance(layer.delta("dogs"), Format) for layer in model.conversion.layers.values())
    with pytest.raises(ValueError, match=r"conv3: delta must be \(6, 8, 3, 3\) like base, got \(2, 2\)"):
        layer.set_delta("dogs", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="conv3: task must be one with a delta, got 'birds'"):
        layer.set_delta("birds", layer.base)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: SignBits((2, 3), torch.zeros(2, 8), torch.ones(())), TypeError, "SignBits: codes must be torch.uint8"),
        (
            lambda: SignBits((2, 3), torch.zeros(2, 1, dtype=torch.uint8), torch.ones(())),
            ValueError,
            r"SignBits: codes must be \(2, 8\), got \(2, 1\) \(shape \(2, 3\)\)",
        ),
        (
            lambda: FORMATS["int8"]((2, 3), torch.zeros(2, 3, dtype=torch.int8), torch.ones(3)),
            ValueError,
            r"Int8: scale must be \(\) or \(2,\), got \(3,\)",
        ),
        (
            lambda: FORMATS["int8"]((2, 3), torch.zeros(2, 3), torch.ones(2)),
            TypeError,
            "Int8: codes must be torch.int8",
        ),
        (
            lambda: FORMATS["lowrank"].of(torch.zeros(2, 1), torch.zeros(2, 3)),
            ValueError,
            r"LowRank: a must be \(1, 3\), got \(2, 3\)",
        ),
        (
            lambda: FORMATS["lowrank"].of(torch.zeros(2, 1), torch.zeros(1, 3).double()),
            TypeError,
            "LowRank: a must be torch.float32 like b, got torch.float64",
        ),
        (
            lambda: MaskBits.from_mask(torch.ones(2, 3), torch.ones(2, 3)),
            ValueError,
            r"MaskBits: mask must be bool \(2, 3\) like tile, got torch.float32 \(2, 3\)",
        ),
        (
            lambda: MaskBits.from_mask(torch.ones(2, 3).bool(), torch.ones(2, 3)).__class__(
                (2, 3), torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 3).requires_grad_(), torch.ones(())
            ),
            ValueError,
            "MaskBits: tile must not require a gradient",
        ),
        (lambda: SignBits.from_dense(torch.ones(3)), ValueError, "SignBits: delta must be a floating-point tensor"),
    ],
)
def test_fields_that_do_not_fit(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_the_change_of_outputs_that_are_no_one_tensor():
    class Net(nn.Module):
        def __init__(self, several):
            super().__init__()
            self.one, self.other, self.several = nn.Linear(64, 64), nn.Linear(64, 64), several

        def forward(self, x):
            y, z = self.one(x), self.other(x)
            return {"y": y, "more": (z, 3)} if self.several else torch.cat([y, z], 1) if self.several is False else "y"

    changes = []
    for several in (True, False):
        torch.manual_seed(0)
        model = perturb(TapsModel(Net(several), ["a"]))
        changes.append(model.compress("a", "bits", inputs=torch.randn(3, 64)).output_change)
    assert changes[0] == pytest.approx(changes[1]) and changes[0] > 0
    with pytest.raises(ValueError, match="an output with tensors, got str"):
        TapsModel(Net(None), ["a"]).compress("a", "bits", inputs=torch.randn(3, 64))
