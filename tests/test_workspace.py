"""Scratch memory of the CPU kernels: at most 2 MiB a thread, and a failed allocation is an error that leaks nothing.

In processes of their own, where a small library stands in for the C function that allocates it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALLOCATOR = """
#include <stdlib.h>
int refuse;
size_t largest;
void* aligned_alloc(size_t alignment, size_t size) {
  void* p = NULL;
  if (size > largest) largest = size;
  return refuse || posix_memalign(&p, alignment, size) ? NULL : p;
}
"""

PRELUDE = """
import ctypes, sys
import torch, taps_fast
from taps_fast.tasks import TaskBatch

torch.set_num_threads(2)
allocator, ops = ctypes.CDLL(sys.argv[1]), torch.ops.taps_fast
alone = (None, None, None, 1)
"""

LARGEST = (
    PRELUDE
    + """
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch = TaskBatch.from_ids(torch.arange(-1, 8).repeat(120), 8)
    for rows, out, into in ((1080, 530, 2100), (9, 1300, 4100)):
        x, dy = torch.randn(rows, into).to(dtype), torch.randn(rows, out).to(dtype)
        base, coeffs = torch.randn(out, into).to(dtype), torch.eye(8, dtype=wide)
        groups = (*(batch.tensors if rows == 1080 else TaskBatch.from_ids(range(-1, 8), 8).tensors), 1)
        for weight, index in (((base, [base], coeffs[0, :1]), alone), ((base, [base] * 8, coeffs), groups)):
            for algorithm in ("blend", "split"):
                ops.linear_fwd(x, *weight, None, None, *index, algorithm)
                ops.linear_dx(dy, *weight, None, *index, algorithm)
            ops.linear_dw(dy, x, *weight, None, *index, [], [0], True, True, False)
print(ctypes.c_size_t.in_dll(allocator, "largest").value)
"""
)

REFUSED = (
    PRELUDE
    + """
refuse = ctypes.c_int.in_dll(allocator, "refuse")
x, w, one = torch.randn(512, 64), torch.randn(32768, 64), torch.ones(1)

def size():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10

def attempt():
    try:
        ops.linear_fwd(x, w, [w], one, None, None, *alone, "blend")
    except (MemoryError, RuntimeError) as error:
        return type(error).__name__
    return "no error"

refuse.value = 1
errors = {attempt() for _ in range(3)}
before = size()
errors |= {attempt() for _ in range(30)}  # each would leave its result, 64 MiB
grown = size() - before
refuse.value = 0
y = ops.linear_fwd(x, w, [w], one, None, None, *alone, "blend")
torch.testing.assert_close(y, x @ (2 * w).t(), rtol=1e-4, atol=1e-3)
print("no error" in errors, grown < 64 << 20)
"""
)


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocator")
    (folder / "allocator.c").write_text(ALLOCATOR)
    library = folder / "allocator.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "allocator.c"], check=True)
    return library


def run(code: str, allocator: Path) -> list[str]:
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"LD_PRELOAD": str(allocator), "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(allocator)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_thread_keeps_at_most_two_mebibytes(allocator: Path) -> None:
    (largest,) = run(LARGEST, allocator)
    assert 1 << 16 < int(largest) <= 2 << 20


def test_a_failed_allocation_raises_and_leaks_nothing(allocator: Path) -> None:
    assert run(REFUSED, allocator) == ["False", "True"]
