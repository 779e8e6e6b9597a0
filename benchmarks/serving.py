"""Providers of whole networks: what serves a mixed batch of T tasks, and what trains one task."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import optimization

from taps_fast import testing

from .models import Materialised, NetworkProblem, learned
from .networks import NETWORKS
from .providers import Ready, installed, provider
from .results import CHECKOUT
from .workloads import Workload


def network(name: str, kind: str, phase: str, **options: object) -> Callable:
    """Registers a network provider: a function from a problem to its forward and the modules it keeps."""

    def decorate(make: Callable[[NetworkProblem], tuple[Callable[[], Tensor], Sequence[nn.Module]]]) -> Callable:
        def build(p: NetworkProblem) -> Ready:
            forward, modules = make(p)
            check = (lambda: None) if kind == "floor" else (lambda: p.check({"y": forward()}))
            return Ready(forward, [t for m in modules for t in (*m.parameters(), *m.buffers())], check)

        provider(name, kind, ("network",), phase=phase, **options)(build)
        return make

    return decorate


def _in_turn(p: NetworkProblem, call: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``call(task, its images)`` for each task present, put together in the order of the images."""
    groups = p.groups()
    if len(groups) == 1:
        return call(groups[0][0], p.images)
    y = None
    for task, rows in groups:
        part = call(task, p.images[rows])
        y = part.new_empty(len(p.images), *part.shape[1:]) if y is None else y
        y[rows] = part
    return y


@network("taps_fast", "ours", "forward")
def _ours(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    model, ids = p.model, p.ids
    model(p.images, tasks=ids)  # finds the batch axes, once
    return lambda: model(p.images, tasks=ids), [model]


@network("taps_fast-prepared", "ours", "forward", only=lambda workload: not _is_norm(workload))
def _ours_prepared(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    model, ids = copy.deepcopy(p.model), p.ids  # others run it as it is
    model.prepare_inference(originals="discard")
    model(p.images, tasks=ids)  # verifies what it folded, and finds the batch axes, once
    return lambda: model(p.images, tasks=ids), [model]


# Compiling a network takes longer than all else about it, and mapping one as long as serving all its copies.
_ONCE = {
    "only": lambda workload: workload.samples == workload.tasks == 8 and workload.gates == "taps",
    "quick": False,
    "memory": False,
}


@network("taps_fast-compiled", "ours", "forward", **_ONCE)
def _ours_compiled(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    _ours(p)
    compiled, ids = torch.compile(p.model), p.ids
    return lambda: compiled(p.images, tasks=ids), [p.model]


@network("merged-copies", "merged", "forward")
def _copies(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """One merged network a task, called in turn: what users do."""
    networks = p.copies
    return lambda: _in_turn(p, lambda task, images: networks[task](images)), networks


@network("merged-copies-folded", "merged", "forward", only=lambda workload: _folds(workload.layer))
def _copies_folded(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """The same, each batch norm that follows a convolution folded into its weight."""
    networks = [folded(network) for network in p.copies]
    return lambda: _in_turn(p, lambda task, images: networks[task](images)), networks


@network("merged-copies-compiled", "merged", "forward", **_ONCE)
def _copies_compiled(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """The same, compiled once for all: the weights are its inputs."""
    networks = p.copies
    state = [dict(n.named_parameters()) | dict(n.named_buffers()) for n in networks]
    one = torch.compile(lambda weights, images: torch.func.functional_call(networks[0], weights, (images,)))
    return lambda: _in_turn(p, lambda task, images: one(state[task], images)), networks


@network("merged-vmap", "merged", "forward", **_ONCE)
def _vmap(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """All networks stacked and mapped at once, where every task has equally many samples."""
    tasks = p.workload.tasks
    if len(set(p.ids.bincount(minlength=tasks).tolist())) > 1:
        raise NotImplementedError("needs as many samples of each task")
    state = torch.func.stack_module_state(p.copies)
    bare = copy.deepcopy(p.copies[0]).to("meta")
    mapped = torch.vmap(lambda w, b, images: torch.func.functional_call(bare, (w, b), (images,)))

    def forward() -> Tensor:
        order = p.ids.argsort(stable=True)
        y = mapped(*state, p.images[order].unflatten(0, (tasks, -1)))
        return y.flatten(0, 1)[order.argsort()]

    stacked = nn.Module()
    for i, tensor in enumerate(t for part in state for t in part.values()):
        stacked.register_buffer(f"tensor{i}", tensor)
    return forward, [stacked]


def _is_norm(workload: Workload) -> bool:
    return workload.layer.startswith(("batchnorm", "layernorm"))


@network("addcmul", "merged", "forward", only=_is_norm)
def _addcmul(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """Scale and shift of each sample's task in one pass."""
    norms = [network[0] for network in p.copies]
    images, ids = p.images, p.ids
    table = nn.Module()
    scale, shift = torch.stack([n.weight.detach() for n in norms]), torch.stack([n.bias.detach() for n in norms])
    batch = isinstance(norms[0], nn.BatchNorm2d)
    if batch:
        mean, variance = (torch.stack([getattr(n, name) for n in norms]) for name in ("running_mean", "running_var"))
        scale = scale * (variance + norms[0].eps).rsqrt()
        shift = shift - mean * scale
    axes = (slice(None), slice(None), None, None) if batch else (slice(None), None)
    table.register_buffer("scale", scale[axes])
    table.register_buffer("shift", shift[axes])

    def forward() -> Tensor:
        x = images if batch else F.layer_norm(images, images.shape[-1:], eps=norms[0].eps)
        return torch.addcmul(table.shift[ids], x, table.scale[ids])

    return forward, [table]


@network("base", "floor", "forward")
def _base(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """The network without tasks."""
    plain = copy.deepcopy(p.base)
    return lambda: plain(p.images), [plain]


@network("base-folded", "floor", "forward", only=lambda workload: not _is_norm(workload), memory=False)
def _base_folded(p: NetworkProblem) -> tuple[Callable[[], Tensor], Sequence[nn.Module]]:
    """The network without tasks, its batch norms folded."""
    plain = folded(p.base)
    return lambda: plain(p.images), [plain]


def folded(network: nn.Module) -> nn.Module:
    """``network`` with each batch norm that follows a convolution folded into it, by PyTorch's own function."""
    return optimization.fuse(network) if _has_batch_norm(network) else copy.deepcopy(network)


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@functools.cache
def _folds(name: str) -> bool:
    """Whether folding makes another network of it."""
    with torch.device("meta"):
        network = NETWORKS[name][0]()
    return _has_batch_norm(network) and len(list(network.modules())) > 2


@contextlib.contextmanager
def _outside_the_checkout() -> Iterator[None]:
    """Imports as in any other folder: transformers looks for a package named kernels, and this checkout has one."""
    path = sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != CHECKOUT]
    try:
        yield
    finally:
        sys.path[:] = path


def _peft(p: NetworkProblem) -> Ready:
    """PEFT's mixed batch: LoRA of as many parameters as the open deltas; norms and head are shared by all tasks."""
    with _outside_the_checkout():
        from peft import LoraConfig, get_peft_model

    layers = p.model.conversion.layers
    plain, adapted = copy.deepcopy(p.base), None
    for t in range(p.workload.tasks):
        name = f"task{t}"
        opened = [path for path, layer in layers.items() if layer.is_open(name)]
        ranks = {}
        for path in opened:
            out, rest = layers[path].base.shape[0], layers[path].base[0].numel()
            ranks[f"^{re.escape(path)}$"] = max(out * rest // (out + rest), 1)
        config = LoraConfig(target_modules=opened, rank_pattern=ranks, init_lora_weights=False)
        if adapted is None:
            adapted = get_peft_model(plain, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
    adapted.eval()
    images, names = p.images, [f"task{t}" for t in p.ids.tolist()]

    def check() -> None:
        mixed, exact = adapted(images, adapter_names=names), copy.deepcopy(adapted).double()
        for name in sorted(set(names))[:4]:
            i = names.index(name)
            one = images[i : i + 1]
            exact.set_adapter(name)
            adapted.set_adapter(name)
            testing.assert_no_worse_than_torch(mixed[i : i + 1], exact(one.double()), adapted(one), name=name)

    return Ready(lambda: adapted(images, adapter_names=names), [*adapted.parameters(), *adapted.buffers()], check)


def _has_gates(workload: Workload) -> bool:
    return workload.gates != 0


provider("peft-lora", "other", ("network",), phase="forward", only=_has_gates, absent=installed("peft"))(_peft)


# Training.


def _step(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, weights: Sequence[Tensor]
) -> Callable[[], None]:
    """One training step with momentum; the rate is 0, so that every round does the same arithmetic."""
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step


def _train_ours(p: NetworkProblem) -> Ready:
    model, images, labels = p.model, p.images, p.labels
    forward = functools.partial(model, tasks="task0")
    weights = [w for group in model.task_parameters("task0") for w in group["params"]]

    def check() -> None:
        # In the order of Materialised's names, which is that of the network's modules.
        named: dict[str, Tensor] = {}
        own = model.modules_of("task0")
        for path, _ in model.model.named_modules():
            if path in model.conversion.layers:
                layer = model.conversion.layers[path]
                named[f"{path}.delta"] = layer.deltas["task0"]
                if layer.base_bias is not None:
                    named[f"{path}.bias_delta"] = layer.bias_deltas["task0"]
                named[f"{path}.score"] = layer.scores["task0"]
            elif path in own:
                named |= {f"{path}.{name}": w for name, w in own[path].named_parameters()}
        p.check(learned(forward, images, labels, named)[0])

    return Ready(_step(forward, images, labels, weights), [*model.parameters(), *model.buffers()], check)


def _train_materialised(p: NetworkProblem) -> Ready:
    plain = Materialised(p, p.dtype)
    step = _step(plain.network, plain.images, plain.labels, [w for _, w in plain.named()])
    return Ready(step, [*plain.network.parameters(), *plain.network.buffers()], lambda: p.check(plain.learn()[0]))


def _train_full(p: NetworkProblem) -> Ready:
    """Every weight of the plain network, and no base kept: other gradients, so nothing to check."""
    plain = copy.deepcopy(p.base).requires_grad_()
    step = _step(plain, p.images, p.labels, list(plain.parameters()))
    return Ready(step, [*plain.parameters(), *plain.buffers()], lambda: None)


provider("taps_fast", "ours", ("network",), phase="train")(_train_ours)
provider("materialise", "baseline", ("network",), phase="train")(_train_materialised)
provider("full-fine-tuning", "other", ("network",), phase="train")(_train_full)
