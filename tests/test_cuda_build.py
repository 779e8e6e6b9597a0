"""Every CUDA kernel compiles for each generation of chips into code that passes the gates of `cuda_build.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import cuda_build
import emulator
import pytest

pytestmark = pytest.mark.nvcc
GOOD = cuda_build.Facts("stream_kernel", "90a", "", registers=80, spills=0)


@pytest.fixture(scope="module")
def built():
    return cuda_build.build()


@pytest.fixture(scope="module")
def code(built):
    if cuda_build.cuobjdump() is None:
        pytest.skip("cuobjdump is neither in Triton nor on PATH")
    return cuda_build.machine_code(built[0])


def test_every_kernel_compiles_for_every_chip_and_spills_nothing(built):
    facts = cuda_build.facts(built[1])
    # stream: three types, for 8 and 16 rows, aligned and not. Norms: four types, forward and backward; pointwise also
    # aligned and not.
    kernels = {
        "stream_kernel": 12, "plan_kernel": 1, "pointwise_kernel": 16, "group_sums_kernel": 8, "add_splits_kernel": 8,
    }  # fmt: skip
    wanted = {(chip, kernel): n for chip in cuda_build.CHIPS for kernel, n in kernels.items()}
    assert Counter((f.chip, f.kernel) for f in facts) == wanted
    assert [(f, reasons) for f in facts if (reasons := cuda_build.failures(f))] == []


def test_the_compilers_warn_of_nothing(built):
    assert not re.findall(r".*(?:warning|C75\d\d).*", built[1])


@pytest.mark.parametrize(
    ("fact", "reason"),
    (({"spills": 8}, "8 bytes"), ({"registers": 255, "kernel": "plan_kernel"}, "255 registers x 1024 threads")),
)
def test_each_gate_can_fail(fact, reason):
    assert cuda_build.failures(GOOD) == []
    (found,) = cuda_build.failures(replace(GOOD, **fact))
    assert reason in found


def test_no_register_is_overwritten_under_a_running_product(code):
    assert {kernel: found for kernel, text in code.items() if (found := cuda_build.hazards(text))} == {}


def test_machine_code_is_what_the_source_means(code):
    """16-bit types multiply on tensor cores and float32 on the ordinary units; aligned rows are copied 16 bytes at a
    time, asynchronously and past L1; blocks of a cluster meet where there are clusters; nothing is atomic."""
    for (chip, kernel), text in code.items():
        assert not re.search(r"\*/ +(?:@!?U?P\d+ +)?(?:ATOM|RED)", text), (chip, kernel)
        if "stream_kernel" not in kernel:
            continue
        is_float, aligned = "_kernelIf" in kernel, "Lb1E" in kernel
        assert bool(re.search(r"\bHMMA\.16816\.F32", text)) == (not is_float), (chip, kernel)
        assert bool(re.search(r"\bFFMA\b", text)), (chip, kernel)
        assert bool(re.search(r"\bLDGSTS\.E\.BYPASS\.LTC256B\.128", text)) == aligned, (chip, kernel)
        assert bool(re.search(r"\bUCGABAR_ARV\b|\bUCGABAR", text)) == (chip != "80"), (chip, kernel)


def test_it_loads_into_any_pytorch_and_registers_its_kernels(built):
    """Also into one without CUDA, where a call that could only fail says so; and where the package has no other."""
    script = f"""
import torch
import taps_fast._ops
torch.ops.load_library({str(built[0])!r})
for name in {emulator.OPERATORS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"taps_fast::{{name}}", "CUDA"), name
try:
    torch.ops.taps_fast.task_plan(torch.tensor([0]), 1)
except NotImplementedError as error:
    print(error)
print(torch.ops.taps_fast.cuda_architectures())
"""
    env = {**os.environ, "TAPS_FAST_EXT": "off"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cuda_build.ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert "'taps_fast::task_plan' with arguments from the 'CPU' backend" in done.stdout
    assert done.stdout.splitlines()[-1] == "800,900,1000"


def test_it_needs_no_library_of_pytorchs_cuda(built):
    needed = subprocess.run(["ldd", built[0]], capture_output=True, text=True).stdout
    assert "libtorch_cpu.so" in needed and not re.search("libtorch_cuda|libcudart|libc10_cuda", needed)
