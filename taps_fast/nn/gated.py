"""What a layer hands to its operator for one selection of tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import How, Sources
from ..formats import Delta
from ..stacked import Stack
from ..tasks import TaskBatch


class Gated(NamedTuple):
    """The arguments that `delta_linear` and `delta_conv2d` take for one selection."""

    base: Tensor
    deltas: Sequence[Delta]
    coeffs: Tensor
    bias: Tensor | None
    tasks: TaskBatch | None = None
    pairs: list[tuple[int, int]] | None = None
    base_coeffs: Tensor | None = None
    sources: Sources | None = None

    @property
    def weight(self) -> tuple[Tensor, Sequence[Delta], Tensor, Tensor | None]:
        """base, deltas, coeffs and bias."""
        return self[:4]

    def how(self, batch: TaskBatch | None, axis: int = 0, **follows: Any) -> How:
        """The arguments by name, for the ids along the input's batch axis; ``follows`` is an `Epilogue`'s options."""
        return How(batch, self.base_coeffs, self.pairs, axis, **follows, sources=self.sources)

    def detached(self) -> Gated:
        """The same values, of which nothing is recorded."""
        bias = None if self.bias is None else self.bias.detach()
        deltas = self.deltas if isinstance(self.deltas, Stack) else [delta.detach() for delta in self.deltas]
        return self._replace(base=self.base.detach(), deltas=deltas, coeffs=self.coeffs.detach(), bias=bias)


class Frozen(NamedTuple):
    """What `Gated` is for every selection, made once for inference."""

    single: dict[str | None, Gated]
    mixed: Gated
    """Of all tasks; lacks ``tasks``, which come with each batch."""


@functools.lru_cache(maxsize=4096)
def table_of(dtype: torch.dtype, tasks: int, places: tuple[int, ...]) -> Tensor:
    """Coefficients [tasks, open ones], 1 where an open one is its own, in what `delta_linear` uses with ``dtype``.

    Kept, and never written: layers whose gates are alike share it.
    """
    with torch.inference_mode(False):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.zeros(tasks, len(places), dtype=wide, device="cpu")
        for k, t in enumerate(places):
            table[t, k] = 1.0
    return table


@functools.lru_cache(maxsize=4096)
def vector_of(dtype: torch.dtype, opened: tuple[bool, ...]) -> Tensor:
    """Coefficients [tasks], 1 where a gate is open and 0 elsewhere; kept as `table_of` is."""
    with torch.inference_mode(False):
        return torch.tensor(opened, dtype=dtype, device="cpu")


def rows_of(table: Tensor, mine: Sequence[str], tasks: Sequence[str], other: Tensor) -> Tensor:
    """A row for each of ``tasks`` from a table that has one for each of ``mine``; ``other`` for the rest."""
    if len(mine) == len(tasks):
        return table
    rows = dict(zip(mine, table.unbind(), strict=True))
    return torch.stack([rows.get(task, other) for task in tasks])
