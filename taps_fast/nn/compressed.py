"""A task's delta in a compressed format, as a module: its tensors move, save and train with the layer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FORMATS, Delta, Format
from ..stacked import Stack, unlike


class CompressedDelta(nn.Module):
    """Holds the tensors of one `taps_fast.formats.Format` under its field names.

    What the format trains is a parameter that requires a gradient; a tensor that several deltas hold together is a
    frozen parameter, so that it stays one tensor where the model moves; the rest are buffers. ``others`` are the deltas
    that may hold such a tensor already.
    """

    def __init__(self, format: Format, others: Iterable[CompressedDelta] = ()) -> None:
        super().__init__()
        self.kind, self.shape = type(format), tuple(format.shape)
        self._made: Format | None = None
        for name, value in format.tensors.items():
            if name in format.trained:
                self.register_parameter(name, nn.Parameter(value.detach()))
            elif name in format.shared:
                held = (p for other in others for p in other.parameters(recurse=False))
                same = (p for p in held if p.data_ptr() == value.data_ptr() and p.shape == value.shape)
                self.register_parameter(name, next(same, nn.Parameter(value.detach(), requires_grad=False)))
            else:
                self.register_buffer(name, value.detach())

    @property
    def format(self) -> Format:
        """The delta, as `delta_linear` and `delta_conv2d` take it."""
        held = {**self._parameters, **self._buffers}
        if self._made is None or any(getattr(self._made, name) is not value for name, value in held.items()):
            made = self.kind(self.shape, **held)
            if torch.compiler.is_compiling():
                return made
            self._made = made  # checked once: a mixed batch asks for one of each task in each layer
        return self._made

    def hold(self, format: Format) -> None:
        """Takes the same values in other storage."""
        for name, value in format.tensors.items():
            if name in self._buffers:
                self._buffers[name] = value
            elif name not in format.shared:
                self._parameters[name].data = value  # type: ignore[union-attr]

    def takes(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these can be copied into what is held: the same names, shapes, and codes of the same type."""

        def sorts(held: dict[str, Tensor]) -> dict[str, Any]:
            return {name: (t.shape, t.is_floating_point() or t.dtype) for name, t in held.items()}

        return sorts(tensors) == sorts(self.state_dict())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedDelta:
        """Scales keep their dtype: in half precision a small one could be lost."""

        held = [t for name, t in (*self._parameters.items(), *self._buffers.items()) if name in self.kind.own_dtype]
        kept = {id(t) for value in held if value is not None for t in (value, value.grad)}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in kept or moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.kind.name}, {tuple(self.shape)}"


def restored(shape: Sequence[int], tensors: dict[str, Tensor]) -> Format | None:
    """The format that these tensors are of, by their names, types and shapes; None if there is none."""
    for kind in FORMATS.values():
        try:
            return kind(tuple(shape), **tensors)
        except (TypeError, ValueError):
            continue
    return None


def value_of(held: Any) -> Delta:
    """What a layer holds for a task, dense or in its format."""
    return held.format if isinstance(held, CompressedDelta) else held


def side_by_side(held: Sequence[Any]) -> Sequence[Delta]:
    """The deltas that a layer holds: a stack if all are compressed and alike, and each then keeps a view of it."""
    formats = [each.format.detach() for each in held if isinstance(each, CompressedDelta)]
    if len(formats) < max(len(held), 2) or unlike(formats) is not None:
        return [value_of(each) for each in held]
    stack = Stack(formats)
    for each, part in zip(held, stack, strict=True):
        each.hold(part)
    return stack


def apart(held: Iterable[Any]) -> None:
    """Gives every compressed delta storage of its own again."""
    for each in held:
        if isinstance(each, CompressedDelta):
            each.hold(each.format.detach().clone())
