"""One step of layer-wise AdaMerging: ours against the two ways in which it is written, checked, timed and weighed.

    python -m benchmarks.merging [--deltas 8] [--images 1 4] [--sizes 224 64] [--seconds 10] [--no-memory] [--no-times]

A step is what changes the coefficients once: fold, forward of every task's images, entropy, backward to the
coefficients of all tensors and tasks. The network is a ViT-S/16 with random weights, 10 classes a task. The first table
is of the merging alone: fold, and the coefficients' gradients for weight gradients that are there already.

    ours, whole     `MergedModel`: one fold, one mixed batch of all tasks, one gradient of all coefficients
    ours, layer     the same; Linear and Conv2d layers sum their own deltas and store no weight
    chain           fusion_bench's: K sums a tensor in autograd, one task after the other, backward of each with
                    retain_graph
    chain, summed   the same with the losses summed and one backward
    matvec          W + (c @ D).view_as(W) with the deltas of a tensor as one matrix; losses summed, one backward
    network         forward and backward of the base alone with the gradients of all its weights, as one batch: what a
                    step takes without merging

`time / network` says how much is left to gain: nobody can be faster than the network. The gradients of all must agree
before anything is timed. Rounds interleave; a time is the median. Memory is counted twice: the tensors that live at
once, by the allocator's record, and the resident peak of a process of its own, where the heap's freed blocks count too.
`activations` are the tensors of a step of the layer route with one delta and as many images. The aim is base, deltas,
activations and one layer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taps_fast.merging import MergedModel, TaskVectors, entropy

from .networks import ViT
from .timing import Call, allocated_peak, keep_memory, measure, peak_bytes

CLASSES = 10


def problem(num_deltas: int, images: int, size: int) -> tuple[nn.Module, TaskVectors, dict[str, Tensor]]:
    """The network, K random deltas, and each task's images."""
    torch.manual_seed(0)
    model = ViT(384, 12, 6, image=size).eval().requires_grad_(False)
    base = {name: t for name, t in model.state_dict().items() if not name.startswith("head")}
    tasks = [f"task{k}" for k in range(num_deltas)]
    deltas = {name: [torch.randn_like(t) * 2e-3 for _ in tasks] for name, t in base.items()}
    heads = {
        task: {"head.weight": torch.randn(CLASSES, 384) * 0.05, "head.bias": torch.zeros(CLASSES)} for task in tasks
    }
    return model, TaskVectors(base, deltas, tasks, heads), {task: torch.randn(images, 3, size, size) for task in tasks}


def ours(route: str, num_deltas: int, images: int, size: int, tasks: int | None = None) -> Call:
    model, vectors, inputs = problem(num_deltas, images, size)
    if tasks is not None:  # as many images as with K deltas
        inputs = {"task0": torch.cat([inputs["task0"]] * tasks)}
    merged = MergedModel(model, vectors, head="head", route=route)

    def step() -> Tensor:
        merged.coeffs.grad = None
        sum(entropy(y) for y in merged.each(inputs).values()).backward()
        return merged.coeffs.grad

    return step


def summed(names: list[str], base: dict[str, Tensor], deltas: list[list[Tensor]], c: Tensor) -> dict[str, Tensor]:
    merged = {}
    for l, name in enumerate(names):
        weight = base[name]
        for k, delta in enumerate(deltas[l]):
            weight = weight + c[l, k] * delta
        merged[name] = weight
    return merged


def multiplied(names: list[str], base: dict[str, Tensor], deltas: list[Tensor], c: Tensor) -> dict[str, Tensor]:
    return {name: base[name] + (c[l] @ deltas[l]).view_as(base[name]) for l, name in enumerate(names)}


def rival(way: str, num_deltas: int, images: int, size: int) -> Call:
    model, vectors, inputs = problem(num_deltas, images, size)
    names, base = vectors.names, vectors.base
    form = summed
    stored = list(vectors.deltas.values())
    if way == "matvec":
        form, stored = multiplied, [torch.stack([d.flatten() for d in each]) for each in stored]
    model.head = nn.Identity()
    own, tasks = vectors.own, vectors.tasks
    vectors.deltas.clear()
    del vectors
    coeffs = torch.full((len(names), num_deltas), 0.3, requires_grad=True)

    def step() -> Tensor:
        coeffs.grad = None
        weights = form(names, base, stored, coeffs.clamp(0, 1))
        losses = []
        for task in tasks:
            logits = nn.functional.linear(functional_call(model, weights, inputs[task]), *own[task].values())
            losses.append(entropy(logits))
            if way == "chain":
                losses.pop().backward(retain_graph=True)
        if losses:
            sum(losses).backward()
        return coeffs.grad

    return step


def network(num_deltas: int, images: int, size: int) -> Call:
    model, _, inputs = problem(num_deltas, images, size)
    batch = torch.cat(list(inputs.values()))
    model.requires_grad_()

    def step() -> None:
        model.zero_grad()
        entropy(model(batch)).backward()

    return step


def alone(num_deltas: int) -> dict[str, Call]:
    """Fold, and the coefficients' gradients from given weight gradients; the chain's once for each task."""
    _, vectors, _ = problem(num_deltas, 1, 224)
    names, base, stored = vectors.names, vectors.base, list(vectors.deltas.values())
    flat = [torch.stack([d.flatten() for d in each]) for each in stored]
    dweights = [torch.randn_like(base[name]) for name in names]
    coeffs = torch.full((len(names), num_deltas), 0.3, requires_grad=True)

    def step(form: Callable[..., dict[str, Tensor]], backwards: int = 1) -> Tensor:
        weights = list(form(coeffs.clamp(0, 1)).values())
        for _ in range(backwards):
            (found,) = torch.autograd.grad(weights, coeffs, dweights, retain_graph=backwards > 1)
        return found

    chain = functools.partial(summed, names, base, stored)
    return {
        "ours": functools.partial(step, vectors.fold),
        "chain": functools.partial(step, chain, num_deltas),
        "chain, summed": functools.partial(step, chain),
        "matvec": functools.partial(step, functools.partial(multiplied, names, base, flat)),
    }


def contenders(num_deltas: int, images: int, size: int) -> dict[str, Callable[[], Call]]:
    return {
        "ours, whole": functools.partial(ours, "whole", num_deltas, images, size),
        "ours, layer": functools.partial(ours, "layer", num_deltas, images, size),
        "chain": functools.partial(rival, "chain", num_deltas, images, size),
        "chain, summed": functools.partial(rival, "chain, summed", num_deltas, images, size),
        "matvec": functools.partial(rival, "matvec", num_deltas, images, size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merging", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deltas", type=int, default=8)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="of each task")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 64], help="pixels a side")
    parser.add_argument("--seconds", type=float, default=10, help="that one contender may take")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    args = parser.parse_args()
    k = args.deltas
    keep_memory()
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{where}, ViT-S/16, K = {k}")
    if not args.no_times:
        race("merging alone", alone(k), "ours", args.seconds)
        for size in args.sizes:
            for images in args.images:
                built = {name: build() for name, build in contenders(k, images, size).items()}
                title = f"step, {size} pixels, {images} image(s) a task"
                race(title, built, "ours, whole", args.seconds, network(k, images, size))
                del built
    if not args.no_memory:
        memory(k, args.images[0], args.sizes[0])


def race(title: str, built: dict[str, Call], mine: str, seconds: float, limit: Call | None = None) -> None:
    wanted = built["chain"]().clone()
    for name, step in built.items():
        error = float((step() - wanted).abs().max() / wanted.abs().max())
        if not error < 1e-4:
            raise SystemExit(f"{name}: wrong gradient, relative error {error:.2e}")
    if limit is not None:
        built = built | {"network": limit}
    times = measure({name: [step] for name, step in built.items()}, seconds, "cpu")
    print(f"\n{title}\n{'':<20}      ms     p20     p80   time / {mine}{'   time / network' if limit else ''}")
    for name, stats in times.items():
        line = (
            f"  {name:<18}{stats.median:8.0f}{stats.p20:8.0f}{stats.p80:8.0f}{stats.median / times[mine].median:8.2f}"
        )
        print(line + (f"{stats.median / times['network'].median:18.2f}" if limit else ""), flush=True)


def memory(num_deltas: int, images: int, size: int) -> None:
    model, vectors, _ = problem(num_deltas, 1, size)
    stored = (num_deltas + 1) * sum(t.nbytes for t in vectors.base.values())
    layer = max(t.nbytes for t in vectors.base.values())
    del model, vectors
    activations = allocated_peak(ours("layer", 1, images, size, num_deltas))
    aim = stored + activations + layer
    print(f"\nmemory, {size} pixels, {images} image(s) a task, MiB: base + {num_deltas} deltas {stored / 2**20:.0f}")
    print(f"aim: these + activations {activations / 2**20:.1f} + one layer {layer / 2**20:.1f} = {aim / 2**20:.1f}")
    print(f"{'':<20}  tensors   beyond base, deltas, activations   within the aim   resident")
    for name, build in contenders(num_deltas, images, size).items():
        tensors = stored + allocated_peak(build())
        line = f"  {name:<18}{tensors / 2**20:9.1f}{(tensors - stored - activations) / 2**20:35.1f}"
        resident = peak_bytes(build.func, *build.args, device="cpu")
        answer = "yes" if tensors <= aim else "no"
        print(f"{line}{answer:>17}{'?' if resident is None else f'{resident / 2**20:.0f}':>11}", flush=True)


if __name__ == "__main__":
    main()
