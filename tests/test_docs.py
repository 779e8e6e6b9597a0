"""The documents say what is so: their code runs, their tables are the library's, their paths exist."""

from __future__ import annotations

import doctest
import importlib
import itertools
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import taps_fast
from taps_fast import _dispatch, _ext
from taps_fast._problem import DTYPES, Problem

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
SHAPES = {"linear": (64, 32), "conv2d": (64, 32, 3, 3)}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def public_modules() -> list[str]:
    """Every module of the package; the demo's need packages of their own, and running __main__ would run it."""
    names = [m.name for m in pkgutil.walk_packages(taps_fast.__path__, "taps_fast.")]
    return [n for n in names if not re.search(r"__main__|\.demo|\._C", n)]


@pytest.mark.parametrize("name", public_modules())
def test_doctests(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_doctests():
    """A finder that finds nothing would pass every test above."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module, function in (("functional", "delta_linear"), ("store", "fingerprint"), ("model", "TapsModel")):
        tests = finder.find(importlib.import_module(f"taps_fast.{module}"))
        assert any(test.name.endswith(function) and test.examples for test in tests), function


def test_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Block after block in one namespace, as a reader would type it; `delta_linear` and what it equals agree."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    torch.testing.assert_close(names["y"], names["z"])
    assert names["logits"].shape == (3, 1000) and names["logits"][1, 196:].eq(-torch.inf).all()
    assert not any("taps_fast" in type(module).__module__ for module in names["plain"].modules())
    assert "of the base" in capsys.readouterr().out
    assert (tmp_path / "tasks/cubs/task.json").is_file()


def test_commands_of_the_readme_exist(capsys):
    from taps_fast.__main__ import main

    commands = re.findall(r"python -m taps_fast (\w+)", read("README.md"))
    assert set(commands) == {"info", "inspect", "train"}
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.M)
    assert all(f"\n    {command}" in listed for command in commands)
    assert set(re.findall(r"\bmake ([a-z-]+)", read("README.md") + read("CONTRIBUTING.md"))) <= set(targets)


def support(row, op: str) -> tuple[str, ...] | None:
    """(devices, dtypes, gradients) that one row of the table of backends takes, whatever this machine lacks."""
    runs = {
        (device, dtype, grad)
        for device, dtype, grad in itertools.product(DEVICES, DTYPES, (False, True))
        if not list(_dispatch.reasons_against(row, Problem(op, device, dtype, SHAPES[op], 8, 2, 2, grad)))
    }
    if not runs:
        return None
    axes = [
        [v for v in values if v in {r[i] for r in runs}] for i, values in enumerate((DEVICES, DTYPES, (False, True)))
    ]
    assert runs == set(itertools.product(*axes)), "the README's table would need one more column"
    devices = ", ".join(DEVICES[d] for d in axes[0])
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in axes[1])
    return devices, dtypes, "all" if True in axes[2] else "none"


def support_matrix() -> str:
    lines: dict[tuple[str, ...], list[str]] = {}
    for op, row in itertools.product(SHAPES, _dispatch.TABLE):
        found = support(row, op)
        if found:
            lines.setdefault((f"`delta_{op}`", row.backend, *found), []).append(row.algorithm)
    header = ["| function | backend | algorithms | devices | dtypes | gradients |", "|---|---|---|---|---|---|"]
    rows = [f"| {op} | {backend} | {', '.join(a)} | {' | '.join(rest)} |" for (op, backend, *rest), a in lines.items()]
    return "\n".join(header + rows)


def test_support_matrix_of_the_readme(monkeypatch):
    monkeypatch.setattr(_ext, "CPU_ERROR", None)
    monkeypatch.setattr(_ext, "CUDA_ERROR", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = support_matrix()
    (written,) = re.findall(r"<!-- support matrix.*?-->\n(.*?)<!-- end -->", read("README.md"), re.S)
    assert written.strip() == wanted, f"put this between the markers in README.md:\n{wanted}"


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_links_exist(name):
    text = read(name)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:taps_fast|kernels|csrc|tests|benchmarks|build_backend)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_map_of_the_tree_is_whole():
    """CONTRIBUTING's map names every module of the package, and nothing that is not there."""
    (tree,) = re.findall(r"## Map.*?```\n(.*?)```", read("CONTRIBUTING.md"), re.S)
    named = {f"{folder}{name}" for folder, name in mapped(tree)}
    for path in named:
        assert (ROOT / path).exists(), f"{path} is in the map and not in the tree"
    paths = [path for folder in ("taps_fast", "taps_fast/nn") for path in (ROOT / folder).glob("*.py")]
    modules = {str(path.relative_to(ROOT)) for path in paths if path.name != "__init__.py"}
    assert modules <= named, f"not in CONTRIBUTING's map: {sorted(modules - named)}"


def mapped(tree: str) -> list[tuple[str, str]]:
    """(folder, name) of each entry: a line starts with a name; an indented one lies in the folder above it."""
    entries, folder = [], ""
    for line in tree.splitlines():
        indented, names = re.match(r"( *)((?:[\w./]+,? )*[\w./]+)", line).groups()
        for name in names.split(" "):
            if not indented and name.endswith("/"):
                folder = name
            entries.append((folder if indented else "", name.rstrip(",")))
    return entries


def test_changelog_has_this_version():
    versions = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.M)
    assert versions[:2] == ["Unreleased", taps_fast.__version__]


@pytest.mark.parametrize("name", (*DOCUMENTS, "benchmarks/README.md"))
def test_lines_fit(name):
    """But for what `benchmarks.report` writes."""
    text = re.sub(r"<!-- benchmarks:(\w+) -->.*?<!-- /benchmarks:\1 -->", "", read(name), flags=re.S)
    long = [line for line in text.splitlines() if len(line) > 120 and "|" not in line and "http" not in line]
    assert not long
