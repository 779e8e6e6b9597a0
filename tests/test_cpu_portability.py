"""One binary for every x86: instructions that a CPU may lack stay in the files that are chosen only where it has them.

The continuous integration also runs the built wheel on emulated older processors (.ci/run).
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import cuda_build
import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
LIBRARY = Path(__file__).parents[1] / "taps_fast" / "_C.abi3.so"
WIDE = re.compile(r"%([yz]mm)\d")


def kernel_files() -> list[Path]:
    return sorted(CSRC.glob("cpu/*_generic.cpp")) + sorted(CSRC.glob("cpu/*_avx*.cpp"))


def headers_of(file: Path, seen: set[Path] | None = None) -> set[Path]:
    """The project's own headers that a file includes, directly or not, and every system header's name."""
    seen = set() if seen is None else seen
    for name in re.findall(r'^#include ["<](.+)[">]', file.read_text(), re.MULTILINE):
        path = file.parent / name
        if path in seen:
            continue
        seen.add(path)
        if path.is_file():
            headers_of(path, seen)
    return seen


@pytest.mark.parametrize("file", kernel_files(), ids=lambda f: f.name)
def test_kernel_files_share_no_code_with_others(file: Path) -> None:
    """Torch or standard library templates compiled for one ISA could be linked into code that runs everywhere."""
    allowed = {"cstdint", "cstring", "immintrin.h"}
    system = {path.name for path in headers_of(file) if not path.is_file()}
    assert system <= allowed, f"{file.name} reaches {sorted(system - allowed)}"
    for path in headers_of(file):
        if path.is_file() and path.name != "kernels.h":
            text = path.read_text()
            assert "namespace {" in text or "struct" in text, path
            assert not re.search(r"^(inline|constexpr|template)", text, re.MULTILINE) or "namespace {" in text, (
                f"{path.name} defines something outside an anonymous namespace"
            )


def test_wide_registers_only_in_kernels_chosen_at_run_time() -> None:
    """Disassembles the library: functions with AVX registers are those of the ISA tables, each with its own."""
    if platform.machine() != "x86_64" or not shutil.which("objdump") or not LIBRARY.is_file():
        return  # nothing to disassemble: the library is not for x86, or not built in place
    listing = subprocess.run(["objdump", "-d", "-C", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    registers: dict[str, Counter[str]] = {}
    for block in listing.split("\n\n"):
        header = re.match(r"[0-9a-f]+ <(.+)>:", block)
        if header:
            registers[header[1]] = Counter(WIDE.findall(block))
    wide = {name for name, count in registers.items() if count}
    outside = [name for name in wide if "taps_fast::cpu::" not in name]
    assert wide and not outside, f"AVX registers in {outside[:5]}"
    ordinary = r"Plan::|::choose\(|workspace\(|linear_(fwd|dx|dw)|read_weight|Inputs::"
    planning = [name for name in wide if re.search(ordinary, name)]
    assert not planning, f"AVX registers in ordinary code: {planning[:5]}"


def test_a_libstdcxx_linked_in_whole_stays_our_own(tmp_path: Path) -> None:
    """As some compilers link it: beside PyTorch's, and with its symbols shared, a stream could print no number."""
    (tmp_path / "print.cpp").write_text(
        '#include <sstream>\nextern "C" bool prints() { std::ostringstream s; s << 42; return s.str() == "42"; }\n'
    )
    command = ["c++", "-shared", "-fPIC", "-static-libstdc++", *cuda_build.setup().LINK, "print.cpp", "-o", "print.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    prints = ctypes.CDLL(str(tmp_path / "print.so")).prints
    prints.restype = ctypes.c_bool
    assert prints()


def test_chosen_instruction_set_is_reported() -> None:
    assert torch.ops.taps_fast.cpu_isa() in ("generic", "avx2", "avx512", "avx512bf16", "avx512amx")
