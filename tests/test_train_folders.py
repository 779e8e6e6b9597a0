"""Image folders: which of them are classes, and where a run says so."""

from __future__ import annotations

import numpy as np
import pytest
from test_train import coloured, here, train  # noqa: F401

from taps_fast.train.data import TrainError, load

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture
def photos(here):  # noqa: F811
    images, labels = coloured(12)
    for i in range(12):
        folder = here / "photos" / "rgb"[labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].numpy()).save(folder / f"{i}.png")
    return here / "photos"


def test_hidden_folders_and_files_are_no_classes_and_no_images(photos):
    before, _ = load(photos, 12, photos, 0.2, 0)
    for where in (photos / ".ipynb_checkpoints", photos / "g" / ".ipynb_checkpoints"):
        where.mkdir()
        (where / "1-checkpoint.png").write_bytes((photos / "g/1.png").read_bytes())
    (photos / "b" / "._2.png").write_text("resource fork")
    training, test = load(photos, 12, photos, 0.2, 0)
    assert training.names == test.names == ["b", "g", "r"]
    assert len(training) == 12 and training.identity() == before.identity()


def test_a_class_without_images_is_refused_by_name(photos):
    (photos / "c").mkdir()
    with pytest.raises(TrainError, match=r"train: each folder of .*photos must hold images of its class, got none in"):
        load(photos, 12, None, 0.2, 0)
    np.savez(photos / "c" / "data.npz", images=[0])
    with pytest.raises(TrainError, match="got none in 'c'"):
        load(photos, 12, None, 0.2, 0)


def test_a_run_says_which_output_is_which_class(photos):
    assert train("--out", "out", "--epochs", "1", "--warmup-epochs", "0", data="photos") == 0
    assert (photos.parent / "out/classes.txt").read_text() == "b\ng\nr\n"
