"""Where a layer keeps what each of its tasks owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Owned(nn.ParameterDict):
    """What each task owns in a layer. Found without attribute access, whose detours each forward would pay a task."""

    def __getitem__(self, task: str) -> Any:
        found: Any = self._parameters.get(task)
        if found is None:
            found = self._modules.get(task)
        # FSDP and parametrizations may have put something else in its place.
        return super().__getitem__(task) if found is None else found

    def each(self, tasks: Sequence[str]) -> list[Any]:
        """What each of ``tasks`` owns, None where that is nothing."""
        found: list[Any] = list(map(self._parameters.get, tasks))
        for t, own in enumerate(found):
            if own is None and tasks[t] in self:
                found[t] = self[tasks[t]]
        return found

    def trained(self, task: str, path: str) -> list[nn.Parameter]:
        """The parameters that what ``task`` owns is made of; ``path``, the layer's, is for messages."""
        parametrized = parametrize.is_parametrized(self, task)
        held = cast(nn.ModuleDict, self.parametrizations)[task] if parametrized else self[task]
        if isinstance(held, nn.Parameter):
            return [held]
        if isinstance(held, nn.Module):
            return [parameter for parameter in held.parameters() if parameter.requires_grad]
        raise ValueError(
            f"TapsModel.task_parameters: what task {task!r} trains in {path!r} must be a parameter, or made of some by "
            f"torch.nn.utils.parametrize, got a {type(held).__name__} that was made once (hooks, such as those of "
            "torch.nn.utils.prune, do not run here)"
        )


class Scores(Owned):
    """Scores stay float32 when a model changes dtype: a rounded score could cross the threshold."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scores:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The scores themselves."""
        return "\n".join(f"({task}): {_shown(score)}" for task, score in self.items())


def _shown(score: Tensor) -> str:
    try:
        return f"{score.item():.4g}"
    except RuntimeError:  # on the meta device there is none
        return "?"


def put(parameter: Tensor, values: Tensor) -> None:
    """Gives a parameter other storage, for others may share its own: state dicts, models, processes.

    Graphs that saved it refuse their backward then, as if it had been written to.
    """
    parameter.data = values
    torch.autograd.graph.increment_version(parameter)
