"""``python -m taps_fast train`` and its pieces: what it writes, that a killed run goes on bit for bit, its errors."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taps_fast import TapsModel, store
from taps_fast.__main__ import main
from taps_fast.train import GateLog, Point, accumulate, loop, penalty_weight, tradeoff
from taps_fast.train.backbone import backbone, head_of, logits_of
from taps_fast.train.data import Images, TrainError, batches, load
from taps_fast.train.loop import schedules

NET = """
import os, signal, types
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, 2)
        self.drop, self.classifier = nn.Dropout(0.2), nn.Linear(8, 10)
        self.left = int(os.environ.get("KILL_AFTER", "-1"))

    def forward(self, x):
        if self.training:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3))
        return types.SimpleNamespace(logits=self.classifier(self.drop(x)))

def nothing():
    return 3
"""


def coloured(count=24, classes=3, size=12):
    """uint8 images whose class is their brightest channel."""
    labels = torch.arange(count) % classes
    images = torch.randint(0, 90, (count, size, size, 3), generator=torch.Generator().manual_seed(0))
    images[torch.arange(count), :, :, labels] += 120
    return images.to(torch.uint8), labels


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a backbone and a data file, to work in."""
    (tmp_path / "tiny.py").write_text(NET)
    images, labels = coloured()
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny", None)


OPTIONS = ["--backbone", "tiny:Net", "--image-size", "12", "--batch", "8", "--lr", "0.02"]
SHORT = ["--epochs", "1", "--warmup-epochs", "0"]


def train(*options, data="data.npz"):
    return main(["train", data, *OPTIONS, *options])


def refused(capsys, *options, data="data.npz"):
    assert train("--out", "out", *options, data=data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m taps_fast: error: ")
    return line.removeprefix("python -m taps_fast: error: ")


def test_a_run_learns_and_writes(here, capsys):
    assert train("--out", "out/cubs", "--epochs", "8", "--lam", "1", "--test", "data.npz") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cubs: 24 training and 24 test images of 3 classes\ntiny:Net, head classifier, 2 layers")
    where = "cuda:0" if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"
    assert printed.splitlines()[1].endswith(f"λ = 1, {where}")
    with open("out/cubs/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(8)] and rows[-1]["step"] == "24"
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) and float(rows[-1]["accuracy"]) > 0.6
    assert rows[0]["open_layers"] == "2" and int(rows[-1]["open_layers"]) < 2  # after the warm-up of the penalty
    assert "; closed: conv" in printed
    tensors, meta = store.read_task("out/cubs/best")
    assert meta["task"] == "cubs" and meta["head"] == {"kind": "classes", "classes": 3}
    # The folders alone, over the same backbone, have the accuracy that is printed.
    torch.manual_seed(0)
    model = TapsModel(backbone("tiny:Net"), head="classifier")
    model.load_task("out/cubs/best")
    model.eval()
    images, _ = load(Path("data.npz"), 12, Path("data.npz"), 0.2, 0)
    x, labels = (torch.stack(t) for t in zip(*(images[i] for i in range(24)), strict=True))
    right = float((logits_of(model(x)).argmax(1) == labels).float().mean())
    best = max(row["accuracy"] for row in rows[1:])
    assert f"best: accuracy {right:.1%} " in printed and float(best) == pytest.approx(right)


def test_a_killed_run_goes_on_bit_for_bit(here, capsys):
    """SIGKILL in the middle of a step, between two checkpoints; against a run that nothing happened to."""
    options = ["--epochs", "3", "--micro-batches", "2", "--checkpoint-every", "2", "--augment", "--test", "data.npz"]
    options += ["--task", "cubs", "--out"]
    path = os.pathsep.join([str(here), str(Path(__file__).parents[1])])
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "taps_fast", "train", "data.npz", *OPTIONS, *options, "killed"],
        # 3 batches of 2 micro-batches an epoch: the second half of step 6, two after the checkpoint of step 4.
        env={**os.environ, "PYTHONPATH": path, "KILL_AFTER": "12"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert torch.load("killed/checkpoint.pt", weights_only=True)["step"] == 4
    assert train(*options, "whole") == 0
    capsys.readouterr()
    assert train(*options, "killed") == 0 and "from step 4" in capsys.readouterr().out
    assert Path("killed/log.csv").read_bytes() == Path("whole/log.csv").read_bytes()
    for folder in ("best", "last"):
        (ours, meta), (theirs, other) = (store.read_task(f"{run}/{folder}") for run in ("killed", "whole"))
        assert meta == other and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = (torch.load(f"{run}/checkpoint.pt", weights_only=True) for run in ("killed", "whole"))
    assert first["identity"] == second["identity"] and torch.equal(first["random"], second["random"])
    assert all(torch.equal(first["task"][name], value) for name, value in second["task"].items())


def test_a_finished_run_is_not_trained_again(here, capsys):
    assert train("--out", "out", *SHORT) == 0
    before = Path("out/checkpoint.pt").read_bytes()
    assert train("--out", "out", *SHORT) == 0
    assert (
        Path("out/checkpoint.pt").read_bytes() == before
        and "epoch" not in capsys.readouterr().out.split("from step")[1]
    )


def training_of(recipe, out):
    """A run of a small network with two adapted layers, on six images."""
    images = Images("x", torch.rand(6, 3, 8, 8), torch.arange(6) % 3, ["a", "b", "c"], 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model = TapsModel(net, ["cubs"], head="3")
    return loop.Training(model, "cubs", images, images, recipe, out, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("warmup", "lam", "accuracies", "saved"),
    [(1, 0.5, [0.9, 0.5, 0.8, 0.8, 0.7], [1, 2, 3, 4]), (9, 0.0, [0.9, 0.5, 0.8, 0.8, 0.7], [1, 2, 3, 4, 5])],
)
def test_the_folder_of_the_best_is_of_the_epoch_that_is_reported(tmp_path, monkeypatch, warmup, lam, accuracies, saved):
    """Epochs before the penalty are replaced by the first with it, however accurate they were."""
    training = training_of(loop.Recipe(epochs=5, batch=6, warmup_epochs=warmup, lam=lam), tmp_path)
    tested, found = iter(accuracies), []
    monkeypatch.setattr(loop, "accuracy", lambda *args, **tasks: next(tested))
    monkeypatch.setattr(TapsModel, "save_task", lambda model, task, folder: found.append((folder.name, training.step)))
    point = training.run(lambda line: None)
    assert found == [*(("best", step) for step in saved), ("last", 5)]
    assert point.accuracy == accuracies[saved[-1] - 1]


def test_folders_with_dots_and_single_epochs(here, capsys):
    """A sweep as it is read afterwards: no name is said, and no warm-up."""
    assert train("--out", "runs/lr0.1", "--epochs", "1", "--lam", "0.1", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lr0_1: the task's name, which holds no dots as 'lr0.1' does (--task says another)"
    assert lines[1].startswith("lr0_1: 19 training and 5 test images")
    folders = ["runs/lr0.1/lam-0.1/best", "runs/lr0.1/lam-0.5/best"]
    assert main(["inspect", *folders]) == 0
    table = capsys.readouterr().out
    assert "\n1  lam-0.1 " in table and "\n2  lam-0.5 " in table


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lam", "0.3"], "a run must go on as it began: lam must be 0.5, as in out/checkpoint.pt, got 0.3"),
        (["--seed", "1"], "seed must be 0, as in out/checkpoint.pt, got 1"),
        (
            ["--epochs", "2"],
            "epochs must be 1, as in out/checkpoint.pt, got 2 (choose another --out, or remove that file "
            "to begin anew: rates and penalty are laid out over all epochs, so that none can be added)",
        ),
        (["--task", "cars"], "task must be 'out', as in out/checkpoint.pt, got 'cars'"),
        (["--test", "data.npz"], "images must be '"),
    ],
)
def test_resume_from_another_run(here, capsys, options, text):
    assert train("--out", "out", *SHORT) == 0
    capsys.readouterr()
    assert text in refused(capsys, *SHORT, *options)


def test_a_loss_that_is_not_a_number(here, capsys):
    assert train("--out", "out", *SHORT, "--lr", "1e30") == 2
    text = capsys.readouterr().err
    assert "must be finite, got" in text and "at step" in text and "last good checkpoint: no checkpoint yet" in text
    images, labels = coloured()
    x = images.float().permute(0, 3, 1, 2) / 255
    x[labels == 2] = float("nan")
    torch.save({"images": x, "labels": labels}, "nan.pt")
    assert "the loss must be finite, got nan at step 1, epoch 1" in refused(capsys, data="nan.pt")


def test_the_last_good_checkpoint_is_named(here, capsys):
    """Two steps go well; the third batch is broken."""
    images, labels = coloured()
    x = images.float().permute(0, 3, 1, 2) / 255
    torch.save({"images": x, "labels": labels}, "broken.pt")
    data, _ = load(Path("broken.pt"), 12, Path("broken.pt"), 0.2, 0)
    last = list(batches(data, 8, 1, 0, 0, 0).batch_sampler)[2]
    x[last] = float("inf")
    torch.save({"images": x, "labels": labels}, "broken.pt")
    text = refused(capsys, "--checkpoint-every", "1", "--test", "broken.pt", data="broken.pt")
    assert "at step 3, epoch 1 (last good checkpoint: out/checkpoint.pt, of step 2; try a lower --lr)" in text
    state = torch.load("out/checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(t.isfinite().all() for t in state["task"].values() if t.is_floating_point())


def test_named_backbones_ask_their_library(monkeypatch):
    asked = []
    net = nn.Linear(2, 2)

    def make(name, **options):
        asked.append((name, *options.values()))
        return net

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=make))
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=types.SimpleNamespace(get_model=make)))
    auto = types.SimpleNamespace(from_pretrained=make, from_config=lambda config: config)
    library = types.SimpleNamespace(AutoModelForImageClassification=auto, AutoConfig=auto)
    monkeypatch.setitem(sys.modules, "transformers", library)
    for source in ("timm", "torchvision", "transformers"):
        assert backbone(f"{source}:a") is net and backbone(f"{source}:b", pretrained=False) is net
    assert asked == [("a", True), ("b", False), ("a", "DEFAULT"), ("b", None), ("a",), ("b",)]


def test_weights_and_heads(here):
    torch.manual_seed(0)
    net = backbone("tiny:Net")
    torch.save(net.state_dict(), "weights.pt")
    torch.manual_seed(1)
    again = backbone("tiny:Net", weights=Path("weights.pt"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in net.state_dict().items())
    assert head_of(net) == "classifier"
    with pytest.raises(TrainError, match="weights must be a state dict of the backbone, got no.pt"):
        backbone("tiny:Net", weights=Path("no.pt"))
    with pytest.raises(TrainError, match="head must be said for a model without a Linear"):
        head_of(nn.Conv2d(1, 1, 1))
    with pytest.raises(TrainError, match="the backbone must return logits, got dict"):
        logits_of({})


def test_image_folders(here):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    images, labels = coloured(12)
    for part, rows in (("train", range(9)), ("val", range(9, 12))):
        for i in rows:
            folder = here / "folder" / part / "rgb"[labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i].numpy()).save(folder / f"{i}.png")
    training, test = load(here / "folder", 12, None, 0.2, 0)
    assert training.names == ["b", "g", "r"] and (len(training), len(test)) == (9, 3)
    index = next(i for i, path in enumerate(training.items) if path.name == "4.png")
    np.savez("four.npz", images=images[4:5].numpy(), labels=[0])
    same, _ = load(Path("four.npz"), 12, Path("four.npz"), 0.2, 0)
    assert torch.equal(training[index][0], same[0][0]) and training.names[int(training[index][1])] == "g"
    assert train("--out", "out", *SHORT, "--workers", "1", data="folder") == 0
    (here / "folder/val/x").mkdir()
    with pytest.raises(TrainError, match="classes of .*val must be those of training, got 'x'"):
        load(here / "folder", 12, None, 0.2, 0)
    (here / "folder/train/b/bad.png").write_text("")
    whole, _ = load(here / "folder/train", 12, here / "folder/train", 0.2, 0)
    with pytest.raises(TrainError, match="bad.png must be an image"):
        list(batches(whole, 4, 1, 0, 0, 0))


def test_every_image_once_an_epoch_in_batches_of_one_size(here):
    images, _ = load(Path("data.npz"), 12, Path("data.npz"), 0.2, 0)

    def order(epoch, start=0, size=7):
        return list(batches(images, size, 1, epoch, seed=5, workers=0, start=start).batch_sampler)

    assert sorted(sum(order(0), [])) == list(range(24)) and [len(batch) for batch in order(0)] == [6, 6, 6, 6]
    assert order(0) == order(0) and order(0) != order(1) and order(0, start=2) == order(0)[2:]


def test_augmentation_depends_on_seed_epoch_and_image_alone(here):
    images, _ = load(Path("data.npz"), 12, Path("data.npz"), 0.2, 0)
    plain, images.augmented = images[3][0], True
    assert torch.equal(images[3][0], images[3][0]) and not torch.equal(images[3][0], plain)
    first, images.epoch = images[3][0], 1
    assert images[3][0].shape == plain.shape and not torch.equal(images[3][0], first)


def test_sweep_over_lambda(here, capsys):
    assert train("--out", "out", "--epochs", "2", "--lam", "0", "5", "--task", "cubs") == 0
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert store.read_task("out/lam-0/best")[1]["task"] == store.read_task("out/lam-5/last")[1]["task"] == "cubs"
    figure = tradeoff([Point("λ=0.1", 0.5, 0.9), Point("full", 1.0, 0.92), Point("λ=1", 0.2, 0.8)])
    sweep, full = figure.axes[0].lines
    assert sweep.get_xydata().tolist() == [[20.0, 80.0], [50.0, 90.0]] and len(full.get_xydata()) == 1
    assert {text.get_text() for text in figure.axes[0].texts} == {"λ=0.1", "λ=1", "full"}


def test_tensorboard_logs(here, monkeypatch, capsys):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert train("--out", "out", *SHORT, "--tensorboard", "--bf16") == 0
    assert seen[0] == ("out/tensorboard", 0) and ("accuracy", 3) in seen and ("loss", 3) in seen
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    text = refused(capsys, *SHORT, "--tensorboard", "--bf16")
    assert "--tensorboard needs tensorboard: pip install tensorboard" in text


def test_micro_batches_average_to_the_whole_batch():
    net = nn.Linear(3, 4).double()
    x, labels = torch.randn(7, 3, dtype=torch.float64), torch.randint(4, (7,))
    (whole,) = torch.autograd.grad(F.cross_entropy(net(x), labels), [net.weight])
    loader = [(x[a:b], labels[a:b]) for a, b in ((0, 3), (3, 6), (6, 7))]
    (step,) = accumulate(loader, 8)
    for share, (inputs, targets) in step:
        (share * F.cross_entropy(net(inputs), targets)).backward()
    torch.testing.assert_close(net.weight.grad, whole)
    assert [len(step) for step in accumulate(loader, 2)] == [2, 1] and list(accumulate([], 2)) == []
    with pytest.raises(ValueError, match="accumulate: every must be at least 1, got 0"):
        next(accumulate(loader, 0))


def test_any_number_of_steps_has_a_schedule():
    for steps in range(1, 25):
        (schedule,) = schedules([{"params": [nn.Parameter(torch.zeros(1))]}], None, steps=steps, lr=1.0, score_lr=1.0)
        rates = []
        for _ in range(steps):
            rates += schedule.get_last_lr()
            schedule.optimizer.step()
            schedule.step()
        assert min(rates) > 0 and max(rates) <= 1.0


@pytest.mark.parametrize("by", ["layer", "size"])
@pytest.mark.parametrize(
    ("epochs", "warmup", "batch"), [(1, 0, 6), (1, 0, 1), (2, 1, 6), (2, 1, 1), (5, 1, 2), (9, 8, 2)]
)
def test_the_penalty_alone_moves_scores_by_a_quarter_of_lambda(tmp_path, by, epochs, warmup, batch):
    """In the mean over the layers, whatever the warm-up and the number of steps."""
    recipe = loop.Recipe(epochs, batch, lam=0.08, lr=1e-30, warmup_epochs=warmup, penalty_by=by)
    training = training_of(recipe, tmp_path)
    training.run(lambda line: None)
    assert training.step == epochs * 6 // batch
    scores = [layer.scores["cubs"].item() for layer in training.model.conversion.layers.values()]
    assert 0.15 - sum(scores) / len(scores) == pytest.approx(0.08 / 4)


def test_warm_up_skips_as_many_epochs_as_it_says():
    assert [penalty_weight(0.5, epoch, 2) for epoch in range(4)] == [0.0, 0.0, 0.5, 0.5]
    assert penalty_weight(0.5, 0, 0) == 0.5


def test_gate_log_says_what_moved():
    model = TapsModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["cubs"])
    log = GateLog(model, "cubs")
    score = model.conversion.layers["0"].scores["cubs"].data
    score.fill_(0.0)
    assert log() == {"open_layers": 1, "layers": 2, "fraction": 0.5} and log.closed == ["0"]
    score.fill_(1.0)
    assert log()["open_layers"] == 2 and str(log).endswith("100.0% of the base's parameters; reopened: 0")
