"""What of a model is adapted: converted, skipped or refused, and why."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import _closures
from ._names import counted, covers, nearest
from ._refusals import SHARED, is_bare, refusals
from .nn import FastTapsConv2d, FastTapsLinear, TaskContext, TaskHead, TransposedLinear, WrappedConv2d, WrappedLinear
from .nn.attention import TaskAttention
from .nn.layer import TapsLayer
from .nn.norm import TaskNorm, norm_type
from .nn.per_task import PerTask, rest
from .nn.stand_in import carry
from .nn.transposed import is_transposed_linear
from .nn.wrapped import UNUSED

Patterns = Sequence[str | type[nn.Module]] | str | type[nn.Module]


class Row(NamedTuple):
    """One module in the report."""

    path: str
    type: str
    verdict: str
    """"converted", "skipped" or "refused"."""
    reason: str


@dataclass(repr=False)
class Conversion:
    """What `TapsModel` made of a network; ``print`` shows one row a module that has parameters."""

    rows: list[Row] = field(default_factory=list)
    layers: dict[str, TapsLayer] = field(default_factory=dict)
    norms: dict[str, TaskNorm] = field(default_factory=dict)
    attentions: dict[str, TaskAttention] = field(default_factory=dict)
    head: TaskHead | None = None
    restored: list[tuple[str, str, Any]] = field(default_factory=list)
    """(module, attribute, value): what a merged model gets back."""
    resting: list[nn.Module] = field(default_factory=list)
    """Modules of the base whose buffers training would move: they stay in eval mode."""

    def let_rest(self, path: str, module: nn.Module, buffers: str) -> None:
        """Puts a module of the base into eval mode for good, because training would move its ``buffers``."""
        module.training = False
        self.resting.append(module)
        why = f", in eval mode: training would move {buffers}"
        self.rows = [r._replace(reason=r.reason + why) if r.path == (path or "(root)") else r for r in self.rows]

    def located(self) -> dict[str, TapsLayer | PerTask]:
        """Every module that tells tasks apart, by path."""
        head: dict[str, PerTask] = {} if self.head is None else {self.head.path: self.head}
        return {**self.layers, **self.norms, **head}

    def of(self, verdict: str) -> list[Row]:
        """The rows with this verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    def __str__(self) -> str:
        widths = [max((len(row[i]) for row in self.rows), default=0) for i in range(3)]
        lines = [f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]}" for r in self.rows]
        counts = Counter(row.verdict for row in self.rows)
        total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("converted", "skipped", "refused"))
        have = "has" if len(self.layers) == 1 else "have"
        return "\n".join([*lines, f"{total}; {counted(len(self.layers), 'layer')} {have} gates"])

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows


def convert(
    model: nn.Module,
    context: TaskContext,
    *,
    head: str | None,
    include: Patterns | None,
    exclude: Patterns,
    norms: str,
    options: dict[str, Any],
) -> tuple[nn.Module, Conversion]:
    """An adapted copy of ``model``, whose parameters are frozen but in the same storage, and what was done."""
    paths = _check(model, head, norms)
    _warn_of_tasks(model)
    plan = _Plan(
        context=context,
        head=head,
        include=None if include is None else _patterns("include", include, paths),
        exclude=_patterns("exclude", exclude, paths),
        task_norms=norms == "task",
        options=options,
        memo=_frozen(model),
        refusals=refusals(model),
    )
    give_modules = _closures.follow(model, plan.memo)
    settled: list[str] = []  # the last module that was decided with all that is inside
    for path, module in paths.items():
        if not any(path.startswith(outer and outer + ".") for outer in settled) and plan.decide(path, module):
            settled = [path]
    adapted = copy.deepcopy(model, plan.memo)
    for stand_in in (*plan.found.layers.values(), *plan.found.attentions.values()):
        carry(stand_in, stand_in.taken, plan.memo)  # type: ignore[arg-type]
    give_modules()
    plan.found.restored = list(_disable_fast_paths(adapted))
    rest(adapted, [])
    return adapted, plan.found


@dataclass
class _Plan:
    """What replaces what. One ``deepcopy`` of the model then carries it out.

    ``memo`` is deepcopy's: it says what each parameter and each adapted module becomes. So tied parameters stay
    tied, a module that is used twice stays one, and references in lists and attributes follow.
    """

    context: TaskContext
    head: str | None
    include: list[str | type[nn.Module]] | None
    exclude: list[str | type[nn.Module]]
    task_norms: bool
    options: dict[str, Any]
    memo: dict[int, Any]
    refusals: dict[int, str]
    found: Conversion = field(default_factory=Conversion)

    def decide(self, path: str, module: nn.Module) -> bool:
        """Plans for one module and reports it; whether that settles what is inside."""
        if path == self.head:
            self.found.head = head = TaskHead(copy.deepcopy(module, self.memo), self.context, path)
            self.memo[id(module)] = head
            return self._report(path, module, "converted", f"head: {head.how}")
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) or is_transposed_linear(module):
            settled = self._decide_layer(path, module)
            for name, inner in module.named_modules(prefix=path):
                if inner is not module and _is_norm(inner):
                    self._report(name, inner, "skipped", f"inside a {type(module).__name__}: {SHARED}, in eval mode")
            return settled
        if _is_norm(module):
            return self._decide_norm(path, module)
        if _owns(module):
            reason = self.refusals.get(id(module))
            what = f"{type(module).__name__} is not adapted: {SHARED}"
            self._report(path, module, "refused" if reason else "skipped", reason or what)
        return False

    def _decide_layer(self, path: str, module: Any) -> bool:
        reason = self.refusals.get(id(module))
        # An attention is adapted as a whole, so what excludes its out_proj excludes it.
        whole = module.named_children() if isinstance(module, nn.MultiheadAttention) else ()
        inside = [(f"{path}.{name}".lstrip("."), child) for name, child in whole]
        if any(_matches(*place, self.exclude) for place in [(path, module), *inside]):
            return self._report(path, module, "skipped", f"excluded: {SHARED}")
        if self.include is not None and not _matches(path, module, self.include):
            return self._report(path, module, "skipped", f"not included: {SHARED}")
        if reason is not None:
            return self._report(path, module, "refused", reason)
        if isinstance(module, nn.MultiheadAttention):
            return self._adapt_attention(path, module)
        if type(module) in (nn.Linear, nn.Conv2d) and is_bare(module):
            self.memo[id(module)] = self._layer(path, module, module._parameters)
            return self._report(path, module, "converted", "a gated delta per task")
        if is_transposed_linear(module):
            layer = TransposedLinear(copy.deepcopy(module, self.memo), self.context, **self.options)
            layer.path = path or "(root)"
            self.memo[id(module)] = self.found.layers[path] = layer
            return self._report(path, module, "converted", "a gated delta per task, stored as [in, out]")
        # A subclass may have a forward of its own, and hooks, buffers and children belong to the module: wrapping keeps
        # them.
        kind = WrappedConv2d if isinstance(module, nn.Conv2d) else WrappedLinear
        wrapped = kind(copy.deepcopy(module, self.memo), self.context, **self.options)
        if wrapped.why == UNUSED:
            return self._report(path, module, "refused", f"{UNUSED}: {SHARED}")
        wrapped.path = path or "(root)"
        self.memo[id(module)] = self.found.layers[path] = wrapped
        return self._report(path, module, "converted", wrapped.how)

    def _adapt_attention(self, path: str, module: nn.MultiheadAttention) -> bool:
        dot = path + "." if path else ""
        shape = nn.Linear(module.embed_dim, 3 * module.embed_dim, module.in_proj_bias is not None, device="meta")
        own = {"weight": module.in_proj_weight, "bias": module.in_proj_bias}
        in_proj = self._layer(f"{dot}in_proj", shape.train(module.training), own)
        out_proj = self._layer(f"{dot}out_proj", module.out_proj, module.out_proj._parameters)
        self.memo[id(module)] = self.found.attentions[path] = TaskAttention(module, in_proj, out_proj)
        return self._report(path, module, "converted", "a gated delta per task for in_proj and for out_proj")

    def _layer(
        self, path: str, shape: nn.Linear | nn.Conv2d, parameters: Mapping[str, nn.Parameter | None]
    ) -> TapsLayer:
        bare = copy.copy(shape)
        bare._parameters = {name: self.memo.get(id(p), p) for name, p in parameters.items()}
        layer: TapsLayer
        if isinstance(bare, nn.Linear):
            layer = FastTapsLinear.from_linear(bare, context=self.context, **self.options)
        else:
            layer = FastTapsConv2d.from_conv2d(bare, context=self.context, **self.options)
        layer.path = path or "(root)"
        self.found.layers[path] = layer
        return layer

    def _decide_norm(self, path: str, module: nn.Module) -> bool:
        wrapper = norm_type(module)(copy.deepcopy(module, self.memo), self.context, path)
        self.memo[id(module)] = wrapper
        reason = self.refusals.get(id(module))
        if reason is not None:
            return self._report(path, module, "refused", reason)
        if not self.task_norms or _matches(path, module, self.exclude):
            why = "excluded" if self.task_norms else "norms='shared'"
            return self._report(path, module, "skipped", f"{why}: {SHARED}, in eval mode")
        self.found.norms[path] = wrapper
        return self._report(path, module, "converted", wrapper.how)

    def _report(self, path: str, module: nn.Module, verdict: str, reason: str) -> bool:
        self.found.rows.append(Row(path or "(root)", type(module).__name__, verdict, reason))
        return True


def _check(model: nn.Module, head: str | None, norms: str) -> dict[str, nn.Module]:
    """The modules of ``model`` by path, if it can be adapted at all."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"TapsModel: model must be an nn.Module, got {type(model).__name__}")
    paths = dict(model.named_modules())
    if hasattr(model, "_orig_mod") and "_orig_mod" in model._modules:
        raise ValueError("TapsModel: model must be the module before torch.compile, got a compiled one")
    for path, module in paths.items():
        if isinstance(module, (TapsLayer, PerTask)):
            raise ValueError(f"TapsModel: model must not be adapted already, got a {type(module).__name__} at {path!r}")
        if any(isinstance(p, nn.UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(
                f"TapsModel: model must be initialised, got a lazy {type(module).__name__} at {path!r}: run it once"
            )
    if head is not None and head not in paths:
        last = last_linear(model)
        near = difflib.get_close_matches(str(head), [path for path in paths if path])
        hints = ([f"near: {', '.join(near)}"] if near else []) + ([f"the last Linear: {last}"] if last else [])
        raise ValueError(
            f"TapsModel: head must name a module of the model, got {head!r} ({'; '.join(hints) or 'it has no Linear'})"
        )
    if norms not in ("task", "shared"):
        raise ValueError(f"TapsModel: norms must be 'task' or 'shared', got {norms!r}")
    return paths


def _warn_of_tasks(model: nn.Module) -> None:
    """The model's forward takes ``tasks=`` for itself."""
    try:
        own = "tasks" in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # what cannot be looked at
        return
    if own:
        warnings.warn(
            "TapsModel: tasks= must say the tasks of a forward, got a network whose forward has a parameter of that "
            "name (give it by position, or call model.model(...) within model.running(...))",
            stacklevel=4,
        )


def last_linear(model: nn.Module) -> str | None:
    """The path of the last Linear, where most networks have their head; None where there is none inside."""
    return next((path for path, m in reversed(list(model.named_modules())) if path and isinstance(m, nn.Linear)), None)


def _patterns(name: str, patterns: Patterns, paths: dict[str, nn.Module]) -> list[str | type[nn.Module]]:
    """Module paths (globs) or types; each must match something."""
    found = [patterns] if isinstance(patterns, (str, type)) else list(patterns)
    for pattern in found:
        if not any(_matches(path, module, [pattern]) for path, module in paths.items()):
            known = [path for path in paths if path]
            hint = nearest(pattern, known) if isinstance(pattern, str) else "no module of this type"
            raise ValueError(f"TapsModel: {name} must match a module, got {pattern!r} ({hint})")
    return found


def _matches(path: str, module: nn.Module, patterns: Sequence[str | type[nn.Module]]) -> bool:
    return any(isinstance(module, p) if isinstance(p, type) else covers(p, path) for p in patterns)


def _frozen(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: each parameter's frozen twin, in the same storage."""
    memo: dict[int, Any] = computed(model)
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return memo


def computed(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses tensors with a graph, such as a hook's last normalised weight."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, torch.Tensor) and not t.is_leaf}


def _owns(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _is_norm(module: nn.Module) -> bool:
    """A norm with something to adapt (parameters or running statistics), or that mixes the samples of a batch."""
    if isinstance(module, _BatchNorm):
        return True
    if "Norm" not in type(module).__name__ or any(_owns(m) for m in module.modules() if m is not module):
        return False
    tracked = module._buffers.get("running_mean") is not None and "Frozen" not in type(module).__name__
    return tracked or any(p is not None for p in module._parameters.values())


def _disable_fast_paths(adapted: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Transformer encoders have a path in C++ that reads their layers' weights; their Python path calls the layers."""
    for path, module in adapted.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            yield path, "activation_relu_or_gelu", module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            yield path, "use_nested_tensor", module.use_nested_tensor
            module.use_nested_tensor = False
