"""What lets threads share a model: a tensor a thread, and a network whose tensors one thread at a time exchanges."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Current(threading.local):
    """What the layers of a model need in the forward that runs in their thread. Copies begin without."""

    now: Tensor | None = None
    """None between forwards."""

    def __reduce__(self) -> tuple[type[Current], tuple[()]]:
        return Current, ()

    @contextlib.contextmanager
    def of(self, tensor: Tensor) -> Iterator[None]:
        """Within, ``now`` is this tensor."""
        previous, self.now = self.now, tensor
        try:
            yield
        finally:
            self.now = previous


class Exchange:
    """A network called with other tensors than its own. They are put into its modules, so threads take turns."""

    def __init__(self) -> None:
        self._turn = threading.RLock()

    def __reduce__(self) -> tuple[type[Exchange], tuple[()]]:
        return Exchange, ()

    def __call__(self, network: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        # Compiled, the tensors are the graph's, and a lock would break it. A tie is two places.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._turn:
            return functional_call(network, dict(tensors), args, kwargs, tie_weights=False)
