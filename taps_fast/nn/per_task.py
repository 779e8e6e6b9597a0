"""Modules of which every task has a copy of its own, norms and heads, and what rests beside them: the base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .context import Layout, Located, Mix, TaskContext, task_by_task
from .mixed_weight import MixedWeight


class PerTask(Located, nn.Module):
    """A frozen ``base`` module and, in ``tasks``, one of its kind for each task.

    One task active: that task's module runs, exactly as if it stood here. In a mixed batch each task's rows go
    through its own module; subclasses do that in one pass where they know the type, else it runs task by task.

    Attributes it lacks are those of the active task's module, so code that reads ``norm.eps`` or ``head.weight``
    goes on working.

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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        selection = self.selected()
        if selection.mix is None or (selection.uniform and not self.padded):
            return self.of(selection.task)(x, *args, **kwargs)
        if not len(self.tasks):
            return self.untold(x, *args, **kwargs)
        if (args or kwargs) and any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise TypeError(f"{self.path}: a module of each task must take one tensor in a mixed batch, got several")
        return self.mixed(x, selection.mix, self.layout(x, selection.mix.batch), *args, **kwargs)

    def mixed(self, x: Tensor, mix: Mix, layout: Layout, *args: Any, **kwargs: Any) -> Tensor:
        """One forward for a batch of several tasks; here: task by task."""

        def run(task: int, rows: Tensor) -> Tensor:
            module = self.of(None if task < 0 else mix.tasks[task])
            return self.finish(module(rows, *args, **kwargs))

        return task_by_task(x, mix.batch, layout, self.path, run)

    def untold(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A mixed batch where no task has a module of its own."""
        return self.base(x, *args, **kwargs)

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
            selection = self.selected()
            if selection.mix is None or not len(self.tasks):
                return getattr(self.of(selection.task), name)
            value, *others = (getattr(module, name) for module in self.in_order(selection.mix.tasks))
            text = (
                f"{self.path}: {name} must be used with one task active, got a mixed batch, whose samples differ in it"
            )
            if isinstance(value, Tensor) and all(_alike(value, other) for other in others):
                return MixedWeight.of(value, text)
            if isinstance(value, (Tensor, nn.Module)) or any(other != value for other in others):
                raise RuntimeError(text) from None
            return value


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
