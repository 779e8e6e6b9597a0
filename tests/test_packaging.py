"""The package as installed: the extension is there, or its absence is said once with the way to get it.

Builds, wheels and installations take minutes, so .ci/run tests those.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taps_fast
from taps_fast import _ext

ROOT = Path(__file__).parents[1]


def run(code: str, *, root: Path = ROOT, without: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own on the package in ``root``, as if modules ``without`` were not installed."""
    missing = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(root)!r})\n{missing}{code}"],
        env={**os.environ, "TAPS_FAST_EXT": "auto", **env},
        cwd="/",
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copy(tmp_path):
    """A checkout in which nothing is built."""
    ignore = shutil.ignore_patterns("*.so", "*_error.txt", "__pycache__")
    shutil.copytree(ROOT / "taps_fast", tmp_path / "taps_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    (tmp_path / "setup.py").touch()
    return tmp_path


FORWARD = """
import torch, taps_fast
x, base, delta = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3)
assert taps_fast.delta_linear(x, base, [delta], torch.tensor([0.5])).eq(4.5).all()
print(taps_fast.__file__, taps_fast._ext.CPU_ERROR)
"""


def test_extension_is_built():
    """The tests are about the compiled kernels too: without these, most of them would pass and mean nothing."""
    assert _ext.CPU_ERROR is None


def test_version_has_one_source():
    built = subprocess.run([sys.executable, "setup.py", "-q", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert built.stdout.split()[-1:] == [taps_fast.__version__], built.stderr
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", taps_fast.__version__)


def test_objects_are_made_again_by_another_command(tmp_path):
    """Such as one with other flags, or for other GPUs."""
    spec = importlib.util.spec_from_file_location("setup_of_taps_fast", ROOT / "setup.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    (tmp_path / "a.cpp").write_text("int a;")
    target = tmp_path / "a.o"
    command = ["c++", "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(tmp_path / "a.cpp"), "-o", str(target)]
    target.with_suffix(".d").write_text(f"{target}: {tmp_path / 'a.cpp'}")
    target.touch()
    assert not build.fresh(target, command)  # nobody says by which
    build.command_of(target).write_text(shlex.join(command))
    assert build.fresh(target, command)
    assert not build.fresh(target, [*command, "-O0"])
    os.utime(target, (0, 0))
    assert not build.fresh(target, command)


def test_sources_use_macros_of_the_oldest_pytorch():
    """TORCH_TARGET_VERSION hides the headers' newer functions, but not their newer macros. PyTorch 2.10 has these."""
    libraries = {"STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL"}
    oldest = {*libraries, "TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"}
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    used = {name for path in files for name in re.findall(r"\b(?:STABLE_)?TORCH_[A-Z_]+\b", path.read_text())}
    assert used and used <= oldest, f"not in PyTorch 2.10: {sorted(used - oldest)}"


def test_public_names_exist():
    for name in taps_fast.__all__:
        assert getattr(taps_fast, name) is not None
        assert name in dir(taps_fast)
    with pytest.raises(AttributeError, match="^module 'taps_fast' has no attribute 'delta_lineal'$"):
        taps_fast.delta_lineal  # noqa: B018


def test_public_modules_need_no_import_of_their_own():
    modules = ("formats", "merging", "nn", "peft", "stacked", "train")
    assert set(modules) <= set(dir(taps_fast))
    result = run(f"import taps_fast; print([getattr(taps_fast, name).__name__ for name in {modules}])", root=ROOT)
    assert result.stdout == f"{[f'taps_fast.{name}' for name in modules]}\n", result.stderr
    result = run("import sys, taps_fast; print([n for n in sys.modules if n.startswith('taps_fast.nn')])", root=ROOT)
    assert result.stdout == "[]\n", result.stderr


def test_missing_extension_is_said_once(copy):
    result = run(FORWARD + "import importlib, taps_fast.functional; importlib.reload(taps_fast)", root=copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{copy}/taps_fast/__init__.py taps_fast._C is not loaded: ")
    assert result.stderr.count("Warning") == 1
    assert "RuntimeWarning: taps_fast has no CPU kernels" in result.stderr
    assert f"taps_fast._C is not loaded: it has not been built. To build it: cd {copy} && " in result.stderr
    assert f"TAPS_FAST_EXT=require {sys.executable} -m pip install -v -e ." in result.stderr


def test_failed_build_is_said_with_its_reason(copy):
    """setup.py leaves the reason beside the package; an extension of an earlier build is then not loaded."""
    (copy / "taps_fast/_C_error.txt").write_text("RuntimeError: g++ failed: ops.cpp:3:1: error: expected ';'\n")
    (copy / "taps_fast/_C.abi3.so").write_bytes(b"from before")
    result = run(FORWARD, root=copy)
    assert result.returncode == 0, result.stderr
    assert "RuntimeError: g++ failed: ops.cpp:3:1: error: expected ';'. To build it: cd" in result.stderr


def test_what_the_build_left_out_is_told_from_what_is_here(copy):
    """A wheel may come from a machine whose PyTorch was another."""
    (copy / "taps_fast/_C_error.txt").write_text("Unavailable: PyTorch 2.13.0+cpu has no CUDA\n")
    result = run("import taps_fast", root=copy)
    assert "taps_fast._C is not loaded: the build left it out: PyTorch 2.13.0+cpu has no CUDA. To" in result.stderr


def test_broken_extension_is_said_with_its_reason(copy):
    (copy / "taps_fast/_C.abi3.so").write_bytes(b"not a library")
    result = run(FORWARD, root=copy)
    assert result.returncode == 0, result.stderr
    assert f"it does not load into PyTorch {torch.__version__}: {copy}/taps_fast/_C.abi3.so: " in result.stderr


def test_installed_package_names_another_command(copy):
    (copy / "setup.py").unlink()
    result = run("import taps_fast", root=copy)
    assert "pip install -v --no-deps --force-reinstall .  (in a checkout of taps_fast)" in result.stderr


def test_required_extension_is_an_error(copy):
    result = run("import taps_fast", root=copy, TAPS_FAST_EXT="require")
    assert result.returncode == 1
    assert "ImportError: taps_fast._C is not loaded: it has not been built. To build it: cd" in result.stderr


def test_unknown_word_for_the_extension_is_an_error():
    result = run("import taps_fast", TAPS_FAST_EXT="on")
    assert result.returncode == 1
    assert "ImportError: TAPS_FAST_EXT must be auto, require or off, got 'on'" in result.stderr


def test_extension_can_be_turned_off():
    result = run(FORWARD, TAPS_FAST_EXT="off")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" taps_fast._C is not loaded: TAPS_FAST_EXT=off is set\n")
    assert not result.stderr


def test_explicit_backend_says_why_it_cannot_run(copy):
    code = "import torch, taps_fast\nx = torch.ones(2, 2)\n"
    result = run(code + "taps_fast.delta_linear(x, x, [x], torch.ones(1), backend='cpu')", root=copy)
    assert result.returncode == 1
    error = result.stderr.rpartition("BackendError: ")[2]
    assert "taps_fast._C is not loaded: it has not been built. To build it: " in error, result.stderr


def test_source_tree_imports_without_installation(copy):
    """-S: no site-packages but PyTorch's, so nothing knows of an installed taps_fast."""
    packages = Path(torch.__file__).parents[1]
    code = f"""
import sys
sys.path += [{str(packages)!r}]
import taps_fast, taps_fast.kernels
print(taps_fast.kernels.__file__)
"""
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "TAPS_FAST_EXT": "off"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{copy}/kernels/__init__.py\n"


def test_kernels_are_part_of_the_package():
    result = run("import taps_fast.kernels; print(taps_fast.kernels.__name__)")
    assert result.stdout == "taps_fast.kernels\n", result.stderr
    result = run("from kernels import get_kernel")
    assert "ImportError: this package is taps_fast.kernels, it cannot be used as kernels" in result.stderr
    # What transformers asks, to see whether another package of this name is installed.
    assert run("import kernels; print(getattr(kernels, '__version__', 'none'))").stdout == "none\n"


def test_optional_packages_are_not_needed():
    """Nor imported unasked: `import taps_fast` is to cost what `import torch` costs."""
    code = "\nprint({'triton', 'matplotlib', 'safetensors', 'taps_fast.model'} & set(sys.modules))"
    result = run("import sys, torch\nbefore = set(sys.modules)" + FORWARD + code)
    assert result.stdout.endswith("set()\n"), result.stdout + result.stderr
    assert run(FORWARD, without=("triton", "matplotlib", "safetensors")).returncode == 0


def test_plot_without_matplotlib():
    code = "from taps_fast.sharing import Sharing\nSharing([], [], 0, 0).plot('sharing.png')"
    result = run(code, without=("matplotlib", "matplotlib.figure"))
    assert result.returncode == 1
    assert "pip install matplotlib" in result.stderr
