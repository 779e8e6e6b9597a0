"""Loads the compiled extensions, and remembers why one is not there.

Loading registers the extension's kernels for the operators of `taps_fast._ops`. ``TAPS_FAST_EXT`` means here what it
means to setup.py: ``require`` makes a missing CPU extension an ImportError, ``off`` loads none, and what is neither of
these nor ``auto`` is an error.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

MODE = os.environ.get("TAPS_FAST_EXT", "auto")
if MODE not in ("auto", "require", "off"):
    raise ImportError(f"TAPS_FAST_EXT must be auto, require or off, got {MODE!r}")


def _how_to_build() -> str:
    checkout = Path(__file__).parents[1]
    build = f"TAPS_FAST_EXT=require {sys.executable} -m pip install -v"
    if (checkout / "setup.py").is_file():
        return f"cd {checkout} && {build} -e ."
    return f"{build} --no-deps --force-reinstall .  (in a checkout of taps_fast)"


def _load(name: str) -> str | None:
    """Loads ``taps_fast.<name>``; what stood in the way, or None."""
    if MODE == "off":
        return f"taps_fast.{name} is not loaded: TAPS_FAST_EXT=off is set"
    note = Path(__file__).with_name(f"{name}_error.txt")  # left by setup.py
    # Only beside this file: an ordinary import may find the extension of another checkout that is installed.
    spec = PathFinder.find_spec(name, [str(Path(__file__).parent)])
    if note.is_file():
        reason = f"the build left it out: {note.read_text().strip().removeprefix('Unavailable: ')}"
    elif spec is None or spec.origin is None:
        reason = "it has not been built"
    else:
        try:
            torch.ops.load_library(spec.origin)  # type: ignore[no-untyped-call]
            return None
        except OSError as error:
            reason = f"it does not load into PyTorch {torch.__version__}: {error.__cause__ or error}"
    return f"taps_fast.{name} is not loaded: {reason}. To build it: {_how_to_build()}"


CPU_ERROR = _load("_C")
CUDA_ERROR = f"PyTorch {torch.__version__} has no CUDA" if torch.version.cuda is None else _load("_C_cuda")
CUDA_CHIPS: list[tuple[int, int]] = []
"""The compute capabilities that the CUDA extension was compiled for; each serves its generation, from itself on."""
if CUDA_ERROR is None:
    CUDA_CHIPS = [divmod(int(n) // 10, 10) for n in torch.ops.taps_fast.cuda_architectures().split(",")]
_OTHER_CHIP = f"taps_fast._C_cuda was built for others. To build it: {_how_to_build()}"


def cuda_refusal(index: int | None = None) -> str | None:
    """Why the compiled CUDA kernels do not run on a device, the current one unless said, or None."""
    if CUDA_ERROR is not None or not torch.cuda.is_available():
        return CUDA_ERROR
    chip = torch.cuda.get_device_properties(index)  # which torch.compile knows
    if any(major == chip.major and minor <= chip.minor for major, minor in CUDA_CHIPS):
        return None
    return f"the device has compute capability {chip.major}.{chip.minor}, {_OTHER_CHIP}"


if CPU_ERROR is not None:
    if MODE == "require":
        raise ImportError(CPU_ERROR)
    if MODE != "off":
        warnings.warn(
            f"taps_fast has no CPU kernels, so tensors on the CPU take slower paths in plain PyTorch. {CPU_ERROR}",
            RuntimeWarning,
            stacklevel=3,
        )
