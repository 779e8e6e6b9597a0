"""The CUDA kernels on a CPU: builds `emulated`, which runs the source of csrc/cuda under the emulator of this folder.

Loading it defines ``torch.ops.taps_fast_emulated``, operators of CPU tensors with the schemas of `taps_fast._ops`;
those that have no CPU kernel of their own also run under their real name.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from taps_fast import _ops, _pointwise

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/emulator"
SOURCES = [
    *sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cu", ".cpp")),
    ROOT / "tests/emulator/emulator.cpp",
    ROOT / "tests/emulator/harness.cpp",
]
OPERATORS = (
    "linear_stream",
    "task_plan",
    "layer_plan",
    "scale_shift",
    "scale_shift_",
    "scale_shift_dx",
    "scale_shift_sums",
    "moments",
)
FLAGS = [
    "-std=c++20 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas",
    "-DTAPS_FAST_EMULATED -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY",
    f"-I{ROOT}/csrc -I{ROOT}/tests/emulator",
    # pybind11's own headers before PyTorch's copy of them, which some versions close to users of the stable interface.
    *(f"-isystem {path}" for path in (pybind11.get_include(), *include_paths(), sysconfig.get_path("include"))),
]


def build() -> Path:
    """The module, compiled by ninja where a source, a header or a flag has changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    module = BUILD / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        f"flags = {' '.join(FLAGS)}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'c++')} -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'c++')} -shared -Wl,--exclude-libs,ALL $in -o $out "
        f"-L{library_paths()[0]} -ltorch_cpu",
        *(f"build {source.name}.o: compile {source}" for source in SOURCES),
        f"build {module.name}: link {' '.join(f'{source.name}.o' for source in SOURCES)}",
    ]
    plan = BUILD / "build.ninja"
    text = "\n".join(lines) + "\n"
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if ninja is None:
        raise ModuleNotFoundError("No module named 'ninja': pip install ninja", name="ninja")
    with (BUILD / "lock").open("w") as lock:  # test processes share it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not plan.is_file() or plan.read_text() != text:
            plan.write_text(text)
        done = subprocess.run([ninja, "-C", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return module


@functools.cache
def load() -> ModuleType:
    """The module `emulated`."""
    path = build()
    for name in OPERATORS:
        torch.library.define(f"taps_fast_emulated::{name}", _ops.SCHEMAS[name])
        if name in _ops.POINTWISE:
            torch.library.define(f"taps_fast_emulated::{name}.uncompiled", _ops.SCHEMAS[name])
            torch.library.impl(f"taps_fast_emulated::{name}.uncompiled", "CPU", getattr(_pointwise, name))
    spec = importlib.util.spec_from_file_location("emulated", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"taps_fast::{name}", "CPU"):
            torch.library.impl(f"taps_fast::{name}", "CPU", getattr(torch.ops.taps_fast_emulated, name))
    return module


if __name__ == "__main__":
    print(build())
