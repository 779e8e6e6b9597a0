"""Convolutions and norms in mixed batches on the CPU, against the base alone and against merged layers in turn.

    python -m benchmarks.mixed_conv conv --images 1 4 --size 112 --net resnet50 efficientnet_lite0
    python -m benchmarks.mixed_conv norm

Eight tasks, float32, channels last. Each layer is timed with all gates closed and with all gates open; a line gives
milliseconds for the base on all images (one convolution), then the time of others over it: the merged layers of the
tasks in turn, and delta_conv2d with each backend. Norms are timed in chains, against the same chain without tasks.
Rounds interleave; numbers are medians.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_fast import TapsModel, delta_conv2d
from taps_fast._dispatch import BackendError
from taps_fast.tasks import TaskBatch

from . import timing

TASKS = 8
# name: C, O, kernel, stride, groups, pixels along a side of an image of 224
LAYERS = {
    "resnet50": {
        "layer1.reduce": (256, 64, 1, 1, 1, 56),
        "layer1.3x3": (64, 64, 3, 1, 1, 56),
        "layer1.expand": (64, 256, 1, 1, 1, 56),
        "layer2.3x3": (128, 128, 3, 1, 1, 28),
        "layer2.expand": (128, 512, 1, 1, 1, 28),
        "layer3.reduce": (1024, 256, 1, 1, 1, 14),
        "layer3.3x3": (256, 256, 3, 1, 1, 14),
        "layer3.expand": (256, 1024, 1, 1, 1, 14),
        "layer4.down": (1024, 2048, 1, 2, 1, 14),
        "layer4.3x3": (512, 512, 3, 1, 1, 7),
        "layer4.expand": (512, 2048, 1, 1, 1, 7),
    },
    "efficientnet_lite0": {
        "expand.56": (24, 144, 1, 1, 1, 56),
        "depthwise3.56": (144, 144, 3, 1, 144, 56),
        "depthwise5.28": (240, 240, 5, 1, 240, 28),
        "project.28": (240, 40, 1, 1, 1, 28),
        "depthwise5.14": (480, 480, 5, 1, 480, 14),
        "expand.14": (112, 672, 1, 1, 1, 14),
        "depthwise5.down": (672, 672, 5, 2, 672, 14),
        "expand.7": (192, 1152, 1, 1, 1, 7),
        "depthwise5.7": (1152, 1152, 5, 1, 1152, 7),
        "project.7": (1152, 320, 1, 1, 1, 7),
    },
}


def medians(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of each, in interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(found.values()))) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def conv(net: str, images: int, size: int, seconds: float, pattern: str) -> None:
    for name, (c, o, kernel, stride, groups, side) in LAYERS[net].items():
        if pattern not in name:
            continue
        side = max(1, side * size // 224)
        ids = torch.arange(TASKS * images) % TASKS
        x = torch.randn(len(ids), c, side, side).to(memory_format=torch.channels_last)
        base, *deltas = (
            (torch.randn(o, c // groups, kernel, kernel) * (kernel * kernel * c // groups) ** -0.5).to(
                memory_format=torch.channels_last
            )
            for _ in range(TASKS + 1)
        )
        options = dict(stride=stride, padding=kernel // 2, groups=groups)
        mine = [x[ids == t].contiguous(memory_format=torch.channels_last) for t in range(TASKS)]
        merged = [base + delta for delta in deltas]
        batch = TaskBatch.from_ids(ids, TASKS)
        want = torch.empty_like(F.conv2d(x, base, **options))
        for t in range(TASKS):
            want[ids == t] = F.conv2d(mine[t], merged[t], **options)
        for state, coeffs in (("closed", torch.zeros(TASKS, TASKS)), ("open", torch.eye(TASKS))):
            runs: dict[str, Callable[[], object]] = {
                "base": functools.partial(F.conv2d, x, base, **options),
                "merged": lambda mine=mine, merged=merged, options=options: [
                    F.conv2d(i, w, **options) for i, w in zip(mine, merged, strict=True)
                ],
            }
            for backend in (None, "cpu", "linear", "aten"):
                call = functools.partial(delta_conv2d, x, base, deltas, coeffs, tasks=batch, backend=backend, **options)
                try:
                    y = call()
                except BackendError:
                    continue
                if state == "open":
                    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
                runs[backend or "auto"] = call
            found = medians(runs, seconds)
            floor = found.pop("base")
            ratios = "  ".join(f"{run} {ms / floor:5.2f}" for run, ms in found.items())
            print(f"{net}.{name:<16} {TASKS} x {images}, {size}  {state:<6} base {floor:7.3f} ms  {ratios}", flush=True)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm2d": (lambda: nn.BatchNorm2d(64), (64, 56, 56)),
    "BatchNorm2d.28": (lambda: nn.BatchNorm2d(256), (256, 28, 28)),
    "BatchNorm2d.14": (lambda: nn.BatchNorm2d(256), (256, 14, 14)),
    "BatchNorm2d.7": (lambda: nn.BatchNorm2d(256), (256, 7, 7)),
    "LayerNorm.384": (lambda: nn.LayerNorm(384), (197, 384)),
    "LayerNorm.768": (lambda: nn.LayerNorm(768), (197, 768)),
    "RMSNorm.768": (lambda: nn.RMSNorm(768), (197, 768)),
    "GroupNorm.28": (lambda: nn.GroupNorm(32, 256), (256, 28, 28)),
    "GroupNorm.14": (lambda: nn.GroupNorm(32, 256), (256, 14, 14)),
}
CHAIN = 8
"""Norms in a row, so that what a network's forward costs once is shared, as in a network."""


def norm(seconds: float, images_a_task: list[int], pattern: str) -> None:
    for name, (make, shape) in NORMS.items():
        for images, training in itertools.product(images_a_task, (False, True)):
            if pattern not in name:
                continue
            x = torch.randn(TASKS * images, *shape)
            if len(shape) == 3:
                x = x.to(memory_format=torch.channels_last)
            plain = nn.Sequential(*[make() for _ in range(CHAIN)]).train(training)
            model = TapsModel(copy.deepcopy(plain), [str(t) for t in range(TASKS)], slice=None).train(training)
            batch = TaskBatch.from_ids(torch.arange(len(x)) % TASKS, TASKS)

            def run(module: nn.Module, x: Tensor = x, training: bool = training, **kwargs: object) -> None:
                with torch.set_grad_enabled(training):
                    y = module(x.detach().requires_grad_(training), **kwargs)
                if training:
                    y.backward(x)

            runs = {"plain": functools.partial(run, plain), "mixed": functools.partial(run, model, tasks=batch)}
            found = medians(runs, seconds)
            print(
                f"{name:<15} {TASKS} x {images}  {'train' if training else 'eval ':<5}  "
                f"plain {found['plain'] / CHAIN:7.3f} ms  mixed {found['mixed'] / found['plain']:5.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed_conv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("conv", "norm"))
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4], help="of each task")
    parser.add_argument("--size", nargs="+", type=int, default=[112, 224])
    parser.add_argument("--net", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--layer", default="", help="part of a layer's or norm's name")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each cell")
    args = parser.parse_args()
    torch.manual_seed(0)
    timing.keep_memory()
    with torch.inference_mode(args.what == "conv"):
        if args.what == "norm":
            norm(args.seconds, args.images, args.layer)
        else:
            for net in args.net:
                for images in args.images:
                    for size in args.size:
                        conv(net, images, size, args.seconds, args.layer)


if __name__ == "__main__":
    main()
