"""Builds the compiled extensions. Everything else about the package is in pyproject.toml.

    taps_fast._C       csrc/*.cpp, csrc/cpu/*.cpp   always
    taps_fast._C_cuda  csrc/cuda/*.cu, *.cpp        when PyTorch has CUDA and its toolkit is on the machine

Both use PyTorch's stable C++ interface and no Python API, so one binary serves every Python >= 3.10 and every
PyTorch >= 2.10. Setuptools can give neither flags nor a rebuild rule to a single file, so the class below compiles.

TAPS_FAST_EXT=auto     (default) install without an extension that cannot be built; importing taps_fast says why
TAPS_FAST_EXT=require  fail instead
TAPS_FAST_EXT=off      build none
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import shorten

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("TAPS_FAST_EXT", "auto")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Without this, setuptools takes the flags that Python itself was built with: debug information, sometimes an ISA.
os.environ.setdefault("CXXFLAGS", "-O3 -DNDEBUG -Wall -Wextra")

STANDARD = "-std=c++20"
# Visible is what the dispatcher finds by static registration; nothing needs a symbol of ours.
# A kernel file may fuse a * b + c: the compiler's own default, which asking for standard C++ turns off.
CXX = [STANDARD, "-fvisibility=hidden", "-ffp-contract=fast"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# A library linked in whole stays our own: where that is libstdc++, as with some compilers, its symbols would mix with
# those of PyTorch's, and printing a number into an error message end the process.
LINK = ["-Wl,--exclude-libs,ALL"] if sys.platform.startswith("linux") else []
# The CUDA runtime is linked in: PyTorch brings its own, of any minor version, and may have none at all.
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
# Files named *_<isa>.cpp include no torch header, so that no code shared with other files is compiled for the ISA.
ISA = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
ISA["avx512bf16"] = [*ISA["avx512"], "-mavx512bf16"]
ISA["avx512amx"] = [*ISA["avx512bf16"], "-mamx-tile", "-mamx-bf16"]


class Unavailable(Exception):
    """The machine or its PyTorch cannot have this extension, which TAPS_FAST_EXT=require accepts."""


def isa_of(source: str) -> str | None:
    isa = Path(source).stem.rpartition("_")[2]
    return isa if isa in ISA else None


def extensions() -> list[Extension]:
    cpu = [str(path) for pattern in ("csrc/*.cpp", "csrc/cpu/*.cpp") for path in sorted(Path().glob(pattern))]
    cpu = [source for source in cpu if X86 or isa_of(source) in (None, "generic")]
    cuda = [str(path) for pattern in ("*.cu", "*.cpp") for path in sorted(Path("csrc/cuda").glob(pattern))]
    found = {"taps_fast._C": cpu, "taps_fast._C_cuda": cuda}
    optional = MODE != "require"
    return [
        Extension(name, sources, libraries=["torch_cpu"], language="c++", py_limited_api=True, optional=optional)
        for name, sources in found.items()
        if sources
    ]


def cuda_home(version: str | None) -> Path:
    """The toolkit of PyTorch's CUDA major version (None: any): a folder with compiler, headers and runtime."""
    nvcc = shutil.which("nvcc")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in homes:
        # An nvcc on PATH is often a wrapper, whose folder holds no toolkit.
        if (home / "include/cuda_runtime.h").is_file() and (home / "lib64/libcudart_static.a").is_file():
            text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release (\d+)", text)
            if release and (version is None or release[1] == version.split(".")[0]):
                return home
    wanted = (
        "no CUDA toolkit" if version is None else f"PyTorch has CUDA {version} and no toolkit of that major version"
    )
    raise Unavailable(f"{wanted} was found (set CUDA_HOME); looked in {', '.join(map(str, homes))}")


def cuda_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, else the GPUs present, else what PyTorch was built for; as in 80, 90a or 100+PTX."""
    import torch

    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(".", "").replace(";", " ").split()
    if not chosen and torch.cuda.is_available():
        chosen = sorted({"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
    chosen = chosen or [name[3:] for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    # Nothing older has cp.async or bfloat16 products.
    served = [name for name in chosen if int(re.match(r"\d+", name)[0]) >= 80]
    if not served:
        raise Unavailable(f"the CUDA kernels need compute capability 8.0 or newer, asked for {', '.join(chosen)}")
    return served


def nvcc_command(home: Path, architectures: list[str]) -> list[str]:
    """Compiles a file of csrc/cuda, which includes no header of PyTorch."""
    command = [str(home / "bin/nvcc"), "-O3", STANDARD, "-DNDEBUG", "--expt-relaxed-constexpr", "-lineinfo"]
    for name in architectures:
        number = name.removesuffix("+PTX")
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name != number:
            command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return [*command, "-Xcompiler=-fPIC,-fvisibility=hidden"]


def knows_amx(host: list[str]) -> bool:
    """Whether compiler and assembler know AMX, which they learnt last."""
    code = b'void f() { asm("tdpbf16ps %tmm0, %tmm1, %tmm2"); }'
    with tempfile.TemporaryDirectory() as folder:
        command = [*host, *ISA["avx512amx"], "-x", "c++", "-c", "-", "-o", f"{folder}/amx.o"]
        return subprocess.run(command, input=code, capture_output=True).returncode == 0


class BuildExt(build_ext):
    """Compiles each file with its own flags, in parallel, only when it or a header it read has changed.

    An extension that cannot be built leaves `<module>_error.txt` in its place, which `taps_fast._ext` reads.
    """

    def run(self) -> None:
        self.errors: dict[str, str] = {}
        super().run()
        folders = [Path(self.build_lib, "taps_fast")]
        if self.inplace:
            folders.append(Path("taps_fast"))
        for extension in self.extensions:
            for folder in folders:
                note = folder / (extension.name.rpartition(".")[2] + "_error.txt")
                note.unlink(missing_ok=True)
                if extension.name in self.errors:
                    folder.mkdir(parents=True, exist_ok=True)
                    note.write_text(self.errors[extension.name] + "\n")

    def build_extension(self, ext: Extension) -> None:
        try:
            commands, objects = self.plan(ext)
            self.compile(commands)
            target = self.get_ext_fullpath(ext.name)
            self.compiler.link_shared_object(
                objects,
                target,
                libraries=ext.libraries,
                library_dirs=ext.library_dirs,
                extra_preargs=LINK,
                target_lang="c++",
            )
        except Exception as error:
            if MODE == "require" and not isinstance(error, Unavailable):
                raise RuntimeError(f"{ext.name} cannot be built: {error}") from error
            self.errors[ext.name] = shorten(f"{type(error).__name__}: {error}", 400)
            print(f"taps_fast: {ext.name} is not built: {error}", file=sys.stderr)
            ext.optional = True  # nothing to copy into the source tree

    def plan(self, ext: Extension) -> tuple[list[list[str]], list[str]]:
        """The compile commands that are needed, and every object; sets what the linker needs."""
        if self.compiler.compiler_type != "unix":
            raise Unavailable(
                f"the kernels need GCC's or Clang's vector types; the compiler is {self.compiler.compiler_type}"
            )
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        host = self.compiler.compiler_so_cxx
        torch_flags = [*STABLE, "-Icsrc"]
        for path in include_paths():
            torch_flags += ["-isystem", path]
        ext.library_dirs = library_paths()
        if ext.name.endswith("_cuda"):
            if torch.version.cuda is None:
                raise Unavailable(f"PyTorch {torch.__version__} has no CUDA")
            home = cuda_home(torch.version.cuda)
            nvcc = nvcc_command(home, cuda_architectures())
            ext.library_dirs.append(str(home / "lib64"))
            ext.libraries += CUDA_LIBRARIES

        commands, objects = [], []
        for source in ext.sources:
            target = Path(self.build_temp, source).with_suffix(".o")
            isa = isa_of(source)
            if source.endswith(".cu"):
                command = nvcc
            else:
                command = [*host, *CXX, *(torch_flags if isa is None else ISA[isa])]
            if isa == "avx512amx" and not knows_amx(host):
                command = [*host, *CXX]  # without the flags the file holds no kernels
            depfile = str(target.with_suffix(".d"))
            command = [*command, "-MMD", "-MF", depfile, "-c", source, "-o", str(target)]
            objects.append(str(target))
            if self.force or not fresh(target, command):
                target.parent.mkdir(parents=True, exist_ok=True)
                command_of(target).unlink(missing_ok=True)
                commands.append(command)
        return commands, objects

    def compile(self, commands: list[list[str]]) -> None:
        def run(command: list[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            for command, result in zip(commands, pool.map(run, commands), strict=True):
                print(" ".join(command), result.stdout, sep="\n", end="", flush=True)
                if result.returncode:
                    reasons = [line for line in result.stdout.splitlines() if "error" in line]
                    raise RuntimeError(": ".join([f"{command[0]} failed", *reasons[:1]]))
                command_of(Path(command[-1])).write_text(shlex.join(command))


def command_of(target: Path) -> Path:
    """Where it is kept by which command an object was made."""
    return target.with_suffix(".command")


def fresh(target: Path, command: list[str]) -> bool:
    """Whether an object was made by this command, and is newer than all that it was made from, this file included."""
    try:
        made = target.stat().st_mtime
        if command_of(target).read_text() != shlex.join(command):
            return False
        read = target.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return all(os.stat(path).st_mtime <= made for path in [*read, __file__])
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    if MODE not in ("auto", "require", "off"):
        raise SystemExit(f"TAPS_FAST_EXT must be auto, require or off, got {MODE!r}")
    modules = extensions() if MODE != "off" else []
    if MODE == "require" and not modules:
        raise SystemExit("TAPS_FAST_EXT=require, and csrc/ holds no source")
    setup(
        packages=[*find_packages(include=["taps_fast", "taps_fast.*"]), "taps_fast.kernels"],
        ext_modules=modules,
        cmdclass={"build_ext": BuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
