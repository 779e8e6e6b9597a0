"""What autocast makes of the arguments of our operations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .formats import Format
from .stacked import Deltas, Stack


def autocast(
    device: str, x: Tensor, base: Tensor, bias: Tensor | None, deltas: Deltas
) -> tuple[Tensor, Tensor, Tensor | None, Deltas]:
    """The arguments in autocast's dtype, as ``F.linear`` takes them; with float64 all stay.

    What deltas share they share afterwards too.
    """
    dtype = torch.get_autocast_dtype(device)
    if x.dtype == torch.float64:
        return x, base, bias, deltas
    shared: list[tuple[Tensor, Tensor]] = []

    def narrow(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)

    def once(t: Tensor) -> Tensor:
        for before, after in shared:
            if before is t:
                return after
        shared.append((t, narrow(t)))
        return shared[-1][1]

    def narrow_delta(delta: Tensor | Format) -> Tensor | Format:
        if isinstance(delta, Tensor):
            return narrow(delta)
        held = {name: once(delta.tensors[name]) for name in delta.shared}
        return replace(delta, **held).to(dtype=dtype)  # type: ignore[arg-type]

    narrowed = deltas.to(dtype=dtype) if isinstance(deltas, Stack) else [narrow_delta(delta) for delta in deltas]
    return narrow(x), narrow(base), None if bias is None else narrow(bias), narrowed
