"""What a weight is where no one task is active: a tensor whose shape and type can be asked, and no value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

METADATA = (
    *(
        vars(torch._C.TensorBase)[name].__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_sparse", "is_meta")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
)
"""What may be asked of a weight without using its values."""


class MixedWeight(Tensor):
    """A layer's weight or bias in a mixed batch, or with none of several tasks active.

    Networks ask weights for their dtype (``x.to(self.proj.weight.dtype)``). That is answered; whatever would use
    the values raises RuntimeError, because each sample, or task, has others.
    """

    text: str
    """The error."""

    @staticmethod
    def of(like: Tensor, text: str) -> MixedWeight:
        """The stand-in for a weight like ``like``."""
        weight = like.detach().as_subclass(MixedWeight)
        weight.text = text
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `x.to(weight)` and `x.type_as(weight)` take another's dtype and device.
        template = func in (Tensor.to, Tensor.type_as) and not isinstance(args[0], MixedWeight)
        if func in METADATA or template:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        used = next(v for v in (*args, *(kwargs or {}).values()) if isinstance(v, MixedWeight))
        raise RuntimeError(used.text)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"MixedWeight({tuple(self.shape)}, {self.dtype})"
