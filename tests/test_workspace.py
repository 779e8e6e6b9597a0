"""Memory of the CPU operators: at most 2 MiB of scratch a thread, and nothing left behind, by failed calls either.

In processes of their own, where a small library stands in for the C function that allocates it.
"""

from __future__ import annotations

import os
import platform
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

LEFT = (
    PRELUDE
    + """
class Heap(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]  # the eighth: bytes in use

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
batch = TaskBatch.from_ids([0, 1, -1], 2)
x, dy, w, table, ones = torch.randn(3, 16), torch.randn(3, 8), torch.randn(8, 16), torch.randn(3, 16), torch.ones(2, 8)
codes, groups, weight = torch.zeros(8, 8, dtype=torch.uint8), (*batch.tensors, 1), (w, [w], torch.ones(2, 1), None)
pixels, kernel, conv = torch.randn(3, 2, 5, 5), torch.randn(4, 2, 3, 3), ([1, 1], [0, 0], [1, 1], 1)
kernels, dpixels = (kernel, [kernel], torch.ones(2, 1), None), torch.randn(3, 4, 3, 3)
calls = {
    "linear_fwd": (x, *weight, None, *groups, "blend"),
    "linear_dx": (dy, *weight, *groups, "split"),
    "linear_dw": (dy, x, *weight, *groups, [], [0], True, True, True),
    "linear_grad": (dy, x, *weight, *groups, "blend", True, [], [0], True, True, True),
    "linear_grad by PyTorch": (dy, x, w, [w], ones[0, :1], None, *alone, "merge", True, [], [0], True, True, True),
    "linear_coded": (x, w, [codes], torch.ones(2, 1), None, None, *groups, "auto", [torch.ones(())], [], [-1]),
    "linear_low_rank_": (dy, x, torch.ones(2, 3, 16), torch.ones(2, 3, 8), ones[:, 0], torch.eye(2), *groups),
    "scale_shift": (x, table, None, *groups, "relu"),
    "scale_shift_": (x, table, table, *groups, "none"),
    "scale_shift_dx": (x, x, table, None, None, None, *groups, "gelu"),
    "scale_shift_sums": (x, x, table, None, None, *groups, "none"),
    "moments": (x, *groups),
    "batch_norm_eval": (x, [], [], [table[0]] * 3, [table[0] ** 2] * 3, [1e-5] * 3, *groups),
    "group_norm": (x, [], [], 2, 1e-5, True, *groups),
    "batch_norm_train": (x, [], [], [], [], [], [1e-5] * 3, *groups),
    "batch_norm_grad": (x, x, [], table, table.square(), [], [1e-5] * 3, *groups, True),
    "track_statistics": ([x[0]], [x[1]], [torch.tensor(0)], [0], [0.1], table, table, batch.offsets, 5),
    "group_norm_train": (x, [], [], 2, 1e-5, True, *groups),
    "group_norm_grad": (x, x, [], x[:, :2].contiguous(), x[:, :2].contiguous(), True, *groups, True),
    "coded_fwd": (dy, x, [codes], None, ones, [0, -1], *groups, "bits"),
    "coded_dx": (dy, [codes], None, ones, [0, -1], *groups, "bits", 16),
    "sort_tasks": (torch.tensor([0, 1, -1]), 2),
    "fold": ([w], [w], torch.ones(1, 1, 1), [], []),
    "conv2d_merge": (pixels, *kernels, torch.zeros(3, 4), *conv, *groups),
    "conv2d_merge left to PyTorch": (pixels[..., ::2], *kernels, None, *conv, *groups),
    "conv2d_grad": (dpixels, pixels, *kernels, *conv, *groups, False, True, [0], [0], True, True),
    "conv2d_grad left to PyTorch": (dpixels, pixels, *kernels, *conv, *groups, True, True, [], [], True, True),
}
for name, arguments in calls.items():
    name = name.split()[0]
    operator = getattr(ops, name).default
    for _ in range(100):
        operator(*arguments)
    before = heap().field7
    for _ in range(1000):
        operator(*arguments)
    print(name, (heap().field7 - before) // 1000)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's account of the heap")
def test_no_call_leaves_anything_behind(allocator: Path) -> None:
    """A few bytes are enough to keep the C library from joining the blocks of results around them: the heap grew."""
    printed = run(LEFT, allocator)
    left = [(name, int(size)) for name, size in zip(printed[::2], printed[1::2], strict=True)]
    assert len(left) == 27 and max(size for _, size in left) < 8, left
