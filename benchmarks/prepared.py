"""Where the time of a prepared network in a mixed batch goes, against its base in the same slices and merged networks.

    python -m benchmarks.prepared resnet50 --gates cubs --samples 32
    python -m benchmarks.prepared resnet50 --gates cars --samples 32 --slices 4 6 8 11 16 32

Eight tasks, float32, channels last, norms folded everywhere. First milliseconds of each (medians of interleaved
rounds), then the milliseconds of each kind of operator in one forward, as PyTorch's profiler counts them; what is not
inside an operator is Python.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from .models import NetworkProblem
from .serving import folded
from .timing import keep_memory
from .workloads import Workload

KINDS = {
    "convolutions of the vendor": ("aten::mkldnn_convolution",),
    "rows of delta_linear": ("taps_fast::linear_fwd",),
    "scale, shift, activation": ("taps_fast::scale_shift", "aten::relu", "aten::clamp_min"),
    "residual additions": ("aten::add",),
    "copies: gathers, slices, outputs": ("aten::copy_", "aten::cat", "aten::index", "aten::_index"),
    "pools": ("aten::max_pool2d", "aten::mean"),
}


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if operator.startswith(names)), "other operators")


def medians(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in interleaved rounds after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def profile(run: Callable[[], Tensor]) -> Counter[str]:
    """Milliseconds inside each kind of operator, of one forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        run()
        total = 1e3 * (time.perf_counter() - start)
    spent: Counter[str] = Counter()
    for event in record.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    spent["outside of operators"] = max(total - sum(spent.values()), 0.0)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepared", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", default="resnet50", help="resnet50 or resnet50.112")
    parser.add_argument("--gates", choices=("cubs", "cars"), default="cubs")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--slices", type=int, nargs="*", default=[], help="also in slices of so many images")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keep_memory()
    with torch.no_grad():
        problem = NetworkProblem(Workload(args.network, args.samples, 8, gates=args.gates), "cpu")
        base, networks = folded(problem.base), [folded(network) for network in problem.copies]
        model, ids, images = problem.model, problem.ids, problem.images
        model.prepare_inference(originals="discard")
        model(images, tasks=ids)
        ordered = images[ids.argsort(stable=True)].contiguous(memory_format=torch.channels_last)
        own = ordered.split(args.samples // 8)

        def mixed(size: int) -> Tensor:
            model.slice = size
            found: Tensor = model(images, tasks=ids)
            return found

        def alone(size: int) -> Tensor:
            return torch.cat([base(part) for part in images.split(size)])

        def merged() -> Tensor:
            return torch.cat([network(part) for network, part in zip(networks, own, strict=True)])

        runs: dict[str, Callable[[], Tensor]] = {"8 merged networks in turn": merged}
        for size in dict.fromkeys([args.samples, *args.slices]):
            runs[f"prepared, slices of {size}"] = lambda size=size: mixed(size)  # type: ignore[misc]
            runs[f"base alone, slices of {size}"] = lambda size=size: alone(size)  # type: ignore[misc]
        found = medians(runs, args.rounds)
        floor = found["8 merged networks in turn"]
        for name, ms in found.items():
            print(f"{name:<28} {ms:8.1f} ms   merged / this {floor / ms:5.2f}", flush=True)
        columns = {name: profile(runs[name]) for name in list(runs)[:3]}
        print("\n" + " " * 36 + "  ".join(f"{name:>26}" for name in columns))
        for kind in (*KINDS, "other operators", "outside of operators"):
            print(f"{kind:<36}" + "  ".join(f"{spent[kind]:26.1f}" for spent in columns.values()))


if __name__ == "__main__":
    main()
