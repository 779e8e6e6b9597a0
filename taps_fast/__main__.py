"""The command line: ``python -m taps_fast info | demo | train | inspect | bench``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import safetensors
import torch

from . import __version__, _dispatch, store
from ._command import UserError
from ._problem import Problem
from ._slices import gives_memory_back
from .sharing import Sharing, readable_bytes

EXAMPLES = (
    ("a layer of a vision transformer, 16 images of 4 tasks", "linear", (3072, 768), 16 * 197),
    ("the same layer, one row a task", "linear", (3072, 768), 4),
    ("a 3x3 convolution, 16 images of 4 tasks", "conv2d", (256, 256, 3, 3), 16),
)

GIVES_BACK = (
    "gives large freed blocks back to the system, so that networks with large activations wait for new ones on a CPU; "
    "LD_PRELOAD=libtcmalloc_minimal.so.4, or with glibc MALLOC_MMAP_THRESHOLD_=1073741824 "
    "MALLOC_TRIM_THRESHOLD_=4294967296, keeps them"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0: it did its work, 2: the input was wrong, 130: it was interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m taps_fast", description="Gated base-plus-delta layers (TAPS): one network, many tasks."
    )
    parser.add_argument("--version", action="version", version=f"taps_fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="what this machine can run, and how to get what is missing")
    info.set_defaults(run=_info)

    for name, module_name, help in (
        ("demo", "taps_fast.demo", "train four tasks on one pretrained network, then run a mixed batch"),
        ("train", "taps_fast.train.command", "train a task on your images and any backbone; go on after a kill"),
    ):
        command = commands.add_parser(name, help=help)
        if arguments[:1] == [name]:  # its imports are its own
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)

    inspect = commands.add_parser(
        "inspect",
        help="what task folders hold and share",
        description="Verifies task folders and prints their layer x task table. The model is not needed. Tasks of one "
        "name are called by their folders.",
    )
    inspect.add_argument("folders", nargs="+", metavar="FOLDER", help="written by TapsModel.save_task")
    inspect.add_argument("--plot", metavar="FILE", help="also draw the table, e.g. sharing.png (needs matplotlib)")
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser("bench", help="time it beside what PyTorch offers; needs a checkout")
    try:
        if arguments[:1] == ["bench"]:
            module = _benchmarks()
            module.add_arguments(bench)
            bench.set_defaults(run=module.run)
        chosen = parser.parse_args(arguments)
        code = chosen.run(chosen) or 0
        sys.stdout.flush()  # what cannot be written is found here, where it is handled
        return code
    except (store.TaskFolderError, UserError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _benchmarks() -> ModuleType:
    """The checkout's ``benchmarks.run``: the one this package lies in, or the one of the current folder."""
    for checkout in (Path(__file__).parents[1], Path.cwd()):
        if (checkout / "benchmarks" / "run.py").is_file():
            sys.path.insert(0, str(checkout))
            return importlib.import_module("benchmarks.run")
    raise UserError(
        "bench: the benchmarks are in the source checkout, not in the package; get it (git clone), "
        "and there run make bench, or this command"
    )


def _info(_: argparse.Namespace) -> None:
    print(f"taps_fast {__version__} in {Path(__file__).parent}")
    print(
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"safetensors {safetensors.__version__}"
    )
    print(_dispatch.describe_machine())
    print(f"memory: the C library {GIVES_BACK if gives_memory_back() else 'keeps what is freed'}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print("\nWhat runs by default (->), what can be asked for (yes), what cannot and why (no):")
    for title, op, shape, rows in EXAMPLES:
        for device in devices:
            problem = Problem(op, device, torch.float32, shape, rows, num_deltas=4, num_tasks=4, grad=False)
            print(f"\n{title}\n{_dispatch.explain(problem)}")


def _inspect(chosen: argparse.Namespace) -> None:
    parts: list[Sharing] = []
    first: tuple[str, str] | None = None
    for folder in chosen.folders:
        tensors, meta = store.read_task(folder)
        base = meta["fingerprint"]
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        head = meta.get("head") or {}
        classes = f"{head['classes']} classes, " if "classes" in head else ""
        print(
            f"{folder}: task {meta['task']!r}, {classes}{len(tensors)} tensors, {readable_bytes(size)}, "
            f"base {base}, saved by {meta['library']}"
        )
        first = first or (folder, base)
        if base != first[1]:
            raise UserError(
                f"inspect: folders must be of one base, got {first[0]} of {first[1]} and {folder} of {base}"
            )
        try:
            parts.append(Sharing.from_dict(meta["sharing"]))
        except ValueError as error:
            raise UserError(f"inspect: {folder}: {error}") from None
    try:
        sharing = Sharing.join(_told_apart(chosen.folders, parts))
    except ValueError as error:
        raise UserError(f"inspect: {error}") from None
    print(f"\n{sharing}")
    if chosen.plot is not None:
        try:
            sharing.plot(chosen.plot)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"inspect: {error}") from None
        print(f"\ndrawn to {chosen.plot}")


def _told_apart(folders: Sequence[str], parts: Sequence[Sharing]) -> Sequence[Sharing]:
    """The reports, with tasks of one name, such as those of a sweep, called by what of their folders' paths differs."""
    counts = Counter(task for part in parts for task in part.tasks)
    paths = [Path(folder).resolve().parts for folder in folders]
    alike = [path for path, part in zip(paths, parts, strict=True) if any(counts[task] > 1 for task in part.tasks)]
    if not alike or len(set(alike)) < len(alike):  # one folder twice is refused by name
        return parts
    most = next(n for n in itertools.count(1) if len({path[-n:] for path in alike}) == len(alike))
    same = next(n for n in range(most) if len({path[-1 - n] for path in alike}) > 1)
    return [
        part.renamed({task: "/".join(path[-most : len(path) - same]) for task in part.tasks if counts[task] > 1})
        for path, part in zip(paths, parts, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
