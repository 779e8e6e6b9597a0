"""What a layer hands to its operator for one selection of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

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

    @property
    def weight(self) -> tuple[Tensor, Sequence[Delta], Tensor, Tensor | None]:
        """base, deltas, coeffs and bias."""
        return self[:4]

    def options(self, batch: TaskBatch | None) -> dict[str, Any]:
        """The arguments by name, for the ids along the input's batch axis."""
        return {"tasks": batch, "pairs": self.pairs, "base_coeffs": self.base_coeffs}

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
