"""``python -m taps_fast train``: what it cannot train is said in one line, and which dtypes it takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import SHORT, coloured, here, refused, train  # noqa: F401

from taps_fast.train import command
from taps_fast.train.backbone import backbone
from taps_fast.train.data import TrainError

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--head", "conv1"], "train: the network must run on an image, got RuntimeError: "),
        (["--image-size", "2"], "(--head classifier, an input (1, 3, 2, 2) of data.npz)"),
        (
            ["--epochs", "1", "--warmup-epochs", "1"],
            "train: warmup-epochs must leave the penalty an epoch, got 1 of 1 (--warmup-epochs 0 begins",
        ),
        (["--task", "v1.0"], "got 'v1.0' (--task says it, else --out)"),
        (["--task", "", "--out", "."], "got '' (--task says it, else --out)"),
    ],
)
def test_options(capsys, options, text):
    assert text in refused(capsys, *options)


def test_bad_data(capsys):
    images, labels = coloured(6)
    np.savez("empty.npz", images=images[:0].numpy(), labels=labels[:0].numpy())
    assert refused(capsys, data="empty.npz") == "train: empty.npz must hold images, got none"
    torch.save({"images": images, "labels": labels - 1}, "low.pt")
    text = "train: labels of low.pt must be in [0, 2), the head's classes, got -1 (2 of 6 out of range)"
    assert refused(capsys, data="low.pt") == text
    np.savez("high.npz", images=images.numpy(), labels=labels.numpy() + 1)
    text = "train: labels of high.npz must be in [0, 3), the head's classes, got 3 (2 of 6 out of range)"
    assert refused(capsys, "--test", "high.npz") == text
    np.savez("float.npz", images=images.numpy(), labels=labels.numpy() / 2)
    assert "must be one integer an image, got torch.float64 of shape (6,) (6 images)" in refused(
        capsys, data="float.npz"
    )
    np.savez("names.npz", x=images.numpy())
    assert refused(capsys, data="names.npz") == "train: names.npz must hold 'images' and 'labels', got x"
    Path("text.npz").write_text("text")
    text = "train: text.npz must be a whole .npz file, got one that is not (no zip archive, or a part of one)"
    assert refused(capsys, data="text.npz") == text
    Path("text.npz").write_bytes(Path("data.npz").read_bytes()[:-30])
    assert refused(capsys, data="text.npz") == text
    Path("data.txt").write_text("")
    assert "must end in .npz, .pt, .pth or .safetensors, got data.txt" in refused(capsys, data="data.txt")
    assert refused(capsys, data="none") == "train: data must be a folder or a file, got none, which does not exist"
    assert "hold-out must leave images" in refused(capsys, "--hold-out", "0.01")
    assert "micro-batches must be at most the samples of a batch, got 9 of" in refused(capsys, "--micro-batches", "9")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lam", "-1"], "argument --lam: must be finite and at least 0, got '-1'"),
        (["--lam", "nan"], "argument --lam: must be finite and at least 0, got 'nan'"),
        (["--threshold", "0"], "argument --threshold: must be finite and above 0, got '0'"),
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--device", "nonsense"], "argument --device: must be a device of this machine, got 'nonsense' ("),
        (["--device", "cuda:99"], "argument --device: must be a device of this machine, got 'cuda:99' ("),
        (["--hold-out", "1"], "argument --hold-out: must be between 0 and 1, got '1'"),
    ],
)
def test_options_out_of_range(capsys, options, text):
    with pytest.raises(SystemExit):
        train("--out", "out", *options)
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            "resnet18",
            "backbone must be torchvision:NAME, timm:NAME, transformers:NAME or module:callable, got 'resnet18'",
        ),
        ("not_there:Net", "backbone 'not_there:Net' needs not_there, which is not installed"),
        ("tiny:Nett", "must name something of tiny, got 'Nett'; did you mean 'Net'?"),
        ("tiny:nothing", "backbone must be an nn.Module, got a int from 'tiny:nothing'"),
    ],
)
def test_bad_backbones(spec, text):
    with pytest.raises(TrainError) as error:
        backbone(spec)
    assert text in str(error.value)


def test_what_is_not_installed(monkeypatch, tmp_path, capsys):
    for name in ("torchvision", "timm", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("torchvision", "timm"):
        with pytest.raises(TrainError, match=rf"needs {name}, which is not installed: pip install {name} \("):
            backbone(f"{name}:resnet18")
    with pytest.raises(TrainError, match=r"needs mine, which is not installed \("):
        backbone("mine:resnet18")
    for name in "abcdef":
        Path("folder", name).mkdir(parents=True)
        Path("folder", name, "1.png").touch()
    text = "train: Pillow must be installed to read images: pip install pillow ("
    assert refused(capsys, data="folder").startswith(text)


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_trains_on_the_gpu_where_there_is_one(monkeypatch, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.get_default("device") == device


def test_a_head_that_is_not_the_last_layer(capsys):
    Path("two.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.Linear(3, 9))\n"
        "def needs(x): return make()\n"
    )
    text = "train: the network must return one logit a class, (1, 3), got (1, 9) (--head 1, an input (1, 3, 12, 12)"
    assert text in refused(capsys, "--backbone", "two:make", "--head", "1")
    with pytest.raises(TrainError, match="'two:needs' cannot be made: needs.. missing 1 required positional argument"):
        backbone("two:needs")


def test_a_head_of_several_layers(capsys):
    Path("several.py").write_text(
        "from torch import nn\n"
        "def make(last=nn.Linear(3, 9)):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(432, 3), nn.Sequential(nn.ReLU(), last, nn.Identity()))\n"
        "def bare(): return make(nn.ReLU())\n"
    )
    text = "train: --head must be a Linear or Conv2d, got '2', a Sequential ("
    said = refused(capsys, "--backbone", "several:make", "--head", "2")
    assert said == text + "its last one is --head 2.1)"
    assert refused(capsys, "--backbone", "several:bare", "--head", "2") == text + "it holds none)"


def test_a_backbone_that_is_a_head_alone(capsys):
    Path("alone.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 9))\n"
    )
    text = "train: the backbone must have layers to adapt besides its head, got none (--head 1)"
    assert refused(capsys, "--backbone", "alone:make") == text


def test_files_of_lists(capsys):
    torch.save({"images": [1, 2], "labels": [0, 1]}, "lists.pt")
    text = "train: images and labels of lists.pt must be tensors, got list and list"
    assert refused(capsys, data="lists.pt") == text


def test_dtypes_of_numpy():
    """Its default for numbers is float64; the model's is taken."""
    images, labels = coloured()
    images = images.permute(0, 3, 1, 2).numpy() / 255
    np.savez("wide.npz", images=images, labels=labels.numpy().astype("uint16"))
    np.savez("same.npz", images=images.astype("float32"), labels=labels.numpy())
    for name in ("wide", "same"):
        assert train("--out", f"out-{name}", "--task", "cubs", *SHORT, data=f"{name}.npz") == 0
    wide, same = (Path(f"out-{name}", "log.csv").read_text() for name in ("wide", "same"))
    assert wide == same
