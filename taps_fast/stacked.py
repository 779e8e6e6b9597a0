"""Many compressed deltas as one argument."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from .formats import Format, LowRank


class Stack(Sequence[Format]):
    """K deltas of one format, side by side in memory: what a call costs beside its products no longer grows with K.

    `delta_linear` takes one in place of a list. On a CPU without gradients the kernel reads it as it is; elsewhere it
    is the list of its parts. Parts are views: what is written to one is in the stack.

    Args:
        deltas: at least one; alike in kind, shape, dtypes and device, with the same tile if they are masks, and with
            scales that are all [] or all [O].

    Raises:
        ValueError: deltas that are not alike.

    Cost: one copy of the deltas.

    >>> from taps_fast.formats import compress
    >>> deltas = [compress(torch.randn(4, 6), "bits") for _ in range(3)]
    >>> len(Stack(deltas)), torch.equal(Stack(deltas)[1].dense(), deltas[1].dense())
    (3, True)
    """

    def __init__(self, deltas: Sequence[Format]) -> None:
        if not deltas:
            raise ValueError("Stack: deltas must be at least one, got none")
        k = unlike(deltas)
        if k is not None:
            raise ValueError(
                f"Stack: deltas must be alike, got {_likeness(deltas[k])} at {k} ({_likeness(deltas[0])} at 0)"
            )
        self.like = deltas[0]
        self.tensors = {
            name: value if name in self.like.shared else _side_by_side(name, [delta.tensors[name] for delta in deltas])
            for name, value in self.like.tensors.items()
        }
        """The fields, with an axis of K in front where each delta has its own."""
        self.like = self.parts[0]

    @cached_property
    def parts(self) -> list[Format]:
        """The deltas, as views."""
        own = {name: t.unbind() for name, t in self.tensors.items() if name not in self.like.shared}
        count = len(next(iter(own.values())))
        held = ({**self.tensors, **{name: each[k] for name, each in own.items()}} for k in range(count))
        return [replace(self.like, **fields) for fields in held]  # type: ignore[arg-type]

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Stack:
        """As `Format.to`."""
        moved = copy.copy(self)
        moved.tensors = self.like.moved(self.tensors, device, dtype)
        moved.__dict__.pop("parts", None)
        moved.like = moved.parts[0]
        return moved

    def t(self) -> Stack:
        """Deltas of low rank transposed, by views of the same factors."""
        assert isinstance(self.like, LowRank)
        turned = copy.copy(self)
        turned.__dict__.pop("parts", None)
        factors = {"a": self.tensors["b"].transpose(1, 2), "b": self.tensors["a"].transpose(1, 2)}
        turned.tensors, turned.like = self.tensors | factors, self.like.t()
        return turned

    @overload
    def __getitem__(self, k: int) -> Format: ...
    @overload
    def __getitem__(self, k: slice) -> list[Format]: ...
    def __getitem__(self, k: int | slice) -> Format | list[Format]:
        return self.parts[k]

    def __len__(self) -> int:
        return len(self.parts)


def _side_by_side(name: str, values: list[Tensor]) -> Tensor:
    """[K, …]; the b of low rank on a CPU so that a product of few rows reads it output by output."""
    if name == "b" and values[0].device.type == "cpu":
        return torch.stack([b.t() for b in values]).transpose(1, 2)
    return torch.stack(values)


def unlike(deltas: Sequence[Format]) -> int | None:
    """The place of the first delta that cannot be in one stack with the very first."""
    wanted = _likeness(deltas[0]) if deltas else ()
    return next((k for k, delta in enumerate(deltas) if _likeness(delta) != wanted), None)


def _likeness(delta: Format) -> tuple[object, ...]:
    """What deltas of one stack have in common."""
    tensors = delta.tensors.items()
    of_tensors = [(name, tuple(t.shape), t.dtype, t.device) for name, t in tensors]
    held = [(t.data_ptr(), t.stride()) for name, t in tensors if name in delta.shared]
    settings = [value for value in vars(delta).values() if not isinstance(value, Tensor)]
    return (delta.name, *settings, *of_tensors, *held)


Deltas = list[Tensor | Format] | Stack
"""K deltas, as a call has them once a tensor [K, …] is unbound."""
