"""Every launch of the host code both ways, directly and by Triton, down to what the driver gets: a script.

    python tests/direct_launches.py

Nothing is compiled for a GPU and nothing runs. A small library stands in for CUDA's driver, behind Triton's own
launchers: both ways must hand it the same kernel, grid, stream and bits of each parameter, and Triton's launcher the
same arguments, tensors being their addresses. Prints the kernels that were started directly, and Triton's version.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DRIVER = """
#include <stdint.h>
#include <string.h>
#define NOTHING(name) int name() { return 0; }
NOTHING(cuCtxGetDevice) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute) NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuDriverGetVersion) NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuModuleGetFunction) NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload) NOTHING(cuStreamIsCapturing) NOTHING(cuInit)
int count, sizes[256], asked;
unsigned char found[44 + 256 * 8];  // grid, block, shared memory, stream; the kernel; its parameters
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuGetErrorString(int code, const char** text) { *text = "the stand-in"; return 0; }
int cuPointerGetAttribute(uint64_t* out, int what, uint64_t address) { asked++; *out = address; return 0; }
int cuLaunchKernelEx(const char* config, void* kernel, void** parameters, void** extra) {
  memset(found, 0, sizeof found);
  memcpy(found, config, 28);
  memcpy(found + 28, config + 32, 8);
  memcpy(found + 36, &kernel, 8);
  for (int i = 0; i < count; i++) memcpy(found + 44 + 8 * i, parameters[i], sizes[i]);
  return 0;
}
"""


def stand_in(folder: Path) -> ctypes.CDLL:
    """Loaded under the driver's name, by which Triton's modules then find it."""
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "-xc", "-"]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


FOLDER = tempfile.TemporaryDirectory()
CUDA = stand_in(Path(FOLDER.name))

import aot  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import variants  # noqa: E402
from taps_fast.kernels import _arguments, _configs, _launch, linear  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

RUN: list[tuple[tuple[Any, ...], bytes, int]] = []
"""What launchers were given, what they gave the driver, and how many addresses they asked it about."""
DIRECT: set[str] = set()
NONE = (None, None, None)
NUMBERS = itertools.count(1)
METADATA = SimpleNamespace(
    num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
    launch_cooperative_grid=False, launch_pdl=False,
)  # fmt: skip
one_way = _launch.Kernel.launch


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 77 + device)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    allocate_default_profile_scratch = None
    utils: Any = None


class Zeros:
    """Stands in for the kernel that writes tables, through which the host reads."""

    def __getitem__(self, grid: object) -> Any:
        return lambda table, *args, **kwargs: table.zero_()


def compiled(jit: Any, key: Any, signature: dict[str, Any], device: int, *_: Any) -> CompiledKernel:
    """Stands in for a compiled kernel, of which each key of Triton's has one, behind Triton's own launcher."""
    kernel = object.__new__(CompiledKernel)
    kernel.module, kernel._module_pid, kernel.src, kernel.name = object(), None, None, jit.fn.__name__
    kernel.function, kernel.packed_metadata = next(NUMBERS), (4, 1, 0)
    launcher = driver.CudaLauncher(SimpleNamespace(constants={}, signature=signature, fn=jit), METADATA)
    bytes_of = [4 if kind == "i32" else 8 for kind in flat(signature.values()) if kind != "constexpr"] + [8, 8]

    def run(*args: Any) -> None:
        number("count").value, number("asked").value = len(bytes_of), 0
        (ctypes.c_int * len(bytes_of)).in_dll(CUDA, "sizes")[:] = bytes_of
        launcher(*args)
        RUN.append((args, bytes((ctypes.c_ubyte * (44 + 256 * 8)).in_dll(CUDA, "found")), number("asked").value))

    kernel._run = run
    jit.device_caches[device][0][key] = kernel
    return kernel


def number(name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(CUDA, name)


def flat(kinds: Any) -> Iterator[str]:
    for kind in kinds:
        yield from flat(kind) if isinstance(kind, tuple) else (kind,)


def addressed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(addressed, value))
    return value.data_ptr() if isinstance(value, Tensor) else value


def both_ways(kernel: Any, grid: tuple[int], *args: Any, **kwargs: Any) -> None:
    name = kernel.fn.__name__
    del RUN[:]
    one_way(kernel, grid, *args, **kwargs)
    kernel.jit[grid](*args, **kwargs)
    (ours, given, asked), (theirs, wanted, _) = RUN
    # Behind grid, stream, kernel and packed metadata come what hooks would see, and the hooks.
    assert ours[:6] == theirs[:6] and addressed(ours[9:]) == addressed(theirs[9:]), name
    assert given == wanted and any(given), name
    if ours[6:9] == NONE:
        assert asked == 0, name
        DIRECT.add(name)
    if name in ("joined_ids_kernel", "grouped_rows_kernel"):  # the host reads through them
        for made in args[:2]:
            made.zero_()


def is_direct(x: Tensor, rows: int) -> bool:
    how: dict[str, Any] = dict(SPLITS=1, BLOCK_M=1, BLOCK_O=128, MIXED=False, BIAS=0, num_warps=4)
    one_way(linear.sum_splits_kernel, (1,), x, x, None, None, rows, 64, 1, 1, 1, 64, **how)
    return RUN[-1][0][6:9] == NONE


def check_what_is_left_to_triton() -> None:
    """Whatever no earlier launch was like, other addresses, and all launches while a hook sees them."""
    x = torch.zeros(65)
    assert not is_direct(x[:64], 3) and is_direct(x[:64], 3)
    assert not is_direct(x[1:], 3) and not is_direct(x[1:], 3)
    assert not is_direct(x[:64].double(), 3) and not is_direct(x[:64], 4)
    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hook.add(id)
        assert not is_direct(x[:64], 3)
        hook.remove(id)
        assert is_direct(x[:64], 3)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    Driver.utils = driver.CudaUtils()
    JITFunction._do_compile = compiled
    _configs.capability, _configs.processors = lambda device: (9, 0), lambda device: aot.PROCESSORS
    _arguments.write_kernel = Zeros()
    _launch.Kernel.launch = both_ways
    for _ in range(2):
        aot._exercise()
        for run, batches in itertools.product(variants.operators().values(), variants.BATCHES):
            for batch in batches:
                run(*batch)
    check_what_is_left_to_triton()


if __name__ == "__main__":
    if _launch.DIRECT:
        main()
    print(json.dumps({"triton": triton.__version__, "direct": sorted(DIRECT)}))
