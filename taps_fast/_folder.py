"""What of a `TapsModel` goes into a task folder, how it comes back, and what its tasks share."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import peft, store
from ._names import counted
from .convert import computed, last_linear
from .formats import FORMATS, Format
from .nn import TaskHead, TransposedLinear, WrappedLayer
from .nn.attention import TaskAttention
from .nn.head import check_head, new_head, width_of
from .nn.layer import TapsLayer
from .nn.per_task import PerTask, own_copy
from .sharing import LayerRecord, Sharing, TaskRecord
from .store import TaskFolderError

if TYPE_CHECKING:
    from .model import TapsModel

OF_EVERY_MODULE = {*vars(nn.Module()), "reset_running_stats"}
"""Tensors, children, hooks, the mode; and what rests in a base."""
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PLAIN = (str, int, float, complex, Enum, torch.dtype, types.FunctionType, types.BuiltinFunctionType)


class Loaded(NamedTuple):
    """What `TapsModel.load_task` did."""

    task: str
    tensors: int
    open_layers: int
    layers: int

    def __str__(self) -> str:
        matched, layers = counted(self.tensors, "tensor"), counted(self.layers, "layer")
        return f"{self.task}: {matched} matched, {self.open_layers} of {layers} open"

    def __repr__(self) -> str:
        return str(self)  # what a notebook shows


def base_tensors(module: nn.Module, prefix: str = "", *, head: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the base, under the names of the original model.

    The head is left out unless asked for: tasks replace it, so models may differ in it.
    """
    if isinstance(module, PerTask):
        if head or not isinstance(module, TaskHead):
            yield from base_tensors(module.base, prefix, head=head)
    elif isinstance(module, WrappedLayer):
        yield from base_tensors(module.module, prefix, head=head)
    elif isinstance(module, TapsLayer):
        yield prefix + "weight", module.base
        if module.base_bias is not None:
            yield prefix + "bias", module.base_bias
    else:
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, value
        for name, child in module._modules.items():
            if child is not None:
                # nn.MultiheadAttention's own name for its in-projection is in_proj_weight.
                joint = "_" if isinstance(module, TaskAttention) and name == "in_proj" else "."
                yield from base_tensors(child, plain_name(prefix + name + joint), head=head)


def plain_name(name: str) -> str:
    """A parameter's name without the levels that torch.compile, checkpoint_wrapper and FSDP put into it."""
    return _WRAPPED.sub("", name)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every sharded tensor gathered: of a sharded model, all processes must call this."""
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast(Tensor, gather())


def refuse_sharded(model: TapsModel, function: str) -> None:
    """What is sharded already does not learn of new parameters. The base and one task tell: there may be many tasks."""
    tensors = chain(base_tensors(model.model, head=True), *(_parameters_of(model, task) for task in model.tasks[-1:]))
    sharded = next((name for name, t in tensors if hasattr(t, "full_tensor")), None)
    if sharded is not None:
        raise ValueError(
            f"TapsModel.{function}: the model must get its tasks before it is sharded, got {sharded} sharded"
        )


def _parameters_of(model: TapsModel, task: str) -> Iterator[tuple[str, Tensor | None]]:
    """The dense deltas of a task, and the parameters of its norms and head."""
    for path, layer in model.conversion.layers.items():
        yield f"{path}.deltas.{task}", layer.deltas._parameters.get(task)
    for path, module in model.modules_of(task).items():
        yield from module.named_parameters(prefix=path)


def given_head(model: TapsModel, classes: int | None, head: nn.Module | None) -> dict[str, nn.Module]:
    """By path: the head of a new task, if one is said."""
    own = model.conversion.head
    if own is None and (classes is not None or head is not None):
        last = last_linear(model.model)
        found = f"its last Linear is {last!r}" if last is not None else "it has no Linear"
        raise ValueError(
            "TapsModel.add_task: classes and head must go with TapsModel(..., head=<path>), got a model without a head "
            f"({found})"
        )
    if own is None:
        return {}
    if classes is not None:
        if head is not None:
            raise ValueError("TapsModel.add_task: classes or head must be given, got both")
        head = new_head(own.base, classes, own.path)
    check_head("TapsModel.add_task", head, own.path)
    # The user's own stays as it is, and another task may be given it too.
    return {} if head is None else {own.path: copy.deepcopy(head, computed(head))}


@contextlib.contextmanager
def adding(model: TapsModel, task: str, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within, layers get what ``task`` has of them; then it gets norms and head: ``modules``, or the base's. All or
    nothing, and no other thread sees the task before."""
    with model.context.adding(task, functools.partial(forget, model)):
        yield
        for path, module in model.conversion.located().items():
            if isinstance(module, PerTask):
                module.add_task(task, modules.get(path))


def forget(model: TapsModel, task: str) -> None:
    """Takes from every module what ``task`` has there."""
    for module in model.conversion.located().values():
        module.remove_task(task)


def task_tensors(model: TapsModel, task: str) -> dict[str, Tensor]:
    """All that one task adds: scores, the deltas behind open gates, and every tensor of its norms and head."""
    with model.turns.forward():
        return _task_tensors(model, task)


def _task_tensors(model: TapsModel, task: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, layer in model.conversion.layers.items():
        tensors[f"{path}.score"] = layer.scores[task]
        if layer.is_open(task):
            delta = layer.original(task)
            if isinstance(delta, Format):
                tensors |= {f"{path}.delta.{name}": value for name, value in delta.tensors.items()}
            else:
                tensors[f"{path}.delta"] = delta.detach()  # what it holds now
            if task in layer.bias_deltas:
                tensors[f"{path}.bias_delta"] = layer.bias_deltas[task]
    for path, module in model.modules_of(task).items():
        tensors |= {f"{path}.{name}": value for name, value in module.state_dict().items()}
    return tensors


def task_meta(model: TapsModel, task: str) -> dict[str, Any]:
    """What a folder says besides its tensors, its name and the base's fingerprint."""
    return {
        "threshold": model.threshold,
        "gate": model.gate,
        "head": _head_recipe(model, task),
        "formats": {
            path: delta.name
            for path, layer in model.conversion.layers.items()
            if layer.is_open(task) and isinstance(delta := layer.delta(task), Format)
        },
        "sharing": sharing(model, [task]).as_dict(),
    }


def _head_recipe(model: TapsModel, task: str) -> dict[str, Any] | None:
    """How to make the head again: a copy of the base's, a layer with so many classes, or only by the user."""
    own = model.conversion.head
    if own is None:
        return None
    base, head = own.base, own.tasks[task]
    if _likeness(head) == _likeness(base):
        return {"kind": "copy"}
    if type(head) is type(base) and type(head) in (nn.Linear, nn.Conv2d):
        classes = width_of(head)
        # On meta no random numbers are drawn.
        if classes and _likeness(head) == _likeness(new_head(copy.deepcopy(base).to("meta"), classes, own.path)):
            return {"kind": "classes", "classes": classes}
    return {"kind": "custom", "type": type(head).__name__}


def _likeness(module: nn.Module) -> tuple[Any, ...]:
    """What modules must have in common to be the same function of their tensors: types, plain attributes, shapes."""
    own = [
        (type(m), *tree_flatten({key: value for key, value in vars(m).items() if key not in OF_EVERY_MODULE}))
        for m in module.modules()
    ]
    parts = [(kind, [v if isinstance(v, _PLAIN) else type(v) for v in leaves], spec) for kind, leaves, spec in own]
    return parts, {name: t.shape for name, t in module.state_dict().items()}


def build_modules(model: TapsModel, meta: dict[str, Any], head: nn.Module | None) -> dict[str, nn.Module]:
    """New norms and a new head, by path, into which a folder's tensors fit. ``model`` is not changed."""
    modules = {path: own_copy(norm.base) for path, norm in model.conversion.norms.items()}
    own, recipe = model.conversion.head, meta.get("head")
    if (own is None) != (recipe is None):
        with_head, without = ("the folder", "the model") if own is None else ("the model", "the folder")
        raise TaskFolderError(f"load_task: head must be in both, got one in {with_head} and none in {without}")
    if own is None or recipe is None:
        return modules
    check_head("load_task", head, own.path)
    if head is None and recipe["kind"] == "copy":
        head = own_copy(own.base)
    elif head is None and recipe["kind"] == "classes":
        head = new_head(own.base, recipe["classes"], own.path)
    elif head is None:
        raise TaskFolderError(
            f"load_task: head must be given for task {meta['task']!r}, whose head is a {recipe.get('type')} of its own"
        )
    else:
        head = copy.deepcopy(head, computed(head))  # the user's own stays as it is
    return {**modules, own.path: head}


def read_formats(model: TapsModel, tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Format]:
    """The compressed deltas of a folder, by path; what is missing of one is left to `expected` to say."""
    found: dict[str, Format] = {}
    for path, name in meta.get("formats", {}).items():
        if name not in FORMATS:
            raise TaskFolderError(
                f"load_task: format of {path!r} must be one of {', '.join(FORMATS)}, got {name!r} "
                f"(saved by {meta['library']})"
            )
        start = f"{path}.delta."
        own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if path in model.conversion.layers:
            shape = tuple(model.conversion.layers[path].base.shape)
            try:
                found[path] = FORMATS[name](shape, **own)
            except (TypeError, ValueError) as error:
                raise TaskFolderError(f"load_task: delta of {path!r} must be a whole {name} delta: {error}") from None
    return found


def expected(
    model: TapsModel, meta: dict[str, Any], modules: dict[str, nn.Module], formats: dict[str, Format]
) -> dict[str, Tensor]:
    """What a folder must hold: a delta where its table says open, and none elsewhere.

    The score does not tell: that of a task without storage may be above the threshold.
    """
    opened = {layer.name for layer in Sharing.from_dict(meta["sharing"]).layers if any(layer.open.values())}
    wanted: dict[str, Tensor] = {}
    for path, layer in model.conversion.layers.items():
        wanted[f"{path}.score"] = layer.base.new_empty((), dtype=torch.float32)
        if path in opened:
            if path in formats:
                own = formats[path].to(dtype=layer.base.dtype).tensors
                wanted |= {f"{path}.delta.{name}": value for name, value in own.items()}
            else:
                wanted[f"{path}.delta"] = layer.base
            if layer.base_bias is not None:
                wanted[f"{path}.bias_delta"] = layer.base_bias
    for path, module in modules.items():
        wanted |= {f"{path}.{name}": value for name, value in module.state_dict().items()}
    return wanted


def load(model: TapsModel, folder: str | os.PathLike[str], name: str | None, head: nn.Module | None) -> Loaded:
    """What `TapsModel.load_task` does."""
    tensors, meta = store.read_task(folder)
    for key, value in (("threshold", model.threshold), ("gate", model.gate)):
        if meta.get(key) != value:
            raise TaskFolderError(
                f"load_task: task {meta['task']!r} must have this model's {key}, {value}, got {meta.get(key)}"
            )
    modules = build_modules(model, meta, head)
    formats = read_formats(model, tensors, meta)
    store.check_against(meta, tensors, expected(model, meta, modules, formats), model.fingerprint())
    for path, module in modules.items():
        names = {key: tensors[f"{path}.{key}"] for key in module.state_dict()}
        module.load_state_dict(names)
    task = meta["task"] if name is None else name
    if task in model.context.tasks:
        raise ValueError(
            f"load_task: name must be new, got {task!r} (tasks: {', '.join(model.context.tasks)}; "
            "load_task(folder, name=...) loads it under another)"
        )
    opened = 0
    with adding(model, task, modules):
        for path, layer in model.conversion.layers.items():
            is_open = f"{path}.delta" in tensors or path in formats
            layer.add_task(task, score=tensors[f"{path}.score"].item(), delta=is_open)
            opened += is_open
            for key, owned in (("delta", layer.deltas), ("bias_delta", layer.bias_deltas)):
                if f"{path}.{key}" in tensors:
                    owned[task].data.copy_(tensors[f"{path}.{key}"])
            if path in formats:
                layer.set_delta(task, formats[path])
    return Loaded(task, len(tensors), opened, len(model.conversion.layers))


def load_lora(
    model: TapsModel, folder: str | os.PathLike[str], name: str, classes: int | None, head: nn.Module | None
) -> Loaded:
    """What `TapsModel.load_lora` does."""
    layers = model.conversion.layers
    transposed = [path for path, layer in layers.items() if isinstance(layer, TransposedLinear)]
    found, saved = peft.read(folder)
    deltas = peft.match(found, {path: layer.base.shape for path, layer in layers.items()}, transposed)
    with adding(model, name, _saved_head(model, saved, classes, head)):
        for path, layer in layers.items():
            opened = 1.0 if model.gate == "raw" else layer.initial_score
            layer.add_task(name, score=opened if path in deltas else model.threshold - 1.0, delta=path in deltas)
            if path in deltas:
                layer.set_delta(name, deltas[path])
    return Loaded(name, 2 * len(deltas) + len(saved), len(deltas), len(layers))


def _saved_head(
    model: TapsModel, saved: dict[str, Tensor], classes: int | None, head: nn.Module | None
) -> dict[str, nn.Module]:
    """As `given_head`, with the values that an adapter has of it."""
    own = model.conversion.head
    peft.check_saved(saved, None if own is None else own.path)
    if own is None or not saved:
        return given_head(model, classes, head)
    values = {name.removeprefix(f"{own.path}."): value for name, value in saved.items()}
    if classes is None and head is None and "weight" in values and width_of(own.base) != len(values["weight"]):
        classes = len(values["weight"])
    modules = given_head(model, classes, head) or {own.path: own_copy(own.base)}
    try:
        modules[own.path].load_state_dict(values)
    except RuntimeError as error:
        raise peft.AdapterError(f"read_lora: the head that is saved must fit the task's: {error}") from None
    return modules


def sharing(model: TapsModel, tasks: list[str]) -> Sharing:
    """The layer × task record of ``tasks``."""
    layers = []
    for path, layer in model.conversion.layers.items():
        own = [t for t in (layer.base, layer.base_bias) if t is not None]
        numel, size = sum(t.numel() for t in own), sum(t.nbytes for t in own)
        kind = "linear" if layer.base.dim() == 2 else "conv2d"
        opened = {task: layer.is_open(task) for task in tasks}
        layers.append(LayerRecord(path, kind, numel, size, layer.macs, opened, compressed_bytes(layer, tasks)))
    head = model.conversion.head
    records = {}
    for task in tasks:
        norms = [norm.tasks[task] for norm in model.conversion.norms.values()]
        heads = [] if head is None else [head.tasks[task]]
        records[task] = TaskRecord(*_size(norms), *_size(heads))
    base = {id(t): t for _, t in base_tensors(model.model, head=True)}.values()
    parameters = sum(t.numel() for t in base if isinstance(t, nn.Parameter))
    head_bytes = 0 if head is None else _size([head.base])[1]
    return Sharing(layers, records, parameters, sum(t.nbytes for t in base), head_bytes)


def compressed_bytes(layer: TapsLayer, tasks: list[str]) -> dict[str, int]:
    """By task whose delta has a format: its bytes, those of the bias delta included."""
    bias = 0 if layer.base_bias is None else layer.base_bias.nbytes
    deltas = {task: layer.delta(task) for task in tasks if task in layer.deltas}
    return {task: delta.bytes + bias for task, delta in deltas.items() if isinstance(delta, Format)}


def _size(modules: list[nn.Module]) -> tuple[int, int]:
    """Parameters, and bytes with buffers."""
    parameters = [p for module in modules for p in module.parameters()]
    buffers = [b for module in modules for b in module.buffers()]
    return sum(p.numel() for p in parameters), sum(t.nbytes for t in (*parameters, *buffers))
