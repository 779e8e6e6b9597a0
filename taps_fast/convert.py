"""What of a model is adapted: converted, skipped or refused, and why."""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from ._problem import DTYPES
from .nn import FastTapsConv2d, FastTapsLinear, TaskContext, TaskHead, WrappedLayer
from .nn.context import nearest
from .nn.layer import TapsLayer
from .nn.norm import TaskNorm, norm_type
from .nn.per_task import PerTask

Patterns = Sequence[str | type[nn.Module]] | str | type[nn.Module]


class Row(NamedTuple):
    """One module in the report."""

    path: str
    type: str
    verdict: str
    """"converted", "skipped" or "refused"."""
    reason: str


@dataclass
class Conversion:
    """What `TapsModel` made of a network; ``print`` shows one row a module that has parameters."""

    rows: list[Row] = field(default_factory=list)
    layers: dict[str, TapsLayer] = field(default_factory=dict)
    norms: dict[str, TaskNorm] = field(default_factory=dict)
    head: TaskHead | None = None
    restored: list[tuple[str, str, Any]] = field(default_factory=list)
    """(module, attribute, value): what a merged model gets back."""

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
        return "\n".join([*lines, f"{total}; {len(self.layers)} layers have gates"])


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
    """An adapted copy of ``model``, whose parameters are frozen but in the same storage, and what was done.

    One ``deepcopy`` does all of it: its memo says what replaces each parameter and each adapted module, so tied
    parameters stay tied, a module used twice stays one, and references in lists or attributes follow.
    """
    paths = {path: module for path, module in model.named_modules()}
    _check(model, paths, head, norms)
    include = None if include is None else _patterns("include", include, paths)
    exclude = _patterns("exclude", exclude, paths)
    memo = _frozen(model)
    conversion = Conversion()
    refusals = _refusals(model)

    inside = ""  # a module whose inside has been decided with it
    for path, module in paths.items():
        if inside and path.startswith(inside + "."):
            continue
        inside = ""
        kind = type(module).__name__
        if path == head:
            inside = path
            conversion.head = TaskHead(copy.deepcopy(module, memo), context, path)
            memo[id(module)] = conversion.head
            conversion.rows.append(Row(path, kind, "converted", f"head: {conversion.head.how}"))
            continue
        adaptable = isinstance(module, (nn.Linear, nn.Conv2d))
        is_norm = not adaptable and _is_norm(module)
        if not (adaptable or is_norm or _owns(module)):
            continue
        if not (adaptable or is_norm):
            reason = refusals.get(id(module))
            verdict, text = ("refused", reason) if reason else ("skipped", f"{kind} is not adapted: shared and frozen")
            conversion.rows.append(Row(path, kind, verdict, text))
            continue
        reason = refusals.get(id(module))
        if is_norm:
            inside = path
            wrapper = norm_type(module)(copy.deepcopy(module, memo), context, path)
            memo[id(module)] = wrapper
            if norms == "task" and reason is None and not _matches(path, module, exclude):
                conversion.norms[path] = wrapper
                conversion.rows.append(Row(path, kind, "converted", wrapper.how))
            else:
                why = "excluded" if norms == "task" else "norms='shared'"
                verdict = ("refused", reason) if reason else ("skipped", f"{why}: shared, frozen, in eval mode")
                conversion.rows.append(Row(path, kind, *verdict))
            continue
        if _matches(path, module, exclude):
            conversion.rows.append(Row(path, kind, "skipped", "excluded: shared and frozen"))
        elif include is not None and not _matches(path, module, include):
            conversion.rows.append(Row(path, kind, "skipped", "not included: shared and frozen"))
        elif reason is not None:
            conversion.rows.append(Row(path, kind, "refused", reason))
        else:
            inside = path
            layer, how = _layer(module, memo, context, options)
            layer.path = path
            memo[id(module)] = conversion.layers[path] = layer
            conversion.rows.append(Row(path, kind, "converted", how))

    adapted = copy.deepcopy(model, memo)
    conversion.restored = list(_disable_fast_paths(adapted))
    return adapted, conversion


def _check(model: nn.Module, paths: dict[str, nn.Module], head: str | None, norms: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"TapsModel: model must be an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") and "_orig_mod" in model._modules:
        raise ValueError("TapsModel: model must be the module before torch.compile, got a compiled one")
    for path, module in paths.items():
        if isinstance(module, (TapsLayer, PerTask)):
            raise ValueError(f"TapsModel: model must not be adapted already, got a {type(module).__name__} at {path!r}")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(
                f"TapsModel: model must be initialised, got a lazy {type(module).__name__} at {path!r}: run it once"
            )
    if head is not None and head not in paths:
        raise ValueError(
            f"TapsModel: head must name a module of the model, got {head!r} ({nearest(head, list(paths))})"
        )
    if norms not in ("task", "shared"):
        raise ValueError(f"TapsModel: norms must be 'task' or 'shared', got {norms!r}")


def _patterns(name: str, patterns: Patterns, paths: dict[str, nn.Module]) -> list[str | type[nn.Module]]:
    """Module paths (globs) or types; each must match something."""
    found = [patterns] if isinstance(patterns, (str, type)) else list(patterns)
    for pattern in found:
        if not any(_matches(path, module, [pattern]) for path, module in paths.items()):
            hint = nearest(pattern, list(paths)) if isinstance(pattern, str) else "no module of this type"
            raise ValueError(f"TapsModel: {name} must match a module, got {pattern!r} ({hint})")
    return found


def _matches(path: str, module: nn.Module, patterns: Sequence[str | type[nn.Module]]) -> bool:
    return any(
        isinstance(module, p)
        if isinstance(p, type)
        else fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, p + ".*")
        for p in patterns
    )


def _frozen(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy: each parameter's frozen twin, in the same storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # such as a hook's last normalised weight
                memo[id(value)] = value.detach().clone()
    return memo


def _owns(module: nn.Module) -> bool:
    return bool(module._parameters or module._buffers)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with something to adapt: parameters or running statistics of its own."""
    if not _owns(module) or isinstance(module, (nn.Embedding, nn.LocalResponseNorm)):
        return False
    named = "Norm" in type(module).__name__ and not isinstance(module, (nn.ModuleList, nn.Sequential))
    own = [p for p in module._parameters.values() if p is not None]
    return named and (
        bool(own) or getattr(module, "running_mean", None) is not None and "Frozen" not in type(module).__name__
    )


def _refusals(model: nn.Module) -> dict[int, str]:
    """Why modules cannot be adapted without the risk of a silently wrong result, by id."""
    reasons: dict[int, str] = {}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
        if isinstance(module, nn.MultiheadAttention):
            reason = "MultiheadAttention reads its weights itself and never calls its layers: shared and frozen"
            reasons |= {id(child): reason for child in module.modules()}
    for path, module in model.named_modules():
        if id(module) in reasons:
            continue
        if parametrize.is_parametrized(module):
            reasons[id(module)] = (
                f"parametrized ({', '.join(module.parametrizations)}): shared and frozen; remove it first"  # type: ignore[union-attr,arg-type]
            )
        elif "forward" in vars(module):
            reasons[id(module)] = "its forward was replaced on the instance: shared and frozen"
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            reason = _weight_refusal(module)
            if reason is not None:
                reasons[id(module)] = reason
        for name, parameter in module._parameters.items():
            others = [o for o in owners.get(id(parameter), []) if o != (f"{path}.{name}" if path else name)]
            if others and id(module) not in reasons:
                reasons[id(module)] = f"its {name} is tied with {', '.join(others)}: shared and frozen"
    return reasons


def _weight_refusal(module: nn.Linear | nn.Conv2d) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        names = ", ".join(name for name, p in module._parameters.items() if p is not None)
        return (
            f"its weight is computed by a hook from {names or 'elsewhere'} (weight or spectral norm): shared and frozen"
        )
    if type(module).__module__.startswith("torch.ao."):
        return f"{type(module).__name__} is quantised: shared and frozen"
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}: shared and frozen"
    lora = [name for name, _ in module.named_parameters() if name.startswith("lora_")]
    if lora:
        return f"LoRA ({', '.join(lora)}) merges into its weight in place: shared and frozen; merge it first"
    return None


def _layer(
    module: nn.Linear | nn.Conv2d, memo: dict[int, Any], context: TaskContext, options: dict[str, Any]
) -> tuple[TapsLayer, str]:
    # Any subclass may have a forward of its own, and hooks belong to the module: both are kept by wrapping.
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) in (nn.Linear, nn.Conv2d) and not hooked:
        bare = copy.copy(module)
        bare._parameters = {name: memo.get(id(p), p) for name, p in module._parameters.items()}
        if isinstance(bare, nn.Linear):
            return FastTapsLinear.from_linear(bare, context=context, **options), "a gated delta a task"
        return FastTapsConv2d.from_conv2d(bare, context=context, **options), "a gated delta a task"
    layer = WrappedLayer(copy.deepcopy(module, memo), context, **options)
    return layer, layer.how


def _disable_fast_paths(adapted: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Transformer encoders have a path in C++ that reads their layers' weights; their Python path calls the layers."""
    for path, module in adapted.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            yield path, "activation_relu_or_gelu", module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            yield path, "use_nested_tensor", module.use_nested_tensor
            module.use_nested_tensor = False
