"""Which task each sample of a batch belongs to, and the one index that every layer shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ext

BASE = -1
"""The id of a sample that runs on the base alone."""

PLAN_SAMPLES = 2**16
PLAN_TASKS = 2**12
"""Up to these the CUDA extension sorts in one block; beyond, PyTorch's sort uses the whole device."""

Index = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """The task of each of B samples, and the samples grouped by task.

    Built once a forward, on the device of the ids, without a host sync. Nothing of the user's batch is
    permuted: kernels gather and scatter through ``order``.

    Attributes:
        ids: int64 [B], task of each sample; -1 is the base.
        order: int64 [B], samples sorted by id; samples of one task keep their order.
        offsets: int64 [T + 2]; samples of group g are ``order[offsets[g]:offsets[g + 1]]``, where group 0
            is the base and group t + 1 is task t.
        num_tasks: T.
    """

    ids: Tensor
    order: Tensor
    offsets: Tensor
    num_tasks: int

    @classmethod
    def from_ids(cls, ids: Tensor | Sequence[int], num_tasks: int, *, device: torch.device | None = None) -> TaskBatch:
        """Groups samples by task.

        Args:
            ids: integers [B], each in [-1, num_tasks).
            num_tasks: T, how many tasks there are.
            device: where the index is wanted; default: where ``ids`` is.

        Raises:
            TypeError: ids that are not integers.
            ValueError: ids that are not one-dimensional, or out of range. On a CUDA device, or while
                compiling, the range is checked on the device instead (an asynchronous assertion), because
                reading it would stall the stream.

        Cost: one stable sort of B integers; with the compiled extensions O(B + T) in one call on a CPU, and on a CUDA
        device one launch and the check.
        """
        if not isinstance(ids, Tensor):
            try:
                ids = torch.as_tensor(ids, dtype=torch.int64 if len(ids) == 0 else None)
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"TaskBatch: tasks must be integers, one a sample, got {ids!r}") from None
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"TaskBatch: tasks must be integers, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"TaskBatch: tasks must have 1 dimension, one id a sample, got shape {tuple(ids.shape)}")
        if device is not None and ids.device != device:
            if ids.is_cpu and not torch.compiler.is_compiling():  # where they are read, and refused, at no cost
                return cls.from_ids(ids, num_tasks).to(device)
            ids = ids.to(device)
        if ids.dtype != torch.int64:
            ids = ids.to(torch.int64)
        if ids.is_cpu and _ext.CPU_ERROR is None and not torch.compiler.is_compiling():
            order, offsets, bad = torch.ops.taps_fast.sort_tasks.default(ids, num_tasks)
            if bad:
                _check_range(ids, num_tasks)
            return cls(ids, order, offsets, num_tasks)
        order, offsets, valid = grouped(ids, num_tasks)
        if valid is None:
            _check_range(ids, num_tasks)
        else:
            torch._assert_async(valid, f"TaskBatch: tasks must be ids in [-1, {num_tasks})")
        return cls(ids, order, offsets, num_tasks)

    @property
    def size(self) -> int:
        """B, the number of samples."""
        return self.ids.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, order, offsets), as the operators take them."""
        return self.ids, self.order, self.offsets

    def only(self, present: Sequence[int]) -> TaskBatch:
        """The same samples where ids count the tasks ``present``, ascending; the others have no sample."""
        renumbered = torch.full((self.num_tasks + 1,), BASE, device=self.ids.device)  # ids of -1 read the last
        renumbered[list(present)] = torch.arange(len(present), device=self.ids.device)
        kept = torch.tensor([0, *(t + 1 for t in present), self.num_tasks + 1], device=self.ids.device)
        return TaskBatch(renumbered[self.ids], self.order, self.offsets[kept], len(present))

    def to(self, device: torch.device) -> TaskBatch:
        """The same index on another device."""
        if self.ids.device == device:
            return self
        # A CPU's kernels do not know of a copy that is still on its way, and who filled pinned memory may fill it anew.
        wait = device.type == "cpu" or (not torch.compiler.is_compiling() and self.ids.is_pinned())
        ids, order, offsets = (t.to(device, non_blocking=not wait) for t in self.tensors)
        return TaskBatch(ids, order, offsets, self.num_tasks)


def grouped(ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(order, offsets) of a `TaskBatch`, on any device, and whether all ids are in range, where that was seen."""
    small = ids.shape[0] <= PLAN_SAMPLES and num_tasks <= PLAN_TASKS
    if ids.is_cuda and small and _ext.cuda_refusal(ids.device.index) is None:
        order, offsets, _, valid = torch.ops.taps_fast.task_plan(ids, num_tasks)
        return order, offsets, valid
    ascending, order = torch.sort(ids, stable=True)
    groups = torch.arange(BASE, num_tasks + 1, device=ids.device)
    return order, torch.searchsorted(ascending, groups), None


def sums_of_rows(rows: Tensor, batch: Index, inner: int) -> Tensor:
    """Σ over the rows [M, C] of each task, [T + 1, C] (last row: those of id -1); of all, [1, C], without tasks."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    ids, _, offsets = batch
    if ids is None or offsets is None:
        return rows.sum(0, keepdim=True, dtype=wide)
    groups = offsets.shape[0] - 1
    if rows.shape[0] == 0:
        return rows.new_zeros(groups, rows.shape[1], dtype=wide)
    task = torch.remainder(ids[sample_of_row(rows.shape[0], ids.shape[0], inner, rows.device)], groups)
    member = task[None, :] == torch.arange(groups, device=rows.device)[:, None]
    return sums_by_group(member.to(wide), rows.to(wide))


def sums_by_group(member: Tensor, rows: Tensor) -> Tensor:
    """Σ over each group's rows [M, C], [G, C]; ``member`` [G, M] is 1 where a row belongs to the group, else 0.

    A product keeps the order of summation fixed, which index_add on a GPU does not; but 0·NaN is NaN. So what is not
    finite is counted apart, and makes the sum of its own group NaN. In float64 neither tf32 nor autocast rounds it.
    """
    exact = rows.dtype if rows.device.type == "mps" else torch.float64  # which it lacks
    member, finite = member.to(exact), rows.isfinite()
    spoilt = member @ (~finite).to(exact)
    return torch.where(spoilt > 0, torch.nan, member @ torch.where(finite, rows, 0).to(exact)).to(rows.dtype)


def picked(values: Tensor, places: Sequence[int]) -> Tensor:
    """values[places], places being at least one and on the host: no index travels to a device."""
    first, count = places[0], len(places)
    if places[-1] - first == count - 1 and all(p == first + i for i, p in enumerate(places)):
        return values[first : first + count]
    return torch.stack([values[p] for p in places])


def _check_range(ids: Tensor, num_tasks: int) -> None:
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        if ids.numel() and not (BASE <= int(ids.min()) and int(ids.max()) < num_tasks):
            bad = ids[(ids < BASE) | (ids >= num_tasks)]
            raise ValueError(
                f"TaskBatch: tasks must be ids in [-1, {num_tasks}), -1 being the base, got {int(bad[0])} "
                f"({bad.numel()} of {ids.numel()} out of range)"
            )
    else:
        valid = ((ids >= BASE) & (ids < num_tasks)).all()
        torch._assert_async(valid, f"TaskBatch: tasks must be ids in [-1, {num_tasks})")


def sample_of_row(rows: int, batch: int, inner: int, device: torch.device) -> Tensor:
    """int64 [rows]: the sample that each flattened row belongs to, ``(row // inner) % batch``."""
    return torch.div(torch.arange(rows, device=device), max(inner, 1), rounding_mode="floor") % max(batch, 1)
