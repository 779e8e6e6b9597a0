"""Fast kernels and modules for TAPS: one shared network, a gated delta per layer and task."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Imported for what they do: the one declares the operators, the other loads the kernels that are compiled.
from taps_fast import (
    _ext,  # noqa: F401
    _ops,  # noqa: F401
)

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from taps_fast import formats as formats
    from taps_fast import merging as merging
    from taps_fast import nn as nn
    from taps_fast import peft as peft
    from taps_fast import stacked as stacked
    from taps_fast import train as train
    from taps_fast._dispatch import BackendError
    from taps_fast.functional import delta_conv2d, delta_linear
    from taps_fast.model import TapsModel
    from taps_fast.nn import FastTapsConv2d, FastTapsLinear
    from taps_fast.norms import scale_shift
    from taps_fast.peft import AdapterError
    from taps_fast.store import TaskFolderError
    from taps_fast.tasks import TaskBatch

__version__ = "0.1.0"

# Found on first use, so that importing taps_fast costs little more than importing torch.
_PUBLIC = {
    "AdapterError": "peft",
    "BackendError": "_dispatch",
    "FastTapsConv2d": "nn",
    "FastTapsLinear": "nn",
    "TapsModel": "model",
    "TaskBatch": "tasks",
    "TaskFolderError": "store",
    "delta_conv2d": "functional",
    "delta_linear": "functional",
    "scale_shift": "norms",
}
_MODULES = ("formats", "merging", "nn", "peft", "stacked", "train")
__all__ = [
    "AdapterError",
    "BackendError",
    "FastTapsConv2d",
    "FastTapsLinear",
    "TapsModel",
    "TaskBatch",
    "TaskFolderError",
    "__version__",
    "delta_conv2d",
    "delta_linear",
    "scale_shift",
]

if not TYPE_CHECKING:  # else a checker takes any name for one

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"taps_fast.{name}")
        if name in _PUBLIC:
            found = getattr(importlib.import_module(f"taps_fast.{_PUBLIC[name]}"), name)
            globals()[name] = found  # looking for it costs as much as checking a layer's arguments
            return found
        raise AttributeError(f"module 'taps_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})


def _register_kernels() -> None:
    """Makes a checkout's ``kernels/`` importable as ``taps_fast.kernels``, as installing the package does."""
    here, name = Path(__file__).parent, "taps_fast.kernels"
    source = here.parent / "kernels" / "__init__.py"
    if not (here / "kernels").exists() and source.is_file():
        spec = importlib.util.spec_from_file_location(name, source)
        if spec is not None and spec.loader is not None:
            sys.modules[name] = globals()["kernels"] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)


_register_kernels()
