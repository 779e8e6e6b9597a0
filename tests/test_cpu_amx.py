"""AMX without a machine that has it: the same kernels on a twin of its instructions, against the oracle.

tests/emulator/emulated_amx.h takes the place of csrc/cpu/amx.h in a library of its own. Where the CPU has AMX,
test_cpu_kernels.py runs the kernels as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_build import setup

from taps_fast.testing import Case, assert_close_to_oracle, linear_cases

ROOT = Path(__file__).parents[1]
TWIN = ROOT / "tests/emulator/emulated_amx.h"
DEFINE = f"-DTAPS_FAST_EMULATE_AMX='\"{TWIN}\"'"


def amx_cases() -> Iterator[Case]:
    """Rows, columns and depths on either side of a tile, a strip and a block; products that share rows."""
    bfloat16 = torch.bfloat16
    for rows in (0, 1, 12, 13, 16, 17, 31, 32, 33, 47, 67):
        yield Case(bfloat16, rows=rows, shape=(71, 53), num_deltas=1)
    for shape in ((1, 1), (2, 1), (1, 31), (16, 32), (17, 33), (31, 97), (33, 64), (64, 63), (97, 16), (113, 130)):
        yield Case(bfloat16, rows=19, shape=shape, num_deltas=2)
        yield Case(bfloat16, rows=37, shape=shape, num_deltas=3, zeros=(1,), strided=True, bias=None)
    yield Case(bfloat16, rows=29, shape=(37, 2311), num_deltas=1)  # several depth blocks, of forward and of dx
    yield Case(bfloat16, rows=41, shape=(1301, 43), num_deltas=2)
    yield Case(bfloat16, rows=531, shape=(77, 35), num_deltas=1)  # several row blocks of dw
    yield Case(bfloat16, rows=20, shape=(19, 23), num_deltas=2, zeros=(0, 1))
    # Tasks of many rows and of few, without rows, baked and closed; rows lie in the batch's order, not in theirs.
    ids = tuple((7 * i) % 13 - 1 for i in range(52)) + (3,) * 20 + (5,) * 45 + (-1,) * 14
    closed = tuple(12 * t + k for t in (4, 5, 7) for k in range(12))
    for baked in ((), (0, 3, 5)):
        yield Case(bfloat16, rows=len(ids), shape=(45, 37), num_deltas=12, tasks=ids, num_tasks=12, zeros=closed,
                   baked=baked, bias="base")  # fmt: skip
    yield Case(bfloat16, rows=2 * len(ids), shape=(83, 1037), num_deltas=1, tasks=ids, num_tasks=14, bias="task")


def check_all() -> None:
    for case in (*amx_cases(), *linear_cases((torch.bfloat16,))):
        for algorithm in ("blend", "split"):
            try:
                assert_close_to_oracle(case, "cpu", algorithm)
            except AssertionError as error:
                raise AssertionError(f"{case} {algorithm}") from error


@pytest.fixture(scope="module")
def emulated() -> Path:
    """A folder with the package, whose library has the twin. Objects that do not depend on it are the checkout's."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no avx512bf16, which AMX is emulated with")
    setup()  # whose flags are the checkout's, unless others are set
    flags = os.environ["CXXFLAGS"]
    folder = ROOT / "build" / f"amx-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # test processes share it
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(folder, flags)
    return folder / "lib"


def _build(folder: Path, flags: str) -> None:
    environment = os.environ | {"CXXFLAGS": f"{flags} {DEFINE}", "TAPS_FAST_EXT": "require"}
    for objects in (ROOT / "build").glob("temp.*"):
        # The copies keep their times, and so stay newer than the sources. What made them differs from what would make
        # them here only in where they lie, and in a definition that they do not depend on.
        ignored = shutil.ignore_patterns("dispatch.*", "*_avx512amx.*")
        shutil.copytree(objects, folder / objects.name, ignore=ignored, dirs_exist_ok=True)
        old, new = (shlex.join(shlex.split(text)) for text in (flags, environment["CXXFLAGS"]))
        for command in (folder / objects.name).rglob("*.command"):
            if new not in (text := command.read_text()):
                text = text.replace(old, new).replace(f"build/{objects.name}", str(folder / objects.name))
                command.write_text(text)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder), "--build-lib", f"{folder}/lib"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def run_emulated(folder: Path, code: str, **environment: str) -> str:
    """What it prints. Without TAPS_FAST_CPU_ISA in `environment` the kernels are asked for by name."""
    path = os.pathsep.join([str(folder), os.path.dirname(__file__), *filter(None, sys.path)])
    env = os.environ | {"TAPS_FAST_CPU_ISA": "avx512amx", "PYTHONPATH": path} | environment
    code = f"import torch, taps_fast\nassert taps_fast.__file__.startswith({str(folder)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_tiles_against_oracle(emulated: Path) -> None:
    run_emulated(emulated, "import test_cpu_amx\ntest_cpu_amx.check_all()")


def test_codes_in_panels(emulated: Path) -> None:
    run_emulated(emulated, "import test_cpu_coded as t\nt.check_linear_all((torch.bfloat16,))")


def test_rounding_special_values_and_threads(emulated: Path) -> None:
    code = """
import test_cpu_kernels as t
t.check_rounding()
for rows in (3, 20, 45):
    t.test_special_values_stay_where_they_belong(torch.bfloat16, rows)
x, (base, deltas, *rest) = t.mixed_arguments()
arguments = x.bfloat16(), (base.bfloat16(), [delta.bfloat16() for delta in deltas], *rest)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for first, again in zip(t.every_result(*arguments), t.every_result(*arguments), strict=True):
        assert torch.equal(first, again)
"""
    run_emulated(emulated, code)


@pytest.mark.parametrize(
    ("fault", "reason"), [("", None), ("permission", "does not permit its use"), ("product", "gave a wrong product")]
)
def test_chosen_by_itself_unless_refused(emulated: Path, fault: str, reason: str | None) -> None:
    code = """
try:
    print(torch.ops.taps_fast.cpu_isa())
except RuntimeError as error:
    print(error)
"""
    named = run_emulated(emulated, code, EMULATED_AMX_FAULT=fault)
    chosen = run_emulated(emulated, code, EMULATED_AMX_FAULT=fault, TAPS_FAST_CPU_ISA="")
    if reason is None:
        assert named == chosen == "avx512amx\n"
    else:
        assert "one this CPU has, got 'avx512amx' (" in named and reason in named
        assert chosen in ("avx512\n", "avx512bf16\n")


MISUSE = """
#include <cstdint>
#include <cstring>
#include "amx.h"
using namespace taps_fast::cpu;
int main(int, char** argv) {
  AmxShapes shapes{};
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) shapes.rows[i] = 16, shapes.bytes[i] = 64;
  float numbers[16 * 16] = {};
  const int mistake = argv[1][0] - '0';
  if (mistake == 0) amx::zero<0>();
  if (mistake == 1) shapes.rows[3] = 17;
  if (mistake == 2) shapes.bytes[3] = 66;
  if (mistake == 3) shapes.rows[2] = 8;
  if (mistake == 4) shapes.rows[0] = 0;
  amx::configure(shapes);
  amx::store<0>(numbers, 64);
  if (numbers[0] == numbers[0] || numbers[255] == numbers[255]) return 1;
  amx::zero<0>();
  amx::load<1>(numbers, 64);
  amx::load<2>(numbers, 64);
  amx::multiply<0, 1, 2>();
  if (mistake != 5) amx::release();
  if (mistake == 6) amx::release();
}
"""


def test_the_twin_is_strict(emulated: Path, tmp_path: Path) -> None:
    """Each mistake ends the process and is named; tiles hold NaNs until something is put there."""
    (tmp_path / "misuse.cpp").write_text(MISUSE)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = [*setup().ISA["avx512amx"], setup().STANDARD, f"-I{ROOT}/csrc/cpu", f'-DTAPS_FAST_EMULATE_AMX="{TWIN}"']
    subprocess.run([compiler, *flags, "-o", tmp_path / "misuse", tmp_path / "misuse.cpp"], check=True)
    reasons = [
        "no tile is configured",
        "a tile has more than 16 rows",
        "a row has more than 64 bytes",
        "the depths differ",
        "a tile has no shape",
        "a thread ended with its tiles configured",
        "no tile is configured",
    ]
    for mistake, reason in enumerate(reasons):
        result = subprocess.run([tmp_path / "misuse", str(mistake)], capture_output=True, text=True)
        assert result.returncode < 0 and result.stderr == f"emulated AMX: {reason}\n", (mistake, result)
    assert subprocess.run([tmp_path / "misuse", "9"]).returncode == 0
