"""What is timed: named layers and networks of real models, and how tasks meet them. Data only.

A workload's name says all that defines it, so it can be asked for and found again::

    vit_s.fc1/forward/b8/t8/uniform/open25/float32/cold
    layer     phase   B  T  row mix gates   dtype   weights in memory (cold), in the cache (hot), or a whole network's
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One layer of a real network. ``size``: tokens a sample, or the height and width of its images."""

    op: str
    shape: tuple[int, ...]
    """(O, I), or (O, C / groups, kh, kw)."""
    size: tuple[int, ...] = ()
    conv: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False


def linear(i: int, o: int, tokens: int) -> Layer:
    return Layer("linear", (o, i), (tokens,) if tokens > 1 else ())


def conv2d(c: int, o: int, k: int, size: int, stride: int = 1, groups: int = 1, channels_last: bool = False) -> Layer:
    conv = (("stride", stride), ("padding", k // 2), ("groups", groups))
    return Layer("conv2d", (o, c // groups, k, k), (size, size), conv, channels_last)


def _transformer(name: str, dim: int, tokens: int, *, joint_qkv: bool) -> dict[str, Layer]:
    attention = {"qkv": (dim, 3 * dim), "proj": (dim, dim)} if joint_qkv else {"query": (dim, dim)}
    sizes = attention | {"fc1": (dim, 4 * dim), "fc2": (4 * dim, dim)}
    return {f"{name}.{layer}": linear(i, o, tokens) for layer, (i, o) in sizes.items()}


LAYERS: dict[str, Layer] = {
    **_transformer("vit_s", 384, 197, joint_qkv=True),
    **_transformer("vit_b", 768, 197, joint_qkv=True),
    **_transformer("minilm_l6", 384, 64, joint_qkv=False),
    # A vit_b.fc1 fed row by row: for sweeps over the number of rows.
    "rows.768x3072": linear(768, 3072, 1),
    # So little work that a call's own cost is all there is.
    "call.8x8": linear(8, 8, 1),
    "llama_8b.q": linear(4096, 4096, 1),
    "llama_8b.k": linear(4096, 1024, 1),
    "llama_8b.gate": linear(4096, 14336, 1),
    "llama_8b.down": linear(14336, 4096, 1),
    "resnet50.conv1": conv2d(3, 64, 7, 224, stride=2),
    "resnet50.layer1.3x3": conv2d(64, 64, 3, 56),
    "resnet50.layer1.expand": conv2d(64, 256, 1, 56),
    "resnet50.layer2.3x3": conv2d(128, 128, 3, 28),
    "resnet50.layer3.3x3": conv2d(256, 256, 3, 14),
    "resnet50.layer3.3x3.nhwc": conv2d(256, 256, 3, 14, channels_last=True),
    "resnet50.layer3.expand": conv2d(256, 1024, 1, 14),
    "resnet50.layer4.down": conv2d(1024, 2048, 1, 14, stride=2),
    "resnet50.layer4.3x3": conv2d(512, 512, 3, 7),
    "resnet50.layer4.3x3.nhwc": conv2d(512, 512, 3, 7, channels_last=True),
    "resnet50.layer4.expand": conv2d(512, 2048, 1, 7),
    "efficientnet_b0.stem": conv2d(3, 32, 3, 224, stride=2),
    "efficientnet_b0.depthwise3": conv2d(96, 96, 3, 112, stride=2, groups=96),
    "efficientnet_b0.depthwise5": conv2d(672, 672, 5, 14, groups=672),
    "efficientnet_b0.expand": conv2d(112, 672, 1, 14),
    "efficientnet_b0.project": conv2d(672, 192, 1, 7),
}

# Whole networks, built by benchmarks.networks; norms are networks of one module.
NETWORKS = (
    *("vit_s16", "resnet34", "resnet50", "resnet50.112", "densenet121", "efficientnet_lite0", "tiny"),
    *("batchnorm256", "layernorm384"),
)

# Open convolutions of ResNet-50 in the order of its modules, counted from 0: two tasks read from a published figure
# of TAPS (arXiv 2203.16708). Even tasks of a workload with gates "taps" are like CUBS, odd ones like Cars; with gates
# "cubs" or "cars" all are alike.
GATE_PATTERNS = {
    "cubs": (25, 26, 27, 40, 43, 44, 45, 46, 47, 48, 49, 51, 52),
    "cars": (44, 45, 46, 49, 52),
}
PATTERN_LAYERS = 53

MIXES = ("identical", "uniform", "zipf", "distinct")
PHASES = ("forward", "train")


@dataclass(frozen=True)
class Workload:
    """One cell of the tables."""

    layer: str
    """A name of `LAYERS` or `NETWORKS`."""
    samples: int
    tasks: int | None = 1
    """T; None: one weight for all rows, summed from ``deltas`` deltas (model merging)."""
    mix: str = "uniform"
    gates: int | str = 25
    """Per cent of the tasks whose gate is open, or "taps", "cubs", "cars": the published patterns (networks only)."""
    dtype: str = "float32"
    phase: str = "forward"
    cold: bool = True
    deltas: int = 8
    memory: bool = False
    """Whether the peak memory of a process of its own is measured too."""

    @property
    def name(self) -> str:
        tasks = f"k{self.deltas}/all" if self.tasks is None else f"t{self.tasks}/{self.mix}"
        gates = f"open{self.gates}" if isinstance(self.gates, int) else self.gates
        heat = "whole" if self.op == "network" else "cold" if self.cold else "hot"
        return f"{self.layer}/{self.phase}/b{self.samples}/{tasks}/{gates}/{self.dtype}/{heat}"

    @property
    def op(self) -> str:
        return "network" if self.layer in NETWORKS else LAYERS[self.layer].op

    @property
    def rows(self) -> int:
        """Rows of a linear layer; elsewhere, samples."""
        return self.samples * math.prod(LAYERS[self.layer].size) if self.op == "linear" else self.samples

    def ids(self) -> list[int]:
        """The task of each sample. Seeded: the same in every process."""
        assert self.tasks is not None
        draw = random.Random(self.name)
        if self.mix == "identical":
            return [0] * self.samples
        if self.mix == "zipf":
            weights = [rank**-1.5 for rank in range(1, self.tasks + 1)]
            return draw.choices(range(self.tasks), weights, k=self.samples)
        if self.mix == "distinct" and self.tasks < self.samples:
            raise ValueError(f"{self.name}: a distinct mix must have a task a sample, got {self.tasks} tasks")
        ids = [i % self.tasks for i in range(self.samples)]
        draw.shuffle(ids)
        return ids

    def open_tasks(self) -> list[int]:
        """Tasks whose gate is open in this layer, spread evenly; at least one unless the share is 0."""
        if self.tasks is None or not isinstance(self.gates, int):
            return list(range(self.tasks or 0))
        count = math.ceil(self.tasks * self.gates / 100)
        return [i * self.tasks // count for i in range(count)]


def open_layers(task: int, layers: int, gates: str = "taps") -> set[int]:
    """The layers that ``task`` opens in a network of ``layers``, in the place that the published patterns open."""
    pattern = GATE_PATTERNS[gates if gates != "taps" else "cars" if task % 2 else "cubs"]
    return {i * layers // PATTERN_LAYERS for i in pattern}


def _linear() -> Iterator[Workload]:
    """Each projection of three encoders."""
    for layer in LAYERS:
        if layer.startswith(("vit_s.", "vit_b.", "minilm_l6.")):
            for tasks in (1, 2, 8, 32):
                yield Workload(layer, max(8, tasks), tasks)


def _rows() -> Iterator[Workload]:
    """Rows x tasks, for the picture of where mixing pays."""
    for gates in (25, 100):
        for samples in (1, 8, 64, 512, 4096):
            for tasks in (1, 2, 8, 32):
                if tasks <= samples:
                    yield Workload("rows.768x3072", samples, tasks, gates=gates)


def _mixes() -> Iterator[Workload]:
    """Row mixes, shares of open gates, low precision, and weights that stay in the cache."""
    one = Workload("vit_s.fc1", 32, 32)
    for mix in MIXES:
        yield replace(one, mix=mix)
        yield replace(one, layer="rows.768x3072", mix=mix)
    for layer in ("vit_s.fc1", "vit_b.qkv"):
        for gates in (0, 25, 100):
            yield Workload(layer, 8, 8, gates=gates)
    for layer in ("vit_s.fc1", "vit_b.fc1"):
        for tasks in (1, 8):
            yield Workload(layer, 8, tasks, dtype="bfloat16")
            yield Workload(layer, 8, tasks, cold=False)


def _decode() -> Iterator[Workload]:
    """One token of each sequence: bytes decide."""
    for layer in ("llama_8b.q", "llama_8b.k", "llama_8b.gate", "llama_8b.down"):
        for samples, tasks in ((1, 1), (8, 8)):
            yield Workload(layer, samples, tasks, dtype="bfloat16")
    for samples, tasks in ((1, 1), (8, 8), (32, 8)):
        yield Workload("llama_8b.q", samples, tasks)


def _conv2d() -> Iterator[Workload]:
    """Convolutions of ResNet-50 and EfficientNet-B0."""
    for layer in LAYERS:
        if layer.startswith(("resnet50.", "efficientnet_b0.")):
            for tasks in (1, 8):
                yield Workload(layer, 8, tasks)


def _overhead() -> Iterator[Workload]:
    """What a call costs before any work."""
    for tasks in (1, 8):
        yield Workload("call.8x8", 8, tasks, gates=100, cold=False)
    yield Workload("call.8x8", 8, None, cold=False, deltas=1)
    yield Workload("call.8x8", 8, 1, gates=100, phase="train", cold=False)


def _train() -> Iterator[Workload]:
    """Forward and backward of one layer: gradients of x, of the open deltas and of every gate."""
    for layer in ("vit_s.qkv", "vit_s.fc1", "vit_b.fc1"):
        for tasks, gates in ((1, 100), (8, 100), (8, 25)):
            yield Workload(layer, 8, tasks, gates=gates, phase="train", memory=layer == "vit_b.fc1")
    for layer in ("resnet50.layer3.3x3", "resnet50.layer4.3x3"):
        for tasks in (1, 8):
            yield Workload(layer, 8, tasks, gates=100, phase="train")


def _merging() -> Iterator[Workload]:
    """K deltas for every row, and the gradient of their coefficients."""
    for layer in ("vit_s.fc1", "vit_b.fc1"):
        yield Workload(layer, 16, None, phase="forward")
        yield Workload(layer, 16, None, phase="train")


def _norms() -> Iterator[Workload]:
    for layer in ("batchnorm256", "layernorm384"):
        yield Workload(layer, 8, 8, gates=0)


def _serve() -> Iterator[Workload]:
    """Whole networks: a mixed batch of T tasks."""
    for layer in ("vit_s16", "resnet50"):
        for tasks in (1, 2, 8, 32):
            yield Workload(layer, max(8, tasks), tasks, gates="taps", memory=True)
        yield Workload(layer, 32, 8, gates="taps", memory=True)
        yield Workload(layer, 8, 8, gates=100, memory=True)


def _prepared() -> Iterator[Workload]:
    """ResNet-50 prepared for inference, 8 tasks with the same published pattern, few images of each."""
    for gates in ("cubs", "cars"):
        for layer in ("resnet50.112", "resnet50"):
            for samples in (8, 32):
                yield Workload(layer, samples, 8, gates=gates)


def _learn() -> Iterator[Workload]:
    """Whole networks: one training step of one task."""
    for layer in ("vit_s16", "resnet50"):
        for gates in ("taps", 100):
            yield Workload(layer, 8, 1, gates=gates, phase="train", memory=True)


def _scaling() -> Iterator[Workload]:
    """Tasks 1 to 64 at a fixed batch, gates closed and open."""
    for tasks in (1, 2, 4, 8, 16, 32, 64):
        for gates in (0, 100):
            yield Workload("rows.768x3072", 64, tasks, gates=gates, memory=True)
        yield Workload("vit_s16", 8, tasks, gates=0, memory=True)


def _quick() -> Iterator[Workload]:
    """A taste of every suite."""
    yield Workload("vit_s.fc1", 8, 8)
    for hot in (
        Workload("vit_s.fc1", 2, 1),
        Workload("rows.768x3072", 8, 8, gates=100),
        Workload("rows.768x3072", 64, 8, gates=0, memory=True),
        Workload("vit_s.fc1", 8, 8, dtype="bfloat16"),
        Workload("resnet50.layer4.3x3", 8, 8),
        Workload("resnet50.layer3.expand", 8, 1),
        Workload("vit_s.proj", 4, 2, gates=100, phase="train", memory=True),
        Workload("vit_s.proj", 4, None, phase="train"),
    ):
        yield replace(hot, cold=False)
    yield Workload("batchnorm256", 8, 8, gates=0)
    yield Workload("tiny", 8, 8, gates="taps")
    yield Workload("tiny", 8, 1, gates=100, phase="train")


def _gpu() -> Iterator[Workload]:
    """What a GPU lent for minutes has time for, the most telling first: few rows, many rows, training, float32."""
    for samples, tasks in ((8, 8), (64, 8), (1, 1), (512, 8), (64, 1), (32, 32), (512, 1), (4096, 8), (4096, 1)):
        yield Workload("llama_8b.q", samples, tasks, gates=100, dtype="bfloat16")
    for tasks, phase in ((1, "train"), (8, "train"), (8, "forward")):
        yield Workload("vit_b.fc1", 8, tasks, gates=100, dtype="bfloat16", phase=phase)
    for phase in PHASES:
        yield Workload("vit_b.fc1", 16, None, dtype="bfloat16", phase=phase)
    for samples, tasks in ((8, 8), (512, 1), (64, 8), (4096, 1), (512, 8)):
        yield Workload("rows.768x3072", samples, tasks, gates=100)
    for layer in ("resnet50.layer3.3x3.nhwc", "resnet50.layer4.3x3.nhwc"):
        yield Workload(layer, 8, 8, gates=100, dtype="bfloat16")
    for samples, tasks in ((8, 8), (64, 8)):
        yield Workload("llama_8b.down", samples, tasks, dtype="bfloat16")


SUITES = {
    "linear": _linear,
    "rows": _rows,
    "mixes": _mixes,
    "decode": _decode,
    "conv2d": _conv2d,
    "overhead": _overhead,
    "train": _train,
    "merging": _merging,
    "norms": _norms,
    "serve": _serve,
    "prepared": _prepared,
    "learn": _learn,
    "scaling": _scaling,
    "quick": _quick,
    "gpu": _gpu,
}
SELECTIONS = ("quick", "gpu")
"""Suites that are a choice from what the others show."""


class UnknownName(ValueError):
    """A workload, provider, results file or table that does not exist; the text lists those that do."""


def unknown(what: str, got: str, known: Iterable[str]) -> UnknownName:
    listed = sorted(set(known))
    near = difflib.get_close_matches(got, listed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UnknownName(f"unknown {what} {got!r}{hint}; known: {', '.join(listed)}")


def workloads(patterns: Sequence[str] = ()) -> list[Workload]:
    """The workloads named: suites, layers, or shell patterns of names; without any, every suite but `SELECTIONS`.

    Raises:
        UnknownName: a pattern that fits none.
    """
    full = [w for name, suite in SUITES.items() if name not in SELECTIONS for w in suite()]
    everything = full + [w for name in SELECTIONS for w in SUITES[name]()]
    chosen: list[Workload] = [] if patterns else full
    for pattern in patterns:
        if pattern in SUITES:
            found = list(SUITES[pattern]())
        else:
            found = [w for w in everything if pattern in (w.layer, w.name) or fnmatch.fnmatchcase(w.name, pattern)]
        if not found:
            raise unknown("workload", pattern, [*SUITES, *LAYERS, *NETWORKS])
        chosen += found
    once: dict[str, Workload] = {}
    for w in chosen:
        # The same cell in two suites is measured once, with memory if either asks for it.
        once[w.name] = replace(w, memory=w.memory or (w.name in once and once[w.name].memory))
    return list(once.values())
