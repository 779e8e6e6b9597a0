"""The parts of a network whose data flow can be proven, and what in them follows what.

A region is the largest module that `torch.fx` can trace and that is called with one tensor. Its graph says which
tensor goes where, so a norm that is the only reader of a layer's output can be computed with it. The trace is a claim:
code that asks whether its input is a Tensor, say, may take another way under tracing. So each region's first call
runs the module's own forward too, and a region whose graph gives another result is given up.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ._folder import OF_EVERY_MODULE
from .nn import WrappedLayer
from .nn.attention import TaskAttention
from .nn.folded import Epilogue, FoldedLayer, FoldedNorm
from .nn.layer import TapsLayer
from .nn.norm import TaskBatchNorm
from .nn.per_task import PerTask, ordinary

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


_ONE_AT_A_TIME = threading.RLock()
"""A trace puts back what it found patched, which must not be another's patch."""
_is_training = operator.attrgetter("training")
_parts_of = operator.attrgetter("_modules", "_parameters", "_buffers")
_Attribute = tuple[nn.Module, str, Any, Any]
"""Whose, its name, its value, and that again as it was before the trace."""


class Fold(NamedTuple):
    """What one call computes in a prepared model, in the order of the network."""

    path: str
    """Of the layer, or of a norm that no layer can take."""
    norm: str | None
    """The path of the norm in it."""
    activation: str | None


class Region:
    """What stands in for a module's forward while the model is prepared."""

    def __init__(
        self, path: str, module: nn.Module, graph: fx.Graph, tasks: Sequence[str], attributes: list[_Attribute]
    ) -> None:
        self.path, self.module = path, module
        self.folds: list[Fold] = []
        self.bytes = 0
        self.verified = self.paused = False
        self.gave_up: str | None = None
        targets = {n.target: _at(module, n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        # Hooks and modes of modules that the graph runs through without calling them would go unnoticed.
        self.inside = [m for m in module.modules() if m is not module]
        quiet = [m for m in self.inside if not _hooked(m)]
        self.hooks = [hooks for m in quiet for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # So would parts and attributes that are replaced; those that the forward writes itself are another matter.
        self.traced = list(_traced(module))
        fixed = [(m, name) for m, name, value, was in attributes if _is_still(vars(m).get(name, self), value, was)]
        self.owners, self.names = [m for m, _ in fixed], [name for _, name in fixed]
        for node in list(graph.nodes):
            self._fold(node, targets, tasks)
        graph.lint()
        used = {n.target for n in graph.nodes}
        self.graph = fx.GraphModule({name: m for name, m in targets.items() if name in used}, graph)

    def install(self) -> None:
        """Stands in from now on, as long as nothing changes."""
        self.module.__dict__["forward"] = self
        self.parts = self._parts()
        self.state = list(map(_snapshot, self._state()))

    def _parts(self) -> list[Any]:
        """Modules, parameters and buffers."""
        return list(chain.from_iterable(map(dict.values, chain.from_iterable(map(_parts_of, self.traced)))))

    def _state(self) -> list[Any]:
        return [*map(len, map(vars, self.traced)), *map(getattr, self.owners, self.names)]

    def _changed(self) -> bool:
        parts = self._parts()
        try:
            return (
                len(parts) != len(self.parts)
                or not all(map(operator.is_, parts, self.parts))
                or self._state() != self.state
            )
        except Exception:  # an attribute is gone, or is one that cannot be compared
            return True

    def _fold(self, node: fx.Node, targets: dict[Any, Any], tasks: Sequence[str]) -> None:
        """Replaces a layer and what only its output goes to, or a norm and its activation, by one call."""
        found = targets.get(node.target) if node.op == "call_module" else None
        last = node
        norm: TaskBatchNorm | None = None
        if isinstance(found, TapsLayer) and _takes_epilogue(found):
            follower = _only_reader(node)
            norm = None if follower is None else _norm_of(follower, targets)
            if norm is not None and follower is not None and found.base.dim() == 4:
                last = follower
            else:
                norm = None
        elif _is_evaluated(found) and _reads_one(node):
            norm = found
        else:
            return
        follower = _only_reader(last)
        activation = None if follower is None else _activation_of(follower, targets)
        if activation is not None and follower is not None:
            last = follower
        if norm is None and activation is None:
            return
        if norm is not None:  # its tables stand in for all of these
            self.traced += norm.tasks.modules()
        after = Epilogue(norm, activation, tasks)
        folded = FoldedLayer(found, after) if isinstance(found, TapsLayer) else FoldedNorm(norm, after)  # type: ignore[arg-type]
        name = f"folded_{len(self.folds)}"
        targets[name] = folded
        taken = norm.path if norm is not None and isinstance(found, TapsLayer) else None
        self.folds.append(Fold(found.path, taken, activation))  # type: ignore[union-attr]
        self.bytes += after.bytes
        graph = node.graph
        with graph.inserting_before(last):
            call = graph.call_module(name, (node.args[0],))
        last.replace_all_uses_with(call)
        while last is not node:
            before = last.args[0]
            graph.erase_node(last)
            last = before  # type: ignore[assignment]
        graph.erase_node(node)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or self.paused or self.gave_up is not None:
            return self.own(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.graph.forward(x) if self.verified else self.own(x)
        # In every forward of every part, of hundreds of modules: without a loop in Python.
        if any(map(_is_training, self.inside)) or any(self.hooks) or self._changed():
            warnings.warn(
                f"TapsModel: {self.path or 'the model'} runs unprepared, because a module in it has got hooks, other "
                "parts or attributes, or is in training mode since prepare_inference()",
                stacklevel=2,
            )
            return self.own(x)
        return self.graph.forward(x) if self.verified else self._verify(x)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def _verify(self, x: Tensor) -> Any:
        """The first call, and before it those without samples, which show nothing: both ways, which must agree."""
        found = self.graph.forward(x.clone())
        want = self.own(x)
        if not _agree(want, found):
            self.gave_up = "its trace gives another result than its forward"
            warnings.warn(
                f"TapsModel.prepare_inference: {self.path or 'the model'} is left as it is: {self.gave_up}",
                stacklevel=3,
            )
        self.verified = x.numel() > 0  # last: from then on other threads run the graph
        return want


def regions(model: nn.Module, tasks: Sequence[str]) -> Iterator[Region | tuple[str, str]]:
    """Each region of ``model``, or (path, why) for modules with adapted layers that cannot be one."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[Region | tuple[str, str]]:
        children = [m for m in module.modules() if m is not module]
        if id(module) in seen or _is_leaf(module) or not any(_foldable(m) for m in children):
            return
        seen.add(id(module))
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            why = None
        else:
            try:
                attributes = list(_attributes(module))
                yield Region(path, module, _trace(module), tasks, attributes)
                return
            except Exception as error:  # whatever a user's forward raises when it is traced
                text = str(error).strip().split("\n")[0]
                why = f"cannot be traced: {type(error).__name__}: {text}"
        parts = [part for name, child in module.named_children() for part in walk(f"{path}.{name}".lstrip("."), child)]
        if why is not None:
            yield path, why
        yield from parts

    yield from walk("", model)


class _Tracer(fx.Tracer):
    """While it traces, calls and attributes of the modules of all threads come here; those of others go on as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a trace of ``module`` runs through: it calls those inside the others, which look themselves."""
    yield module
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or not _Tracer().is_leaf_module(child, ""):
            yield from _traced(child)


def _attributes(module: nn.Module) -> Iterator[_Attribute]:
    """What the forwards of traced modules may read: each attribute that not every module has."""
    for part in _traced(module):
        own = ((name, value) for name, value in vars(part).items() if name not in OF_EVERY_MODULE)
        yield from ((part, name, value, _snapshot(value)) for name, value in own)


def _snapshot(value: Any) -> Any:
    """What a container holds now: its contents can be changed without replacing it. Not what is in them in turn."""
    return copy.copy(value) if isinstance(value, list | dict | set | deque) else value


def _is_still(value: Any, held: Any, was: Any) -> bool:
    try:
        return value is held and (held is was or bool(held == was))
    except Exception:  # contents that cannot be compared
        return False


def _is_leaf(module: nn.Module) -> bool:
    own = _hooked(module) or "forward" in module.__dict__
    return isinstance(module, (TapsLayer, PerTask, TaskAttention)) or own


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of a forward of one tensor; what else it can be given has its default."""
    first, *rest = inspect.signature(module.forward).parameters.values()
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) or any(
        p.default is p.empty for p in rest
    ):
        raise TypeError("its forward takes several inputs")
    with _ONE_AT_A_TIME:
        graph = _Tracer().trace(module, {p.name: p.default for p in rest} or None)
    for node in reversed(list(graph.nodes)):
        # How fx pins an argument to its default: a placeholder and an assertion.
        if getattr(node.target, "__name__", "") in ("_assert_is_none", "_assert") and not node.users:
            graph.erase_node(node)
        elif node.op in ("placeholder", "call_function") and not node.users and node is not next(iter(graph.nodes)):
            if node.op == "placeholder" or node.target is operator.eq:
                graph.erase_node(node)
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise TypeError("its forward reads more than its first input")
    return graph


def _at(module: nn.Module, path: Any) -> Any:
    return operator.attrgetter(path)(module)


def _foldable(module: nn.Module) -> bool:
    return isinstance(module, TapsLayer) or _is_evaluated(module)


def _takes_epilogue(layer: TapsLayer) -> bool:
    return not _hooked(layer) and (not isinstance(layer, WrappedLayer) or (layer.fused and layer.last))


def _is_evaluated(module: Any) -> bool:
    """A batch norm that uses running statistics alone, of one type for all tasks."""
    if not isinstance(module, TaskBatchNorm) or _hooked(module):
        return False
    norms: list[Any] = [module.base, *module.tasks.values()]
    return ordinary(norms) and all(norm.running_mean is not None for norm in norms)


def _reads_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads ``node``, as its first argument."""
    if len(node.users) != 1 or not _reads_one(node):
        return None
    (reader,) = node.users
    return reader if reader.args and reader.args[0] is node else None


def _norm_of(node: fx.Node, targets: dict[Any, Any]) -> TaskBatchNorm | None:
    found = targets.get(node.target) if node.op == "call_module" else None
    return found if _is_evaluated(found) and _reads_one(node) else None


def _activation_of(node: fx.Node, targets: dict[Any, Any]) -> str | None:
    """The name of an activation of one input, if ``node`` is one that epilogues have."""
    if node.op == "call_module":
        module: Any = targets.get(node.target)
        if _hooked(module):
            return None
        plain = _MODULES.get(type(module))
        return plain if plain != "gelu" or module.approximate == "none" else None
    table: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else {}
    extra = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    exact = len(node.args) == 1 and (not extra or extra == {"approximate": "none"})
    return table.get(node.target) if exact else None


def _agree(want: Any, found: Any) -> bool:
    """Whether two results are the same but for rounding: a graph of something else is far off."""
    pairs = list(zip(tree_leaves(want), tree_leaves(found), strict=False))
    if len(pairs) != len(tree_leaves(want)) or len(pairs) != len(tree_leaves(found)):
        return False
    return all(_near(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def _near(want: Tensor, found: Tensor) -> bool:
    if want.shape != found.shape or want.dtype != found.dtype:
        return False
    if not want.is_floating_point() or want.numel() == 0:
        return torch.equal(want, found)
    same = want.isfinite()
    if not torch.equal(same, found.isfinite()):
        return False
    a, b = want[same].double(), found[same].double()
    return bool((a - b).norm() <= 3 * torch.finfo(want.dtype).eps ** 0.5 * a.norm())
