"""Norms of which every task has its own: affine parameters, and running statistics of batch norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._problem import rows_per_sample
from ..norms import batch_norm, batch_norm_eval, group_norm, has_operators
from ..tasks import TaskBatch, picked
from .context import Layout, Mix
from .per_task import PerTask, ordinary

STATISTICS = ("running_mean", "running_var")


def norm_type(module: nn.Module) -> type[TaskNorm]:
    """The class that runs mixed batches of ``module`` best: in one pass where its forward is the one we know."""
    known = [norm for norm in (TaskBatchNorm, TaskLayerNorm, TaskGroupNorm) if type(module) in norm.types]
    return known[0] if known and ordinary([module]) else TaskNorm


class TaskNorm(PerTask):
    """A norm for each task, of any type: mixed batches run task by task.

    Subclasses know types whose mixed batches run in one pass, as long as every task's module is of the base's type, has
    its settings, and neither hooks nor a forward of its own.

    Args:
        base, context, path: as in `PerTask`.
    """

    types: Sequence[type[nn.Module]] = ()
    """What runs in one pass."""
    settings: Sequence[str] = ()
    """The attributes that must then be the same in all."""

    def train(self, mode: bool = True) -> TaskNorm:
        super().train(mode)
        self.base.eval()  # the base's running statistics never change
        return self

    def untold(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base, _BatchNorm) and self.base.running_mean is None:
            raise RuntimeError(
                f"{self.path}: a shared {type(self.base).__name__} must track running statistics in a mixed batch, got "
                "one that would mix the samples of all tasks"
            )
        return super().untold(*args, **kwargs)

    def together(self, x: Tensor, mix: Mix, layout: Layout) -> Tensor | None:
        norms = self._groups(mix)
        if type(norms[-1]) not in self.types or not ordinary(norms, *self.settings):
            return None
        weight, bias = _held(norms, "weight"), _held(norms, "bias")
        return None if weight is None or bias is None else self._one_pass(x, mix, layout, norms, weight, bias)

    def _one_pass(
        self, x: Tensor, mix: Mix, layout: Layout, norms: list[Any], weight: list[Tensor], bias: list[Tensor]
    ) -> Tensor:
        """What ``norms`` give, with these parameters of each, or none."""
        raise NotImplementedError

    def apart(self, x: Tensor, mix: Mix, layout: Layout, call: Any) -> Tensor:
        if self.training and any(isinstance(norm, nn.SyncBatchNorm) for norm in self._groups(mix)):
            raise RuntimeError(
                f"{self.path}: SyncBatchNorm must train with one task a forward, got a mixed batch, in which processes "
                "could disagree about the tasks present"
            )
        return super().apart(x, mix, layout, call)

    def _groups(self, mix: Mix) -> list[Any]:
        """The modules that rows of tables belong to: of each task, and last the base's."""
        modules: Any = self._modules  # a small norm takes no longer than a few calls of __getattr__
        own = modules["tasks"]._modules
        return [*[own[task] for task in mix.tasks], modules["base"]]


class TaskLayerNorm(TaskNorm):
    """Layer and RMS norms: one pass that normalises, with each sample's own scale and shift."""

    types = (nn.LayerNorm, nn.RMSNorm)
    settings = ("eps", "normalized_shape")

    def _one_pass(
        self, x: Tensor, mix: Mix, layout: Layout, norms: list[Any], weight: list[Tensor], bias: list[Tensor]
    ) -> Tensor:
        norm: Any = self.base
        inner = len(norm.normalized_shape)
        if layout.axis >= x.dim() - inner:
            raise ValueError(
                f"{self.path}: the batch axis must not be normalised over in a mixed batch, got axis {layout.axis} of "
                f"{tuple(x.shape)} and normalized_shape {tuple(norm.normalized_shape)}"
            )
        if x.shape[-inner:] != norm.normalized_shape:
            raise ValueError(
                f"{self.path}: the last axes of its input must be {tuple(norm.normalized_shape)}, got {tuple(x.shape)}"
            )
        batch = layout.spread(mix.batch, x.shape[layout.axis], self.path)
        x = _as_autocast(x)
        center = not isinstance(norm, nn.RMSNorm)
        # The default eps of an RMS norm is that of the type it computes in.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if norm.eps is None else norm.eps
        rows = x.flatten(-inner).flatten(0, -2)
        each = rows_per_sample(self.path, x, batch.size, layout.axis, x.dim() - inner)
        return group_norm(rows, weight, bias, 1, eps, batch, center=center, inner=each).view(x.shape)

    @property
    def how(self) -> str:
        return "one per task; mixed batches normalise in one pass, with gathered scale and shift"


class TaskGroupNorm(TaskNorm):
    """Group norms: one pass that normalises, with each sample's own scale and shift."""

    types = (nn.GroupNorm,)
    settings = ("eps", "num_groups")
    images_first = True

    def _one_pass(
        self, x: Tensor, mix: Mix, layout: Layout, norms: list[Any], weight: list[Tensor], bias: list[Tensor]
    ) -> Tensor:
        norm: Any = self.base
        _check_first(self, layout)
        batch = layout.spread(mix.batch, x.shape[0], self.path)
        return group_norm(_as_autocast(x), weight, bias, norm.num_groups, norm.eps, batch)

    @property
    def how(self) -> str:
        return "one per task; mixed batches normalise in one pass, with gathered scale and shift"


class TaskBatchNorm(TaskNorm):
    """Batch norms: running statistics of each sample's task; in training, the statistics of each task's own rows.

    The base's rows use the base's running statistics in training too, which never change.
    """

    types = (nn.BatchNorm1d, nn.BatchNorm2d)
    settings = ("num_features",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.images_first = isinstance(self.base, nn.BatchNorm2d)

    def _one_pass(
        self, x: Tensor, mix: Mix, layout: Layout, norms: list[Any], weight: list[Tensor], bias: list[Tensor]
    ) -> Tensor:
        _check_first(self, layout)
        norms[0]._check_input_dim(x)
        batch = layout.spread(mix.batch, x.shape[0], self.path)
        own = [norm.training or norm._buffers["running_mean"] is None for norm in norms]
        if True in own:
            running = [None if mine else (n.running_mean, n.running_var) for n, mine in zip(norms, own, strict=True)]
            y, mean, variance = batch_norm(x, weight, bias, running, [norm.eps for norm in norms], batch)
            self._update(norms, own, x, batch, mix, mean, variance)
            return y
        means, variances = ([norm._buffers[name] for norm in norms] for name in STATISTICS)
        return batch_norm_eval(x, weight, bias, means, variances, [norm.eps for norm in norms], batch)

    def _update(
        self, norms: list[Any], own: Sequence[bool], x: Tensor, batch: TaskBatch, mix: Mix, mean: Tensor, var: Tensor
    ) -> None:
        """Groups that train move the statistics that they track."""
        values = math.prod(x.shape[2:]) * (x.shape[0] // max(batch.size, 1))
        if has_operators(x) and not torch.compiler.is_compiling():
            return self._update_by_operator(norms, own, values, batch, mix, mean, var)
        samples = batch.offsets.diff()
        count = torch.cat([samples[1:], samples[:1]]) * values
        self._check_counts(count, mix, own)
        count = count.to(mean.dtype)
        least = count.clamp(min=1)[:, None]
        self._track(norms, own, count, mean, var * least / (least - 1).clamp(min=1))

    def _check_counts(self, count: Tensor, mix: Mix, own: Sequence[bool]) -> None:
        """As nn.BatchNorm: training needs more than one value a channel. On a device it is asserted there."""
        single = picked(count, [g for g, mine in enumerate(own) if mine]) == 1
        if count.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~single.any(), f"{self.path}: a task has 1 value per channel in training")
        elif single.any():
            names = [name for name, mine in zip([*mix.tasks, "base"], own, strict=True) if mine]
            self._refuse_one_value(names[int(single.nonzero()[0])])

    def _refuse_one_value(self, task: str) -> None:
        raise ValueError(
            f"{self.path}: a task must have more than 1 value per channel when training, got 1 (task {task!r})"
        )

    def _update_by_operator(
        self, norms: list[Any], own: Sequence[bool], values: int, batch: TaskBatch, mix: Mix, mean: Tensor, var: Tensor
    ) -> None:
        """As `_update`, by one operator on a CPU."""
        begin = batch.offsets.tolist()
        for t, (name, mine) in enumerate(zip([*mix.tasks, "base"], own, strict=True)):
            group = (t + 1) % len(own)  # the base's rows are the first
            if mine and (begin[group + 1] - begin[group]) * values == 1:
                self._refuse_one_value(name)
        of = _moving(norms, own)
        if of:
            held = ([getattr(norms[g], name) for g in of] for name in (*STATISTICS, "num_batches_tracked"))
            momentum = [-1.0 if norms[g].momentum is None else norms[g].momentum for g in of]
            torch.ops.taps_fast.track_statistics.default(*held, of, momentum, mean, var, batch.offsets, values)

    def _track(self, norms: list[Any], own: Sequence[bool], count: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics of the tasks present, each as nn.BatchNorm would alone."""
        groups = _moving(norms, own)
        if not groups:
            return
        present = picked(count, groups) > 0
        seen = [norms[g].num_batches_tracked for g in groups]
        batches = torch.stack(seen) + present
        given = [norms[g].momentum for g in groups]
        if given[0] is not None and len(set(given)) == 1:
            weight = (present.to(mean.dtype) * given[0])[:, None]
        else:  # filled on the device: a tensor made from Python numbers would be a copy from the host
            cumulative = 1.0 / batches.clamp(min=1).to(mean.dtype)
            each = [c if m is None else torch.full_like(c, m) for c, m in zip(cumulative, given, strict=True)]
            weight = torch.where(present, torch.stack(each), 0.0)[:, None]
        # Through .data, as in torch's own norm: a graph that has saved the buffers stays valid.
        with torch.no_grad():
            for name, new in zip(STATISTICS, (mean, variance), strict=True):
                old = torch.stack([getattr(norms[g], name) for g in groups])
                moved = torch.lerp(old.to(new.dtype), picked(new, groups), weight).to(old.dtype)
                torch._foreach_copy_([getattr(norms[g], name).data for g in groups], list(moved.unbind()))
            torch._foreach_copy_(seen, list(batches.unbind()))

    @property
    def how(self) -> str:
        return "one per task; mixed batches gather scale and shift, and train on each task's own rows"


def _moving(norms: list[Any], own: Sequence[bool]) -> list[int]:
    """Which norms move their running statistics in training."""
    moves = (mine and norm.training and norm.track_running_stats for norm, mine in zip(norms, own, strict=True))
    return [g for g, moved in enumerate(moves) if moved and norms[g].running_mean is not None]


def _check_first(module: PerTask, layout: Layout) -> None:
    if layout.axis != 0:
        raise ValueError(f"{module.path}: the batch axis must be 0 for {type(module.base).__name__}, got {layout.axis}")


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype of these norms' results, which autocast on a CUDA device makes float32."""
    autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return x.to(torch.promote_types(x.dtype, torch.float32)) if autocast else x


def _held(norms: list[Any], name: str) -> list[Tensor] | None:
    """One parameter of each task and of the base; empty where all have none, None where only some have it there.

    Looked up where modules keep them, because ``getattr`` takes as long for all tasks as a small norm itself.
    """
    try:
        values = [norm._parameters[name] for norm in norms]
    except KeyError:  # FSDP, and whoever computes parameters, keep them elsewhere
        return [] if name == "bias" and type(norms[0]) is nn.RMSNorm else None
    if type(None) not in map(type, values):
        return values
    return [] if all(value is None for value in values) else None
