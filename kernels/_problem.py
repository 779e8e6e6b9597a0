"""What the host code of every kernel shares: which rows are whose, and which tensors make the weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Rows(NamedTuple):
    """Which rows belong to which task; without tasks every row is task 0's."""

    ids: Tensor | None
    order: Tensor | None
    offsets: Tensor | None
    count: int
    inner: int

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
    coeffs: Tensor
    base_coeffs: Tensor | None

    @classmethod
    def of(cls, base: Tensor, deltas: Sequence[Tensor], coeffs: Tensor, base_coeffs: Tensor | None) -> Weight:
        sources = [base, *deltas]
        if any(s.stride() != base.stride() for s in deltas):
            layout = torch.channels_last if base.dim() == 4 else torch.contiguous_format
            sources = [s.contiguous(memory_format=layout) for s in sources]
        return cls(sources, coeffs, base_coeffs)

    @property
    def stride(self) -> tuple[int, int]:
        out, into = self.sources[0].stride()
        return out, into

    @property
    def tasks(self) -> int:
        return self.coeffs.shape[0] if self.coeffs.dim() == 2 else 1

    @property
    def source_block(self) -> int:
        """How many coefficients of a row a kernel looks at together."""
        return source_block(len(self.sources))


def source_block(sources: int) -> int:
    return min(32, triton.next_power_of_2(sources))
