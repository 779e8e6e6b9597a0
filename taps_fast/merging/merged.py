"""`MergedModel`: a network whose weights are a base plus a weighted sum of deltas, with coefficients to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..model import TapsModel
from ..nn.attention import TaskAttention
from ..nn.context import TaskNames
from ..nn.head import class_axis, new_head
from ..nn.layer import TapsLayer
from ..nn.per_task import PerTask, own_copy
from .layers import Row, Running, merge_in_place
from .threads import Exchange
from .vectors import TaskVectors


class MergedModel(nn.Module):
    """``model`` with the weights W0 + Σ_k clamp(coeffs)·Δ_k, which it forms as it runs.

    A batch may mix tasks: the merged weights are the same for all, so that one forward serves every task, each with
    its own head.

    Args:
        model: any module of the base's architecture. It is left as it is; its parameters are not copied.
        vectors: base and K deltas.
        head: the path of the module that each task has its own of; its tensors are ``vectors.own``.
        own: the path of one more layer (Linear, Conv2d or attention) in which each task gets a trainable delta of its
            own, from 0, on top of the merged weight.
        coeffs: "tensor" (one a tensor and task; the papers' layer-wise), "task" (one per task), or "part" with parts.
        parts: uint8 tensors by name, values below ``num_parts``: the class of each element; see `random_parts`.
        init: where coefficients start.
        clamp: the range they are clamped to, or None.
        route: "whole" (weights are folded once per forward, in one pass), or "layer" (Linear and Conv2d sum their
            deltas as they run: memory is base, deltas and one layer).

    Raises:
        ValueError: tensors that the model has not, own tensors without ``head``, init outside the clamp, a route
            that cannot do what is asked for.

    ``coeffs`` is a Parameter [L, K], [K] or [L, P, K]; rows are in the order of ``vectors.names``. The model runs in
    eval mode. Running statistics are merged like weights; coefficients get no gradient through them. Threads may share
    it: their forwards take turns.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned = [{n: t + 0.1 for n, t in model.state_dict().items()} for _ in range(3)]
    >>> merged = MergedModel(model, TaskVectors.from_checkpoints(model.state_dict(), tuned))
    >>> merged.coeffs.shape
    torch.Size([4, 3])
    >>> merged(torch.randn(5, 4)).mean().backward()
    >>> merged.coeffs.grad.shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: TaskVectors,
        *,
        head: str | None = None,
        own: str | None = None,
        coeffs: str = "tensor",
        parts: Mapping[str, Tensor] | None = None,
        num_parts: int = 1,
        init: float = 0.3,
        clamp: tuple[float, float] | None = (0.0, 1.0),
        route: str = "whole",
    ) -> None:
        super().__init__()
        shapes = {"tensor": (len(vectors.names), len(vectors)), "task": (len(vectors),)}
        shapes |= {} if parts is None else {"part": (len(vectors.names), num_parts, len(vectors))}
        if coeffs not in shapes or (parts is not None and coeffs != "part"):
            raise ValueError(f"MergedModel: coeffs must be 'tensor', 'task', or 'part' with parts, got {coeffs!r}")
        if route not in ("whole", "layer") or (route == "layer" and parts is not None):
            raise ValueError(f"MergedModel: route must be 'whole', or 'layer' without parts, got {route!r}")
        if clamp is not None and not clamp[0] <= init <= clamp[1]:
            raise ValueError(f"MergedModel: init must be in the clamp {clamp}, got {init}: it could never move")
        self.clamp, self.parts, self.own = clamp, parts, own
        self.network = shared_network(model, vectors, head, own)
        device = next((t.device for t in vectors.base.values()), None)
        self.coeffs = nn.Parameter(torch.full(shapes[coeffs], init, device=device))
        self._running, self._exchange = Running(vectors), Exchange()
        self._places = adopt(self.network, vectors)
        self._buffer_names = {name for name, _ in self.network.named_buffers()}
        self._folded = [n for n in vectors.names if n in self._places] if route == "whole" else self._in_layers()
        self.eval()

    @property
    def vectors(self) -> TaskVectors:
        """Base and deltas, where the network is and in its dtype."""
        return self._running.vectors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedModel:
        """Vectors and parts move too. Coefficients stay in float32 at least: rounded, they could not be trained."""
        ours = [p for name, p in self.named_parameters() if not name.startswith("network.")]
        exact = [t for p in ours for t in (p, p.grad)]

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            dtype = torch.promote_types(moved.dtype, torch.float32)
            return t.to(moved.device, dtype) if moved.dtype != dtype and any(t is c for c in exact) else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        self._running.vectors = self.vectors.moved(fn)
        self.parts = None if self.parts is None else {name: fn(part) for name, part in self.parts.items()}
        adopt(self.network, self.vectors)
        return self

    def train(self, mode: bool = True) -> MergedModel:
        """Stays in eval mode, as the published methods do: norms keep the merged statistics."""
        super().train(False)
        return self

    def coefficients(self) -> Tensor:
        """The coefficients as they are used: clamped."""
        return self.coeffs if self.clamp is None else self.coeffs.clamp(*self.clamp)

    def masks(self) -> dict[str, Tensor] | None:
        """What multiplies the sums of deltas, by name; None: nothing."""
        return None

    def weights(self) -> dict[str, Tensor]:
        """The merged tensors that a forward needs stored, by the names of ``vectors``; differentiable."""
        return self._fold(self._folded)

    def _fold(self, names: Sequence[str]) -> dict[str, Tensor]:
        table = self.coefficients()
        if table.dim() == 1:
            table = table.expand(len(self.vectors.names), -1)
        if len(names) < len(self.vectors.names):
            where = {name: l for l, name in enumerate(self.vectors.names)}
            table = table[[where[name] for name in names]]
        return self.vectors.fold(table, parts=self.parts, masks=self.masks(), names=names)

    def forward(self, *args: Any, tasks: TaskNames | None = None, **kwargs: Any) -> Any:
        """The model's output; ``tasks`` as in `TapsModel` where tasks have modules of their own."""
        return self._call(self.weights(), args, {**kwargs, "tasks": tasks})

    def each(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for each task's own input, without padding: one mixed batch where shapes allow it.

        The weights are folded once, and all tasks' gradients meet in one weight gradient before the coefficients'.
        """
        weights = self.weights()
        return run_each(self.network, inputs, lambda x, tasks: self._call(weights, (x,), {"tasks": tasks}))

    def each_rows(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`each` as rows [N, C]: of samples, or of their tokens or pixels if those have classes."""
        return {task: class_rows(self.network, y) for task, y in self.each(inputs).items()}

    @torch.no_grad()
    def state(self, task: str | None = None) -> dict[str, Tensor]:
        """A plain state dict of the merged model, a copy: of all tasks, or with what ``task`` has its own."""
        merged = self._fold(self.vectors.names)
        state: dict[str, Tensor] = {}
        used: dict[int, Tensor] = {}  # by id: tied tensors are all what their first name says, as in a forward
        for name, base in self.vectors.base.items():
            _, module, last = place_of(self.network, name, base)
            held = getattr(module, last)
            if id(held) not in used:
                own = _own_delta(module, last, task)
                tensor = merged[name] if name in merged else base.clone()
                used[id(held)] = tensor if own is None else tensor + own
            state[name] = used[id(held)]
        if task is not None:
            state |= self.vectors.own[task]
            for path, head in self.network.modules_of(task).items():
                state |= {f"{path}.{name}": t.detach().clone() for name, t in head.state_dict().items()}
        return state

    def own_parameters(self) -> list[nn.Parameter]:
        """The parameters of every task's head and own layer."""
        found = [p for task in self.vectors.tasks for g in self.network.task_parameters(task)[:1] for p in g["params"]]
        return list({id(p): p for p in found}.values())

    def _call(self, weights: Mapping[str, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("tasks") is None and not self.network.conversion.located():
            kwargs["tasks"] = "base"  # nothing tells tasks apart
        named = {}
        for name, weight in weights.items():
            for place in self._places.get(name, ()):  # running statistics have no gradient
                named[place] = weight.detach() if place in self._buffer_names else weight
        with self._running.coefficients.of(self.coefficients()):
            return self._exchange(self.network, named, args, kwargs)

    def _in_layers(self) -> list[str]:
        """Lets Linear and Conv2d sum their own deltas; the names that are left to be folded."""
        folded = []
        for l, name in enumerate(self.vectors.names):
            if name not in self._places:
                continue
            place, *tied = self._places[name]
            path, _, last = place.rpartition(".")
            module = self.network.get_submodule(path)
            if last != "weight" or tied or not merge_in_place(module, Row(self._running, l, name)):
                folded.append(name)
        return folded


def run_each(network: TapsModel, inputs: Mapping[str, Tensor], call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """``call(x, tasks)`` for each task's input: once for all where they have one shape a sample, else one by one."""
    for task in inputs:
        network.context.check(task)
    sizes = {tuple(x.shape[1:]) for x in inputs.values()} | {x.dtype for x in inputs.values()}
    if len(sizes) > 2 or not inputs:
        return {task: _own_width(network, task, call(x, task)) for task, x in inputs.items()}
    ids = [network.tasks.index(task) for task, x in inputs.items() for _ in range(len(x))]
    y = call(torch.cat(list(inputs.values())), torch.tensor(ids, dtype=torch.int64))
    parts = torch.split(y, [len(x) for x in inputs.values()])
    return {task: _own_width(network, task, part) for task, part in zip(inputs, parts, strict=True)}


def class_rows(network: TapsModel, y: Tensor) -> Tensor:
    """What a task's outputs say of each place that has classes, as rows [N, C]."""
    return y.movedim(_class_axis(network, y), -1).flatten(0, -2)


def _class_axis(network: TapsModel, y: Tensor) -> int:
    head = network.conversion.head
    return class_axis(network.model if head is None else head.base, y)


def _own_width(network: TapsModel, task: str, y: Tensor) -> Tensor:
    width, axis = network.widths.get(task), _class_axis(network, y)
    return y if width is None else y.narrow(axis, 0, min(width, y.shape[axis]))


def shared_network(
    model: nn.Module, vectors: TaskVectors, head: str | None = None, own: str | None = None
) -> TapsModel:
    """The model with each task's head and own layer; the rest is shared."""
    if head is None and any(vectors.own.values()):
        raise ValueError("MergedModel: head must be given, got none for vectors with tensors of each task's own")
    network = TapsModel(model, head=head, include=[] if own is None else [own], norms="shared")
    for task in vectors.tasks:
        network.add_task(task, head=None if head is None else own_head(network, vectors, task))
    return network


def own_head(network: TapsModel, vectors: TaskVectors, task: str) -> nn.Module:
    """A task's head with the tensors that are its own."""
    owner = network.conversion.head
    assert owner is not None
    prefix = f"{owner.path}."
    tensors = {name.removeprefix(prefix): t for name, t in vectors.own[task].items() if name.startswith(prefix)}
    if not tensors or len(tensors) < len(vectors.own[task]):
        raise ValueError(
            f"MergedModel: head must own all of {list(vectors.own[task])} (task {task!r}), got {owner.path!r}"
        )
    if "weight" in tensors:
        module = new_head(owner.base, tensors["weight"].shape[0], owner.path)
    else:
        module = own_copy(owner.base)
    module.load_state_dict(tensors)
    return module.requires_grad_(False)


class Place(NamedTuple):
    """Where a tensor of a state dict is in the adapted network."""

    path: str
    """Of its module, below the network's ``model``."""
    module: nn.Module
    attribute: str


def place_of(network: TapsModel, name: str, like: Tensor) -> Place:
    """Finds a tensor of the original model; ValueError where there is none of this shape."""
    path, _, last = name.rpartition(".")
    found = None
    try:
        module = network.model.get_submodule(path)
        if isinstance(module, TaskAttention) and last.startswith("in_proj_"):
            path, last, module = f"{path}.in_proj".lstrip("."), last.removeprefix("in_proj_"), module.in_proj
        if isinstance(module, PerTask):
            path, module = f"{path}.base".lstrip("."), module.base
        if isinstance(module, TapsLayer):
            last = module._stored.get(last, last)
        found = getattr(module, last)
    except AttributeError:
        pass
    if not isinstance(found, Tensor) or found.shape != like.shape:
        got = f"{tuple(found.shape)}" if isinstance(found, Tensor) else "none"
        raise ValueError(f"MergedModel: model must have {name!r} of shape {tuple(like.shape)}, got {got}")
    return Place(path, module, last)


def adopt(network: TapsModel, vectors: TaskVectors) -> dict[str, list[str]]:
    """Gives the network the base's tensors, in their storage; where each merged tensor is in it, by name.

    Of tied parameters the first name stands for all. A module that is registered twice has one place.
    """
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in network.named_modules():
        for last, held in (*module._parameters.items(), *module._buffers.items()):
            holders.setdefault(id(held), []).append((f"{path}.{last}", module, last))
    places: dict[str, list[str]] = {}
    for name, tensor in vectors.base.items():
        _, module, last = place_of(network, name, tensor)
        found = getattr(module, last)
        mine = holders.pop(id(found), [])
        if mine and isinstance(found, nn.Parameter):
            found.data = tensor
        elif mine:
            own = tensor.clone()
            for _, module, last in mine:
                module._buffers[last] = own
        if mine and name in vectors.deltas:
            places[name] = [place for place, _, _ in mine]
    return places


def _own_delta(module: nn.Module, attribute: str, task: str | None) -> Tensor | None:
    """What ``task`` adds of its own to a tensor; None where that is nothing."""
    if task is None or not isinstance(module, TapsLayer) or not module.is_open(task):
        return None
    owned = module.deltas if attribute == "base" else module.bias_deltas
    delta: Tensor = owned[task].detach()
    return delta
