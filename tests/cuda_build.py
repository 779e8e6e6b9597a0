"""The CUDA extension compiled for every chip without one, and what its machine code says.

    python tests/cuda_build.py       # a table of all kernels; exits with 1 if a gate fails

setup.py's own command compiles it, against whatever PyTorch is installed. Objects and compiler logs are kept in
build/cuda, named by what they were made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sass_hazards import hazards

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/cuda"
CHIPS = ("80", "90a", "100")
THREADS = {
    "stream_kernel": 256,
    "plan_kernel": 1024,
    "pointwise_kernel": 256,
    "group_sums_kernel": 256,
    "add_splits_kernel": 256,
}
REGISTERS = 65536
"""Of a processor; a block that wants more cannot start."""


def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("taps_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(version: str | None = None) -> Path | None:
    """Where nvcc of PyTorch's CUDA version (None: any) is, or None."""
    module = setup()
    try:
        return module.cuda_home(version)
    except module.Unavailable:
        return None


def compiles_for_all() -> bool:
    """Whether there is an nvcc that knows every chip."""
    home = toolkit()
    known = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True) if home else None
    return known is not None and {f"compute_{chip.rstrip('a')}" for chip in CHIPS} <= set(known.stdout.split())


def cuobjdump() -> str | None:
    """The disassembler, which Triton brings too."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.is_file() else shutil.which("cuobjdump")


def build() -> tuple[Path, str]:
    """The extension, and what the compilers said."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # test processes share it
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> tuple[Path, str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    rules, home = setup(), toolkit()
    assert home is not None
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + sorted((ROOT / "csrc/cuda").glob("*.cpp"))
    headers = [
        *(ROOT / "csrc/cuda").glob("*.h"),
        *(ROOT / "csrc/cuda").glob("*.cuh"),
        *(ROOT / "csrc/common").iterdir(),
    ]
    nvcc = [*rules.nvcc_command(home, CHIPS), "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
    host = ["c++", "-O2", "-fPIC", "-Wall", "-Wextra", *rules.CXX, *rules.STABLE]
    host += [word for path in include_paths() for word in ("-isystem", path)]
    shared = [text.read_bytes() for text in sorted(headers)]

    def compiled(source: Path) -> Path:
        command = nvcc if source.suffix == ".cu" else host
        made_from = hashlib.sha256(b"\0".join([repr(command).encode(), source.read_bytes(), *shared])).hexdigest()[:16]
        target = BUILD / f"{source.stem}-{made_from}.o"
        said = target.with_suffix(".log")
        if not said.is_file():
            for old in BUILD.glob(f"{source.stem}-*"):
                old.unlink()
            text = _run([*command, "-c", source, "-o", target])
            said.write_text(text)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    log = "".join(target.with_suffix(".log").read_text() for target in objects)
    made_from = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = BUILD / f"_C_cuda-{made_from}.so"
    if not library.is_file():
        for old in BUILD.glob("_C_cuda-*"):
            old.unlink()
        libraries = [f"-l{name}" for name in ("torch_cpu", *rules.CUDA_LIBRARIES)]
        _run(
            [
                "c++",
                "-shared",
                *rules.LINK,
                *objects,
                "-o",
                library,
                f"-L{library_paths()[0]}",
                f"-L{home}/lib64",
                *libraries,
            ]
        )
    return library, log


def _run(command: list[object]) -> str:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@dataclass(frozen=True)
class Facts:
    """One kernel on one chip."""

    kernel: str
    chip: str
    variant: str
    registers: int
    spills: int
    """Bytes."""


_PTXAS = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)
_NAME = re.compile(r"\d+([a-z_]+_kernel)(.*)")


def facts(log: str) -> list[Facts]:
    """What ptxas says of every kernel."""
    found = []
    for symbol, chip, stack, stores, loads, registers in _PTXAS.findall(log):
        name = _NAME.search(symbol)
        assert name, symbol
        found.append(Facts(name[1], chip, variant(symbol), int(registers), int(stack) + int(stores) + int(loads)))
    return found


def variant(symbol: str) -> str:
    """The template arguments in a mangled name, readable."""
    arguments = re.search(r"_kernelI(.*?)EEvNS", symbol)
    if not arguments:
        return ""
    text = re.sub(r"NS\w*?_\d+(BFloat16|Half)E", r"\1 ", arguments[1])
    text = re.sub(r"^f", "float ", text)
    return re.sub(r"L[ib](\d+)E?", r"\1 ", text).strip()


def failures(fact: Facts) -> list[str]:
    """The gates on one kernel."""
    found = []
    if fact.spills:
        found.append(f"{fact.spills} bytes of registers or arrays in local memory")
    if fact.registers * THREADS[fact.kernel] > REGISTERS:
        found.append(f"{fact.registers} registers x {THREADS[fact.kernel]} threads exceed the file")
    return found


def machine_code(library: Path) -> dict[tuple[str, str], str]:
    """(chip, mangled kernel name) -> its instructions."""
    tool = cuobjdump()
    assert tool is not None
    text = subprocess.run([tool, "--dump-sass", library], capture_output=True, text=True, check=True).stdout
    code = {}
    for part in re.split(r"^Fatbin elf code:", text, flags=re.M)[1:]:
        (chip,) = re.findall(r"^arch = sm_(\w+)", part, re.M)
        for function in re.split(r"^\s*Function : ", part, flags=re.M)[1:]:
            code[chip, function.split(None, 1)[0]] = function
    return code


def main() -> int:
    library, log = build()
    bad = 0
    print(f"{'chip':<6}{'kernel':<16}{'variant':<18}{'regs':>5}{'spill':>6}  verdict")
    for fact in facts(log):
        reasons = failures(fact)
        bad += bool(reasons)
        print(
            f"{fact.chip:<6}{fact.kernel:<16}{fact.variant:<18}{fact.registers:>5}{fact.spills:>6}  "
            f"{'; '.join(reasons) or 'ok'}"
        )
    if cuobjdump():
        overwritten = sum(len(hazards(code)) for code in machine_code(library).values())
        print(f"{overwritten} registers overwritten while an asynchronous product may read them")
        bad += overwritten
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
