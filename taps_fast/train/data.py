"""Images and labels from a folder or a file, and the order in which they are seen: a function of the seed alone."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._command import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TrainError(UserError, ValueError):
    """Something that the person who trains can put right."""


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, or inputs of any other kind, made ready one by one.

    Args:
        source: where they come from, for messages.
        items: paths of images, or a tensor: uint8 images ([N, H, W], [N, H, W, 3] or [N, 3, H, W]), which are scaled,
            resized and normalised as files are, or inputs of another dtype, which are taken as they are.
        labels: int64 [N].
        names: of the classes.
        size: pixels a side.

    Attributes:
        dtype: the model's, which images and floating-point inputs are brought to; None: they stay as they are.

    Raises:
        TrainError: nothing in it; labels that are not one integer of [0, classes) an image.
    """

    def __init__(
        self, source: str, items: Sequence[Path] | Tensor, labels: Tensor, names: Sequence[str], size: int
    ) -> None:
        self.source, self.items, self.labels, self.names, self.size = source, items, labels, list(names), size
        self.dtype: torch.dtype | None = None
        self.augmented = False
        self.seed = self.epoch = 0
        if len(items) == 0:
            raise TrainError(f"train: {source} must hold images, got none")
        if labels.is_floating_point() or labels.is_complex() or labels.shape != (len(items),):
            raise TrainError(
                f"train: labels of {source} must be one integer an image, got {labels.dtype} of shape "
                f"{tuple(labels.shape)} ({len(items)} images)"
            )
        bad = labels[(labels < 0) | (labels >= len(names))]
        if len(bad):
            raise TrainError(
                f"train: labels of {source} must be in [0, {len(names)}), the head's classes, got {int(bad[0])} "
                f"({len(bad)} of {len(labels)} out of range)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.items[index] if isinstance(self.items, Tensor) else _decode(self.items[index])
        if x.dtype == torch.uint8:
            x = _channels_first(x).float() / 255
            if self.augmented:
                x = self._augment(x, index)
            x = F.interpolate(x[None], (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)[0]
            x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        if self.dtype is not None and x.is_floating_point():
            x = x.to(self.dtype)
        return x, self.labels[index]

    def _augment(self, x: Tensor, index: int) -> Tensor:
        """A crop of half to all of the area, mirrored or not: by seed, epoch and image, whatever worker does it."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) & 0x7FFFFFFF)
        side, top, left, mirrored = torch.rand(4, generator=generator).tolist()
        share = (0.5 + 0.5 * side) ** 0.5
        height, width = (max(round(share * extent), 1) for extent in x.shape[1:])
        top, left = round(top * (x.shape[1] - height)), round(left * (x.shape[2] - width))
        x = x[:, top : top + height, left : left + width]
        return x.flip(2) if mirrored < 0.5 else x

    def part(self, index: Tensor) -> Images:
        """Those of ``index``."""
        items = self.items[index] if isinstance(self.items, Tensor) else [self.items[i] for i in index.tolist()]
        return Images(self.source, items, self.labels[index], self.names, self.size)

    def identity(self) -> str:
        """A hash of the labels, and of file names or input values: tells one data set from another."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        if isinstance(self.items, Tensor):
            digest.update(self.items.contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update("\0".join(path.name for path in self.items).encode())
        return digest.hexdigest()[:16]


def load(path: Path, size: int, test: Path | None, hold_out: float, seed: int) -> tuple[Images, Images]:
    """Training and test images.

    Args:
        path: a folder with one folder a class; or one with such folders ``train`` and ``val`` or ``test``; or a file
            (.npz, .pt, .pth, .safetensors) with tensors "images" and "labels". What starts with a "." is not looked at.
        test: the same for the test images; None: ``val`` or ``test`` of ``path``, else ``hold_out`` of the images.

    Raises:
        TrainError: neither; see `Images`.
    """
    if test is None and (path / "train").is_dir():
        tests = [path / name for name in ("val", "test") if (path / name).is_dir()]
        path, test = path / "train", tests[0] if tests else None
    training = _read(path, size)
    if test is not None:
        return training, _read(test, size, training.names)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    held = round(hold_out * len(training))
    if not 0 < held < len(training):
        raise TrainError(
            f"train: hold-out must leave images to train and to test, got {hold_out} of {len(training)} images"
        )
    return training.part(order[held:].sort().values), training.part(order[:held].sort().values)


def batches(
    images: Images, size: int, parts: int, epoch: int, seed: int, workers: int, start: int = 0
) -> DataLoader[Any]:
    """An epoch in shuffled micro-batches, ``parts`` of them a batch, from batch number ``start`` on.

    Batches differ by one sample at most: none is left out, and none is so short that its statistics mean nothing.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    images.seed, images.epoch = seed, epoch
    chosen = [
        part.tolist() for batch in order.tensor_split(count(images, size))[start:] for part in _parts(batch, parts)
    ]
    # A generator of its own, because a loader otherwise draws a seed from the one that dropout draws from.
    return DataLoader(images, batch_sampler=chosen, num_workers=workers, generator=torch.Generator())


def count(images: Images, size: int) -> int:
    """Batches an epoch."""
    return -(-len(images) // size)


def _parts(batch: Tensor, parts: int) -> tuple[Tensor, ...]:
    if len(batch) < parts:
        raise TrainError(f"train: micro-batches must be at most the samples of a batch, got {parts} of {len(batch)}")
    return batch.tensor_split(parts)


def _read(path: Path, size: int, names: Sequence[str] | None = None) -> Images:
    if path.is_dir():
        found = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and not _hidden(folder, path)]
        unknown = [name for name in found if names is not None and name not in names]
        if unknown:
            raise TrainError(f"train: classes of {path} must be those of training, got {unknown[0]!r} ({names})")
        known, names = names is not None, found if names is None else names
        files = [
            [p for p in sorted((path / name).rglob("*")) if p.suffix.lower() in ENDINGS and not _hidden(p, path)]
            for name in names
        ]
        empty = next((name for name, own in zip(names, files, strict=True) if not own), None)
        if empty is not None and any(files) and not known:
            raise TrainError(f"train: each folder of {path} must hold images of its class, got none in {empty!r}")
        items = [(p, i) for i, own in enumerate(files) for p in own]
        return Images(
            str(path), [p for p, _ in items], torch.tensor([i for _, i in items], dtype=torch.int64), names, size
        )
    if not path.is_file():
        raise TrainError(f"train: data must be a folder or a file, got {path}, which does not exist")
    tensors = _tensors(path)
    missing = [key for key in ("images", "labels") if key not in tensors]
    if missing:
        raise TrainError(
            f"train: {path} must hold 'images' and 'labels', got {', '.join(map(str, tensors)) or 'nothing'}"
        )
    items, labels = tensors["images"], tensors["labels"]
    if not (isinstance(items, Tensor) and isinstance(labels, Tensor)):
        raise TrainError(
            f"train: images and labels of {path} must be tensors, got {type(items).__name__} and "
            f"{type(labels).__name__}"
        )
    whole = not (labels.is_floating_point() or labels.is_complex())
    labels = labels.long() if whole else labels  # uint16 has no maximum
    if names is None:
        names = [str(i) for i in range(int(labels.max()) + 1 if whole and labels.numel() else 0)]
    return Images(str(path), items, labels, names, size)


def _hidden(path: Path, root: Path) -> bool:
    """Whether a tool made it for itself (.ipynb_checkpoints, ._photo.jpg)."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _tensors(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):  # which NumPy takes for a pickle
                raise ValueError("no zip archive, or a part of one")
            with np.load(path, allow_pickle=False) as file:
                return {name: torch.from_numpy(file[name]) for name in file.files}
        if path.suffix in (".pt", ".pth"):
            found = torch.load(path, map_location="cpu", weights_only=True)
            return found if isinstance(found, dict) else {}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
    except Exception as error:  # whatever a broken file makes three libraries raise
        raise TrainError(f"train: {path} must be a whole {path.suffix} file, got one that is not ({error})") from None
    raise TrainError(f"train: a data file must end in .npz, .pt, .pth or .safetensors, got {path.name}")


def _decode(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise TrainError(f"train: Pillow must be installed to read images: pip install pillow ({error})") from None
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:
        raise TrainError(f"train: {path} must be an image, got a file that is not ({error})") from None


def _channels_first(x: Tensor) -> Tensor:
    """[3, H, W] from [H, W], [H, W, 3] or [3, H, W]."""
    if x.dim() == 2:
        return x.expand(3, -1, -1)
    if x.dim() == 3 and x.shape[0] == 3:
        return x
    if x.dim() == 3 and x.shape[2] == 3:
        return x.permute(2, 0, 1)
    raise TrainError(f"train: an image must be [H, W], [H, W, 3] or [3, H, W], got {tuple(x.shape)}")
