"""Modules of which every task has a copy of its own, norms and heads, and what rests beside them: the base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._pytree import tree_leaves

from .context import BASE_NAME, Layout, Located, Mix, TaskContext, task_by_task
from .mixed_weight import MixedWeight

_Call = Callable[[nn.Module, Tensor], Any]


class Undecided(ValueError, AttributeError):
    """An attribute was read that depends on the task, and none of several is active."""


class PerTask(Located, nn.Module):
    """A frozen ``base`` module and, in ``tasks``, one of its kind for each task.

    One task active: that task's module runs, exactly as if it stood here. In a mixed batch each task's rows go
    through its own module; subclasses do that in one pass where they know what all of them do, else it runs task by
    task.

    Attributes it lacks are those of the active task's module, so code that reads ``norm.eps`` or ``head.weight``
    goes on working. Where several tasks may be meant, they are those in which their modules agree, and of tensors the
    shape and type (`MixedWeight`); with none active, others are not there for ``hasattr``.

    Args:
        base: what stood here in the network.
        context: the model's, with the names of its tasks.
        path: where it is in the network, for messages.
    """

    def __init__(self, base: nn.Module, context: TaskContext, path: str) -> None:
        super().__init__()
        self._locate_in(context, path)
        self.base = base
        self.tasks = nn.ModuleDict()
        self.agreed: dict[str, Tensor] = {}
        """How many batches each norm of a task had counted when it was the same in all processes."""
        self.register_load_state_dict_post_hook(_agree)  # type: ignore[no-untyped-call]
        self.train(base.training)

    def add_task(self, task: str, module: nn.Module | None = None) -> None:
        """Gives ``task`` a module: ``module``, or a trainable copy of the base."""
        if module is None:
            module = own_copy(self.base)
        self.tasks[task] = module.train(self.training)
        self.agree(task)

    def remove_task(self, task: str) -> None:
        """Forgets the module of ``task``, if it has one."""
        if task in self.tasks:
            del self.tasks[task]

    def counting(self, task: str) -> dict[str, Any]:
        """What moves running statistics by itself in the task's module, by name."""
        norms = self.tasks[task].named_modules(prefix=task)
        return {
            name: norm
            for name, norm in norms
            if norm._buffers.get("num_batches_tracked") is not None and not isinstance(norm, nn.SyncBatchNorm)
        }

    def agree(self, *tasks: str) -> None:
        """Notes that all processes have the same statistics of ``tasks`` now."""
        for task in tasks:
            self.agreed |= {name: norm.num_batches_tracked.clone() for name, norm in self.counting(task).items()}

    def of(self, task: str | None) -> nn.Module:
        """The module of ``task``; the base for None, and for every task where none has its own."""
        return self.tasks[task] if task is not None and len(self.tasks) else self.base

    padded = False
    """Whether outputs of a batch with ids differ from those of a task alone, even if all samples are of one task."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        selection = self.selected()
        mix = selection.present or selection.mix
        if mix is None or (selection.uniform and not self.padded):
            return self.of(selection.task)(*args, **kwargs)
        tasks: Any = self._modules["tasks"]  # a small norm takes no longer than a few calls of __getattr__
        if not tasks._modules:
            return self.untold(*args, **kwargs)
        x, call = self._one_tensor(args, kwargs)
        layout = self.layout(x, mix.batch)
        y = self.together(x, mix, layout) if len(args) + len(kwargs) == 1 else None
        return self.apart(x, mix, layout, call) if y is None else y

    def _one_tensor(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
        """What has the samples, and how a module is called with other rows in its place."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return args[0], _called
        given = [*args, *kwargs.values()]
        places = [place for place, value in enumerate(given) if isinstance(value, Tensor)]
        tensors = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(given))
        if not places or tensors > 1:
            got = "several" if tensors > 1 else "none"
            raise TypeError(f"{self.path}: a module of each task must take one tensor in a mixed batch, got {got}")

        def call(module: nn.Module, rows: Tensor) -> Any:
            own = [*given[: places[0]], rows, *given[places[0] + 1 :]]
            return module(*own[: len(args)], **dict(zip(kwargs, own[len(args) :], strict=True)))

        return given[places[0]], call

    def together(self, x: Tensor, mix: Mix, layout: Layout) -> Tensor | None:
        """All tasks in one pass, if that gives what their own modules would; None: they have to run."""
        return None

    def apart(self, x: Tensor, mix: Mix, layout: Layout, call: _Call) -> Tensor:
        """Task by task."""
        shapes: dict[str, list[int]] = {}

        def run(task: int, rows: Tensor) -> Tensor:
            name = None if task < 0 else mix.tasks[task]
            y: Tensor = call(self.of(name), rows)
            if isinstance(y, Tensor):
                y = self.finish(y)
                shapes[name or BASE_NAME] = [size for axis, size in enumerate(y.shape) if axis != layout.axis]
                self._check_shapes(shapes)
            return y

        return task_by_task(x, mix.batch, layout, self.path, run)

    def _check_shapes(self, shapes: dict[str, list[int]]) -> None:
        first, *others = shapes.values()
        if any(other != first for other in others):
            got = ", ".join(f"{shape} of {name!r}" for name, shape in shapes.items())
            raise ValueError(
                f"{self.path}: outputs of all tasks must be of one shape in a mixed batch, got {got} a sample (heads "
                "that end in a Linear or convolution are padded to one width; else run one task a batch)"
            )

    def untold(self, *args: Any, **kwargs: Any) -> Any:
        """A mixed batch where no task has a module of its own."""
        return self.base(*args, **kwargs)

    def finish(self, y: Tensor) -> Tensor:
        """What makes the outputs of different tasks fit into one tensor."""
        return y

    def in_order(self, tasks: Sequence[str]) -> list[Any]:
        """The base, then the modules of ``tasks``: what row ``id + 1`` of a table belongs to."""
        return [self.base, *(self.tasks[task] for task in tasks)]

    @property
    def how(self) -> str:
        """One line for the conversion report."""
        return "one per task; mixed batches run task by task"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            special = name.startswith("__") and name.endswith("__")  # such as __deepcopy__ of a parametrized base
            if special or not hasattr(self.__dict__.get("_modules", {}).get("base"), name):
                raise
            if not len(self.tasks):
                return getattr(self.base, name)
            refusal: Exception
            try:
                selection = self.selected()
            except ValueError as error:  # of several tasks none is active, as in code that looks at a network
                modules, refusal = [*self.tasks.values()], Undecided(str(error))
            else:
                mix = selection.present or selection.mix
                if mix is None:
                    return getattr(self.of(selection.task), name)
                why = "got a mixed batch, whose samples differ in it"
                refusal = RuntimeError(f"{self.path}: {name} must be used with one task active, {why}")
                modules = self.in_order(mix.tasks)
            value, *others = (getattr(module, name) for module in modules)
            if isinstance(value, Tensor) and all(_alike(value, other) for other in others):
                return MixedWeight.of(value, str(refusal))
            if isinstance(value, (Tensor, nn.Module)) or any(other != value for other in others):
                raise refusal from None
            return value


def _called(module: nn.Module, rows: Tensor) -> Any:
    return module(rows)


def ordinary(modules: Sequence[nn.Module], *settings: str) -> bool:
    """Whether calls of these modules run the forward of one type and nothing else.

    ``settings``: attributes in which they must be equal.
    """
    kind, wanted = type(modules[0]), modules[0].__dict__
    for module in modules:
        own = module.__dict__  # in every mixed forward of every norm: attributes of modules take longer
        if type(module) is not kind or "forward" in own:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        for name in settings:
            if own.get(name) != wanted.get(name):
                return False
    return True


def rest(adapted: nn.Module, resting: Sequence[nn.Module]) -> None:
    """Puts every module of the base that a forward in training mode would change into eval mode.

    ``resting``: those that were found by such a forward; running statistics and spectral norms are known without.
    """
    for _, module in of_base(adapted):
        tracks = module._buffers.get("running_mean") is not None
        if _iterates(module) or tracks:
            module.training = False
        if tracks and hasattr(module, "reset_running_stats"):
            module.__dict__["reset_running_stats"] = keep_statistics
    for module in resting:
        module.training = False


def of_base(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of an adapted network but those of a task of its own, by path."""
    yield path, module
    for name, child in [("base", module.base)] if isinstance(module, PerTask) else module.named_children():
        yield from of_base(child, f"{path}.{name}" if path else name)


def _iterates(module: nn.Module) -> bool:
    """Whether this is a spectral norm, of either kind: in training each forward is one more step of its iteration."""
    hooked = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return hooked or isinstance(module, _SpectralNorm)


def keep_statistics() -> None:
    """Stands in for ``reset_running_stats`` of norms of the base: `torch.optim.swa_utils.update_bn` asks all for it."""


def own_copy(base: nn.Module) -> nn.Module:
    """A trainable copy of a base, which rests no more."""
    return released(copy.deepcopy(base).requires_grad_())


def released(module: nn.Module) -> nn.Module:
    """Gives norms that were of a base ``reset_running_stats`` back."""
    for part in module.modules():
        if vars(part).get("reset_running_stats") is keep_statistics:
            del part.reset_running_stats
    return module


def _agree(module: PerTask, _: object) -> None:
    """After a state dict, which is the same in all processes."""
    module.agree(*module.tasks)


def _alike(value: Tensor, other: object) -> bool:
    return isinstance(other, Tensor) and (other.shape, other.dtype) == (value.shape, value.dtype)
