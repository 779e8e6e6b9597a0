"""Task folders: what one task adds to a base model, on disk.

    <folder>/task.json                           format, library version, task, base fingerprint, tensor checksums, …
    <folder>/tensors-<16 digits>.safetensors     the tensors; the digits are those of their own fingerprint

``task.json`` is the commit point. The tensors are written first, under a name that their content gives; then
``task.json`` is replaced in one step. So a save that is interrupted leaves one whole task. Several at once take
turns and leave the last one's. Files that are not ours stay where they are. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__
from ._names import did_you_mean

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
"""Goes up when an older library could not read what this one writes."""

_JSON = "task.json"
_REQUIRED = {"task": str, "fingerprint": str, "sharing": dict}
_ADDED = ("format", "library", "tensors", "checksum")
_SAVING = threading.Lock()
"""Where there is no fcntl."""


class TaskFolderError(ValueError):
    """A task folder that cannot be written, read, or loaded into this model; nothing was changed."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The identity of a base model: a hash of every tensor's name, dtype, shape and bytes.

    It depends neither on the order of the names nor on device, strides or memory format. One changed bit, or
    another dtype, changes it.

    Args:
        tensors: by name, e.g. a ``state_dict()``; any shape and dtype, with data (not on "meta").

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.

    Raises:
        ValueError: a tensor without data, or sparse.

    Cost: each byte is read once, at what SHA-256 gives (0.5 to 2 GB/s a core), tensors in parallel; tensors on an
    accelerator are copied to the host one at a time for each core.

    >>> a, b = torch.zeros(2, 3), torch.ones(4)
    >>> fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    True
    >>> fingerprint({"a": a}) == fingerprint({"a": a.T})
    False
    """
    return f"sha256:{_checksum_of(checksums(tensors))}"


def save_task(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a task folder, or replaces the task in an existing one in a single step.

    Saves into one folder at the same time, of threads or processes, come one after the other. That needs locks: on
    Windows between processes, and on file systems that cannot lock a folder, they may leave a file too many, or lack
    the tensors where one saves again what another replaces.

    Args:
        folder: made where it does not exist. Of an existing one only the old task's two files are replaced.
        tensors: by name; any device, strides and dtype that safetensors has.
        meta: values that JSON can hold. "task" (its name), "fingerprint" (of the base) and "sharing"
            (`Sharing.as_dict` of this task alone) must be there; "format", "library", "tensors" and "checksum" are
            written here.

    Raises:
        TaskFolderError: ``folder`` is a file, or ``meta`` lacks a key or holds what JSON cannot.
        OSError: the disk refuses. In every case the old task is as it was.

    Cost: one copy of the tensors on the host, one SHA-256 pass, one write, flushed to the disk.
    """
    folder = Path(folder)
    _check_required("save_task: meta", meta, _REQUIRED)
    for key in _ADDED:
        if key in meta:
            raise TaskFolderError(f"save_task: meta must leave {key!r} to save_task, got {meta[key]!r}")
    # Copies: safetensors refuses tensors that share memory, and what is hashed must be what is written.
    contiguous = torch.contiguous_format
    tensors = {n: t.detach().to("cpu", copy=True, memory_format=contiguous) for n, t in tensors.items()}
    document = {"format": FORMAT, "library": f"taps_fast {__version__}", **meta, "tensors": checksums(tensors)}
    try:
        document = json.loads(json.dumps(document, allow_nan=False))  # as it will be read: keys are strings
    except (TypeError, ValueError) as error:
        raise TaskFolderError(f"save_task: meta must hold JSON values, got one that is not ({error})") from None
    text = json.dumps({**document, "checksum": _checksum_of(document)}, indent=1) + "\n"

    if folder.exists() and not folder.is_dir():
        raise TaskFolderError(f"save_task: folder must be a folder or not exist, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    target = _tensor_file(folder, document["tensors"])
    with _alone_in(folder):
        old = _old_tensor_file(folder)
        write_whole(target, lambda path: save_file(tensors, path))
        write_whole(folder / _JSON, lambda path: path.write_text(text, encoding="utf-8"))
        if old is not None and old != target:
            old.unlink(missing_ok=True)


def read_task(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads and verifies a task folder.

    Returns:
        (tensors by name, on the CPU; meta as it was saved, with the keys that `save_task` added).

    Raises:
        TaskFolderError: not a task folder, a newer format, a missing, truncated or corrupted file, tensors that
            ``task.json`` does not name or that it names and the file lacks.

    Cost: one read and one SHA-256 pass.
    """
    folder = Path(folder)
    while True:
        meta = _read_json(folder)
        path = _tensor_file(folder, meta["tensors"])
        try:
            tensors = load_file(path)
            break
        except FileNotFoundError:
            if _read_json(folder) == meta and not path.exists():  # else a save came in between: read what it wrote
                raise TaskFolderError(
                    f"read_task: folder must hold {path.name}, which its task.json names, got none in {folder}"
                ) from None
        except SafetensorError as error:
            raise TaskFolderError(
                f"read_task: {path} must be a whole safetensors file, got {path.stat().st_size} bytes "
                f"that are not: it is truncated or corrupted ({error})"
            ) from None
    table: dict[str, dict[str, Any]] = meta["tensors"]
    _same_names(f"read_task: {path} must hold the tensors that task.json names", table, tensors)
    for name, found in checksums(tensors).items():
        if found != table[name]:
            part = next(key for key in ("dtype", "shape", "sha256") if found[key] != table[name].get(key))
            raise TaskFolderError(
                f"read_task: tensor {name!r} must have the {part} that task.json gives, "
                f"{table[name].get(part)}, got {found[part]} (corrupted: {path})"
            )
    return tensors, meta


def check_against(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: str
) -> None:
    """Whether a task that `read_task` gave fits a model; changes nothing.

    Args:
        meta, tensors: from `read_task`.
        expected: what the model takes for this task, by name; only shape and dtype are looked at.
        base: the `fingerprint` of the model's base.

    Raises:
        TaskFolderError: another base, missing or extra tensors, or one of another shape or dtype.
    """
    task = meta["task"]
    if meta["fingerprint"] != base:
        raise TaskFolderError(
            f"load_task: task {task!r} must be of this model's base, {base}, got one of "
            f"{meta['fingerprint']} (saved by {meta['library']}; build TapsModel from the same weights, in the same "
            "dtype, as when it was saved)"
        )
    _same_names(f"load_task: task {task!r} must hold this model's tensors", expected, tensors)
    for name, want in expected.items():
        got = tensors[name]
        if got.shape != want.shape:
            raise TaskFolderError(
                f"load_task: tensor {name!r} of task {task!r} must be {tuple(want.shape)} like "
                f"the model's, got {tuple(got.shape)}"
            )
        if got.dtype != want.dtype:
            raise TaskFolderError(
                f"load_task: tensor {name!r} of task {task!r} must be {want.dtype} like the model's, got {got.dtype}"
            )


def _check_required(what: str, meta: Mapping[str, Any], required: Mapping[str, type]) -> None:
    for key, kind in required.items():
        if not isinstance(meta.get(key), kind):
            raise TaskFolderError(f"{what} must hold {key!r}, a {kind.__name__}, got {meta.get(key)!r}")


def _same_names(rule: str, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        hint = did_you_mean(extra[0], missing) if extra else ""
        raise TaskFolderError(f"{rule}, got {_some(missing)} missing and {_some(extra)} extra{hint}")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """dtype, shape and checksum of each tensor."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        sums = list(pool.map(_sha256, tensors, tensors.values()))
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": checksum}
        for (name, tensor), checksum in zip(tensors.items(), sums, strict=True)
    }


def _sha256(name: str, tensor: Tensor) -> str:
    if tensor.is_meta or tensor.layout != torch.strided:
        what = "the meta device" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"fingerprint: tensor {name!r} must be dense and hold data, got one of {what}")
    data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Not reshape: one element counts as contiguous with any stride, and is then not viewed as bytes.
    return hashlib.sha256(data.as_strided((data.numel(),), (1,)).view(torch.uint8).numpy().data).hexdigest()


def _checksum_of(document: Mapping[str, Any]) -> str:
    """Of a JSON document, whatever its layout and the order of its keys."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_file(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> Path:
    # The content gives the name, so that task.json cannot point elsewhere.
    return folder / f"tensors-{_checksum_of(table)[:16]}.safetensors"


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / _JSON
    if not path.is_file():
        what = "no such folder" if not folder.exists() else "a file" if folder.is_file() else "a folder without one"
        raise TaskFolderError(f"read_task: folder must be a task folder, with a task.json, got {what}: {folder}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TaskFolderError(f"read_task: {path} must be JSON, got a truncated or corrupted file ({error})") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), int) or "library" not in meta:
        raise TaskFolderError(f"read_task: {path} must be written by taps_fast, got another JSON file")
    if meta["format"] > FORMAT:
        raise TaskFolderError(
            f"read_task: format must be at most {FORMAT} for taps_fast {__version__}, got "
            f"{meta['format']} ({path} was saved by {meta['library']}: upgrade taps_fast)"
        )
    checksum = meta.pop("checksum", None)
    if checksum != _checksum_of(meta):
        raise TaskFolderError(
            f"read_task: {path} must match its checksum, got another content: it was corrupted or "
            f"edited (to change a task, load it and save it again)"
        )
    _check_required(f"read_task: {path}", meta, {**_REQUIRED, "tensors": dict})
    return meta


def _old_tensor_file(folder: Path) -> Path | None:
    """The tensors of the task that a save replaces, where there is one."""
    try:
        return _tensor_file(folder, _read_json(folder)["tensors"])
    except TaskFolderError:
        return None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within, no other save changes ``folder``. The lock is on the folder itself: it leaves no file, and ends with the
    process."""
    if fcntl is None:
        with _SAVING:
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to a fork of this process
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a whole file at ``path`` in one step, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors keeps its files from everybody but the owner
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
