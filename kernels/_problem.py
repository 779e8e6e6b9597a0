"""What the host code of every kernel shares: which rows are whose, and which tensors make the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import Pointers, next_power_of_2, pointers, slots


class Rows(NamedTuple):
    """Which rows belong to which task; without tasks every row is task 0's."""

    ids: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    count: int
    inner: int
    place: Tensor | None = None
    """int64 [M]: the row at each position of the grouped order, where it is known."""

    @property
    def mixed(self) -> bool:
        return self.ids is not None

    @property
    def samples(self) -> int:
        return 1 if self.ids is None else max(self.ids.shape[0], 1)

    @property
    def per_sample(self) -> int:
        return max(self.count // self.samples, 1)


class Weight(NamedTuple):
    """The sources, their common strides, and the coefficients that weigh them."""

    sources: list[Tensor]
    """Kept while kernels read them by their addresses."""
    pointers: Pointers
    count: int
    strides: tuple[int, ...]
    coeffs: Tensor | None
    """None: task t has source t alone."""
    base_coeffs: Tensor | None
    tasks: int

    @classmethod
    def of(cls, base: Tensor, deltas: Sequence[Tensor], coeffs: Tensor, base_coeffs: Tensor | None) -> Weight:
        sources = [base, *deltas]
        # Whole-list calls: this is paid by each layer of each forward, for each delta.
        if not all(map(Tensor.is_contiguous, sources)) and len(set(map(Tensor.stride, sources))) > 1:
            layout = torch.channels_last if base.dim() == 4 else torch.contiguous_format
            sources = [s.contiguous(memory_format=layout) for s in sources]
        tasks = coeffs.shape[0] if coeffs.dim() == 2 else 1
        return cls(sources, pointers(sources), len(sources), sources[0].stride(), coeffs, base_coeffs, tasks)

    @classmethod
    def of_bank(cls, bank: Tensor, stride: tuple[int, int]) -> Weight:
        """Task t has bank[t] for its weight, whose out and in features lie ``stride`` apart."""
        return cls([bank], slots(bank), bank.shape[0], stride, None, None, bank.shape[0])

    @property
    def source_block(self) -> int:
        """How many coefficients of a row a kernel looks at together."""
        return source_block(self.count)


def source_block(sources: int) -> int:
    return min(32, next_power_of_2(sources))
