"""A mixed batch in slices, whose activations are blocks of memory that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .tasks import TaskBatch

SLICE_BYTES = 24 << 20
"""What one call of a layer may read and write of a slice's activations.

glibc returns blocks of 32 MiB and more to the system when they are freed, and smaller ones where much is free, so each
layer's output is made anew, page by page. `python -m benchmarks.slices` times it: slices gain little but that.
"""

LEAST_WORK = 4
"""Times that layers must read and write what slicing copies; a lone norm of 25 MB took ten times as long in slices."""


class Slicing(NamedTuple):
    """What the probe saw that slices need."""

    input_axes: list[int | None]
    """The batch axis of each part of the input."""
    input_dims: list[int | None]
    """How many axes each part has; None: it is no tensor."""
    output_axes: list[int] | None
    """The batch axis of each tensor in the output; None: not known, or samples meet in it."""
    bytes_per_element: float
    """What the layer with the largest activations reads and writes of a sample, for each element of the input."""
    work: float
    """What all layers read and write of a sample, over what slices copy of it: the input, and the output twice."""


def dims_of(leaves: list[Any]) -> list[int | None]:
    """How many axes each has; None: it is no tensor."""
    return [leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves]


def images_a_slice(
    asked: int | str | None, slicing: Slicing | None, x: Tensor, count: int, batch: TaskBatch | None = None
) -> int | None:
    """How many samples go together, where ``count`` are given as x; None: all.

    "auto" is a rule for CPUs whose C library gives memory back: `SLICE_BYTES`, slices as equal as they can be, and none
    below `LEAST_WORK`. Where all tasks have as many samples, slices are of whole tasks, up to a third larger: one of a
    single task gathers nothing.
    """
    if slicing is None or slicing.output_axes is None or count == 0:
        return None
    if asked == "auto":
        if x.device.type != "cpu" or slicing.work < LEAST_WORK or not gives_memory_back():
            return None
        one = slicing.bytes_per_element * x.numel() / count
        most = max(int(SLICE_BYTES // max(one, 1)), 1)
        each = _samples_of_a_task(batch) if batch is not None and most < count else 1
        whole = max(most // each, 1) * each
        most = whole if 1 < each <= 4 * most // 3 else math.ceil(count / math.ceil(count / most))
    else:
        most = int(asked or count)
    return most if most < count else None


@functools.cache
def gives_memory_back() -> bool:
    """Whether the C library returns a large block to the system when it is freed, so that the next is made anew.

    One block, larger than what a heap happens to have free, is written to in one place and freed: is that place still
    there? Asked once a process, which takes less than a millisecond.
    """
    page, there = mmap.PAGESIZE, ctypes.c_ubyte(0)
    try:
        block = torch.empty(256 << 20, dtype=torch.uint8)
        middle = block.numel() // 2
        block[middle : middle + 2 * page] = 1
        address = -(-(block.data_ptr() + middle) // page) * page
        del block
        gone: int = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(page), ctypes.byref(there))
    except (AttributeError, OSError, RuntimeError, TypeError):
        return True  # a system that cannot be asked, or has no such block
    return gone != 0 or not there.value & 1


def _samples_of_a_task(batch: TaskBatch) -> int:
    """How many samples every task in the batch has; 1 where they differ."""
    edges = batch.offsets.tolist()
    counts = {after - before for before, after in zip(edges, edges[1:], strict=False)} - {0}
    return counts.pop() if len(counts) == 1 else 1


def in_slices(
    forward: Callable[[slice | Tensor, Any, Any], Any],
    batch: TaskBatch,
    args: Any,
    kwargs: Any,
    axes: list[int | None],
    output_axes: list[int],
    most: int,
) -> Any:
    """``forward(samples, args, kwargs)`` for each slice of at most ``most`` samples, and the outputs put together.

    Slices follow the order of tasks, so that each meets few of them: a task's own weights are then read once or twice.
    """
    leaves, spec = tree_flatten((args, kwargs))
    ordered = batch.ids.device.type == "cpu" and bool((batch.ids.diff() >= 0).all())
    made: list[list[Tensor]] = []
    structure = None
    for where in _parts(batch, most, ordered):
        parts = [leaf if a is None else _take(leaf, a, where, batch.size) for leaf, a in zip(leaves, axes, strict=True)]
        own_args, own_kwargs = tree_unflatten(parts, spec)
        outputs, structure = tree_flatten(forward(where, own_args, own_kwargs))
        made.append(outputs)
    assert structure is not None
    joined = [torch.cat(pieces, axis) for pieces, axis in zip(zip(*made, strict=True), output_axes, strict=True)]
    if not ordered:
        back = batch.order.argsort()
        joined = [_take(y, axis, back, batch.size) for y, axis in zip(joined, output_axes, strict=True)]
    return tree_unflatten(joined, structure)


def _parts(batch: TaskBatch, most: int, ordered: bool) -> Iterator[slice | Tensor]:
    for start in range(0, batch.size, most):
        yield slice(start, start + most) if ordered else batch.order[start : start + most]


def _take(x: Tensor, axis: int, where: slice | Tensor, samples: int) -> Tensor:
    """The entries of some samples along an axis where each has equally many, one after the other."""
    repeats = x.shape[axis] // samples
    if repeats == 1:
        return x[(slice(None),) * axis + (where,)]
    apart: Tensor = x.unflatten(axis, (samples, repeats))  # type: ignore[no-untyped-call]
    return apart[(slice(None),) * axis + (where,)].flatten(axis, axis + 1)
