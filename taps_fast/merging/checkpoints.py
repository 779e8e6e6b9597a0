"""Checkpoints on disk, read a tensor at a time, and merged weights written as one that any loader takes."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..store import write_whole

Source = str | os.PathLike[str] | Mapping[str, Tensor]
"""A safetensors or PyTorch file, a folder of safetensors (`save_pretrained`'s), or a state dict."""

FINGERPRINT = "taps_fast_base"
"""The key of a safetensors file's metadata that holds the base's fingerprint."""


class Checkpoint:
    """The tensors of one checkpoint by name. Nothing is read before `get`, and then one tensor.

    Raises:
        FileNotFoundError: no such file, or a folder without weights.
        TypeError: neither a path nor a mapping.
        ValueError: a PyTorch file or a mapping that neither is a state dict nor holds one under "state_dict".
    """

    def __init__(self, source: Source) -> None:
        self.metadata: dict[str, str] = {}
        self._get: dict[str, Callable[[], Tensor]] = {}
        self._shared = isinstance(source, Mapping)
        self._copies: dict[tuple[object, ...], Tensor] = {}
        if isinstance(source, Mapping):
            self.label = "a state dict"
            self._hold(_state_dict(source, "source"))
            return
        if not isinstance(source, (str, os.PathLike)):
            hint = "; its state_dict() is one" if isinstance(source, torch.nn.Module) else ""
            raise TypeError(
                f"Checkpoint: source must be a file, a folder or a state dict, got a {type(source).__name__}{hint}"
            )
        path = Path(source)
        self.label = str(path)
        if path.is_dir():
            for file in _weights_of(path):
                self._open(file)
        elif path.suffix == ".safetensors":
            self._open(path)
        else:
            self._hold(_state_dict(_unpickled(path), self.label))

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._get)

    def get(self, name: str) -> Tensor:
        """Reads one tensor; of a state dict the tensor itself, not to be written to (`own`)."""
        return self._get[name]()

    def own(self, name: str) -> Tensor:
        """A tensor that nobody else writes to: of a state dict, whose model may go on, a copy. Tied ones stay tied."""
        tensor = self.get(name)
        if not self._shared:
            return tensor
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in self._copies or not tensor.numel():
            self._copies[place] = tensor.clone()
        return self._copies[place]

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        self._get = {name: lambda t=t: t.detach() for name, t in tensors.items()}  # type: ignore[misc]

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"Checkpoint: source must be a file or folder that exists, got {path}")
        # The file is opened anew for each tensor: its pages are mapped, and would count as ours while it is open.
        with safe_open(path, "pt") as file:
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118, it is no dict
                self._get[name] = lambda name=name: _read(path, name)  # type: ignore[misc]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _weights_of(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the one, or as its index names them, in ``from_pretrained``'s order."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"Checkpoint: a folder must hold model.safetensors or its index, got {folder}")
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(named))]


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"Checkpoint: source must be a file or folder that exists, got {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before PyTorch 1.6, in a format that cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(found: Any, label: str) -> Mapping[str, Tensor]:
    """``found`` itself, or what it holds under "state_dict"."""
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise ValueError(f"Checkpoint: {label} must hold a state dict, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Checkpoint: {label} must hold a state dict, got one with {type(value).__name__} for {name!r}"
            )
    return found


def save_merged(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None = None,
    base: str | None = None,
) -> Path:
    """Writes merged weights as safetensors, in the names they have: no taps_fast is needed to load them.

    Args:
        state: what the merging functions return; any device and dtype.
        path: a ``.safetensors`` file, or a folder, which then holds ``model.safetensors``.
        like: a folder of the same architecture; its other files (configuration, tokenizer) are copied, so that
            ``from_pretrained(path)`` loads the result. It may be ``path`` itself, whose weights are then replaced.
        base: `TaskVectors.fingerprint`, to be kept in the file: who reads it over another base is told.

    Returns:
        The file with the weights. It and each copy are written whole or not at all: what was there stays until then.

    Raises:
        ValueError: ``like`` for a path that is a file.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> path = save_merged({"weight": torch.ones(2)}, tempfile.mkdtemp())
    >>> load_file(path)["weight"]
    tensor([1., 1.])
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        if like is not None:
            raise ValueError(f"save_merged: path must be a folder with like, got {path}")
        target = path
    else:
        target = path / "model.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    # One storage each: safetensors refuses tensors that share memory, such as tied weights.
    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    seen: set[int] = set()
    for name, t in tensors.items():
        if t.untyped_storage().data_ptr() in seen or t.untyped_storage().nbytes() > t.numel() * t.element_size():
            tensors[name] = t.clone()
        seen.add(t.untyped_storage().data_ptr())
    metadata = {"format": "pt"} | ({} if base is None else {FINGERPRINT: base})
    write_whole(target, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    for file in () if like is None else Path(like).iterdir():
        copy = path / file.name
        if file.is_file() and not file.name.endswith((".safetensors", ".bin", ".index.json")):
            if not (copy.exists() and copy.samefile(file)):
                write_whole(copy, functools.partial(shutil.copyfile, file))
    return target
