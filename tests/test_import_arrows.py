"""Which part of the package may import which: CONTRIBUTING.md's map, read from the source by walking its syntax."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "taps_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])

# Each part, and the parts that it may import: user-facing parts first, what they are made of below.
CALL = {
    "_autocast", "_autograd", "_compressed", "_dispatch", "_problem", "formats", "reference", "stacked", "tasks",
}  # fmt: skip
LAYERS = {"_call", "_names", "_problem", "formats", "functional", "nn", "norms", "stacked", "tasks"}
MODEL = {
    "_closures", "_compress", "_folder", "_parting", "_plain", "_prepare", "_probe", "_refusals", "_regions",
    "_running", "_slices", "_statistics", "_training", "convert", "model", "peft", "sharing", "store",
}  # fmt: skip
MAY_IMPORT = {
    "__init__": {"_ext", "_ops"},
    "__main__": {"__init__", "_command", "_dispatch", "_problem", "demo", "train", *MODEL},
    "demo": {"__init__", "_command", "train", *LAYERS, *MODEL},
    "train": {"__init__", "_command", *LAYERS, *MODEL},
    "merging": {"__init__", *LAYERS, *MODEL},
    **dict.fromkeys(MODEL, {"__init__", *LAYERS, *MODEL}),
    "nn": LAYERS,
    "testing": {"functional", *CALL},
    "functional": {"_call", "_problem", "formats", "norms"},
    "_call": {"norms", *CALL},
    "norms": {"_autograd", "_ext", "_problem", "tasks"},
    "reference": {"tasks"},
    "_autograd": {"_ops", "_problem", "reference", "tasks"},
    "_dispatch": {"_ext", "_problem", "_tuned", "kernels"},
    "_coded": {"formats", "tasks"},
    "_compressed": {"_ext", "_ops", "formats", "stacked", "tasks"},
    "_problem": {"formats", "stacked", "tasks"},
    "_autocast": {"formats", "stacked"},
    "stacked": {"formats"},
    "formats": {"_bits"},
    "_bits": set(),
    "tasks": {"_ext"},
    # All but the first three when an operator first runs.
    "_ops": {"_ext", "_fakes", "_flops", "_aten", "_coded", "_fold", "_pointwise", "kernels"},
    "_aten": {"_images", "_problem", "_scratch", "tasks"},
    "_images": {"_problem", "_scratch", "tasks"},
    "_scratch": {"_problem"},
    "_fakes": {"_problem"},
    "_flops": set(),
    "_fold": set(),
    "_pointwise": {"tasks"},
    "_ext": set(),
    "_names": set(),
    "_command": set(),
    "_tuned": set(),
    "kernels": {"_ext", "_problem", "_tuned", "tasks"},
}


def module_of(path: Path) -> str:
    """taps_fast/nn/linear.py is taps_fast.nn.linear, and kernels/_split.py is taps_fast.kernels._split."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "taps_fast" else ("taps_fast", *parts))


def part_of(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def imports_of(tree: ast.AST, module: str) -> set[str]:
    """The parts of taps_fast that a module imports, wherever in it the import stands."""
    found = set()
    package = module.split(".")[:-1]
    if module == "taps_fast.__init__":  # what type checkers read there of all that is public, and nothing runs
        assert isinstance(tree, ast.Module)
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from taps_fast import _ops` names a part, `from taps_fast import __version__` the package itself.
            found |= {f"{source}.{alias.name}" if source == "taps_fast" else source for alias in node.names}
    parts = {part_of(name) for name in found if name.split(".")[0] == "taps_fast"}
    return {part if part in MAY_IMPORT else "__init__" for part in parts} - {part_of(module)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_of(path))
def test_arrows(path):
    module = module_of(path)
    part = part_of(module)
    assert part in MAY_IMPORT, f"{part} is not in the map above, nor, it seems, in CONTRIBUTING.md's"
    forbidden = imports_of(ast.parse(path.read_text()), module) - MAY_IMPORT[part]
    assert not forbidden, f"{module} may not import {sorted(forbidden)}"


def test_map_is_about_parts_that_exist():
    assert set(MAY_IMPORT) == {part_of(module_of(path)) for path in SOURCES}


def test_calls_never_lead_back():
    """From the public functions down the map has no circle, and no way up to the layers."""
    seen: list[str] = []

    def visit(part: str, above: tuple[str, ...]) -> None:
        assert part not in above, f"circle: {' -> '.join([*above, part])}"
        if part not in seen:
            for below in sorted(MAY_IMPORT[part]):
                visit(below, (*above, part))
            seen.append(part)

    visit("functional", ())
    assert not {"nn", "model"} & set(seen)


@pytest.mark.parametrize(
    ("module", "line", "part"),
    [
        ("taps_fast.kernels._split", "from taps_fast import reference", "reference"),
        ("taps_fast.kernels._split", "def f():\n    import taps_fast.reference as oracle", "reference"),
        ("taps_fast._aten", "from .kernels._tiles import inside", "kernels"),
        ("taps_fast._problem", "from .nn.linear import FastTapsLinear", "nn"),
        ("taps_fast.nn.linear", "from .. import _autograd", "_autograd"),
        ("taps_fast.nn.__init__", "from .._ops import SCHEMAS", "_ops"),
    ],
)
def test_walker_sees_a_forbidden_import(module, line, part):
    assert imports_of(ast.parse(line), module) == {part}
    assert part not in MAY_IMPORT[part_of(module)]
