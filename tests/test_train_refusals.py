"""``python -m taps_fast train``: what it cannot train is said in one line, and which dtypes it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import coloured, here, refused, train  # noqa: F401

from taps_fast.train.backbone import backbone
from taps_fast.train.data import TrainError

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device", "nonsense"], "train: device must be one that PyTorch has here, got 'nonsense' ("),
        (["--device", "cuda:99"], "train: device must be one that PyTorch has here, got 'cuda:99' ("),
        (["--head", "conv1"], "train: the network must run on an image, got RuntimeError: "),
        (["--image-size", "2"], "(--head classifier, an input (1, 3, 2, 2) of data.npz)"),
        (["--task", "v1.0"], "got 'v1.0' (--task says it, else --out)"),
        (["--task", "", "--out", "."], "got '' (--task says it, else --out)"),
    ],
)
def test_options(capsys, options, text):
    assert text in refused(capsys, *options)


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
        assert train("--out", f"out-{name}", "--task", "cubs", "--epochs", "1", data=f"{name}.npz") == 0
    wide, same = (Path(f"out-{name}", "log.csv").read_text() for name in ("wide", "same"))
    assert wide == same
