"""Subclasses of Linear and Conv2d that have a forward of their own: it is kept, with the effective weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _call
from .context import Layout, TaskContext, task_by_task
from .folded import Epilogue
from .gated import Gated
from .layer import TapsLayer
from .mixed_weight import METADATA
from .stand_in import fill


class _OtherUse(Exception):
    """The weight is used by something else than one convolution or linear."""


class _Intercept(TorchFunctionMode):
    """Turns the call that takes the weight unchanged into ``replacement(x, with_bias, *its further arguments)``."""

    def __init__(self, module: nn.Linear | nn.Conv2d, replacement: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self.replacement = replacement
        self.calls = 0
        self.grads = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d or func is F.linear:
            x, weight, bias, rest = _arguments(*args, **kwargs)
            if weight is self.weight and (bias is None or bias is self.bias):
                if self.grads and not torch.is_grad_enabled():
                    # Within an autograd.Function, which would lose the gradients of the replacement.
                    raise _OtherUse(f"{func.__name__} without gradients")
                self.calls += 1
                return self.replacement(x, bias is not None, *rest)
        if func not in METADATA:
            for value in (*args, *kwargs.values()):
                if value is self.weight or (value is self.bias and value is not None):
                    raise _OtherUse(getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    return input, weight, bias, (stride, padding, dilation, groups)


class WrappedLayer(TapsLayer):
    """A layer that runs ``module``'s own forward with the effective weight.

    Where that forward hands the weight unchanged to one convolution or linear, this call becomes a
    `delta_conv2d` or `delta_linear`: a mixed batch runs fused (``fused``). Otherwise the effective weight is
    materialised, and a mixed batch runs task by task.

    Attributes it lacks are the module's own: what was set on it, its buffers and children.

    Args:
        module: the original, with frozen parameters; its weight stays its own and is ``base`` here.
    """

    _stored = {"weight": "module.weight", "bias": "module.bias"}

    def __init__(self, module: nn.Linear | nn.Conv2d, context: TaskContext | None = None, **options: Any) -> None:
        nn.Module.__init__(self)
        self._start(context, **options)
        self.module = module
        self.images_first = isinstance(module, nn.Conv2d)
        self.fused, self.why, self.last = trial(module)
        self.train(module.training)

    @property
    def base(self) -> Tensor:  # type: ignore[override]
        return self.module.weight

    @property
    def base_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.module.bias

    def forward(self, x: Tensor, *args: Any, after: Epilogue | None = None, **kwargs: Any) -> Tensor:
        """What the module's own forward gives with the weight of the active task."""
        selection = self.selected()
        gated = self.gated(selection, grouped=after is not None)
        if self.fused:
            options = {} if after is None else after.options(selection)
            made: list[Tensor] = []

            def replacement(inner: Tensor, with_bias: bool, *conv: Any) -> Tensor:
                made.append(self._fused(inner, x.shape, gated, with_bias, conv, options))
                return made[0]

            intercept = _Intercept(self.module, replacement)
            try:
                with intercept:
                    y: Tensor = self.module(x, *args, **kwargs)
            except _OtherUse as use:
                raise RuntimeError(self._changed(f"in {use}")) from None
            if intercept.calls == 0:
                raise RuntimeError(self._changed("in nothing"))
            if after is not None and y is not made[0]:
                raise RuntimeError(self._changed("in a call that is not its last"))
            return y
        mix = selection.mixed
        if mix is None or not gated.deltas:
            return self._materialised(selection.task if mix is None else None, x, *args, **kwargs)
        batch, tasks = mix
        layout = self.layout(x, batch)

        def run(task: int, rows: Tensor) -> Tensor:
            name = None if task < 0 else tasks[task]
            return self._materialised(name, rows, *args, **kwargs)

        return task_by_task(x, batch, layout, self.path, run)

    def _fused(
        self,
        x: Tensor,
        outer: torch.Size,
        gated: Gated,
        with_bias: bool,
        conv: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Tensor:
        gated = gated if with_bias else gated._replace(bias=None)
        linear = isinstance(self.module, nn.Linear)
        batch, layout = gated.tasks, Layout()
        if batch is not None:
            if x.dim() != len(outer) or x.shape[0] != outer[0]:
                raise RuntimeError(
                    f"{self.path}: {type(self.module).__name__} must keep the leading axes of its input in a mixed "
                    f"batch, got {tuple(x.shape)} from {tuple(outer)}; exclude it from the conversion"
                )
            layout = self.layout(x, batch)
            batch = layout.spread(batch, x.shape[layout.axis], self.path)
        how = gated.how(batch, layout.axis, **options)
        if linear:
            return self.run(_call.linear, x, *gated.weight, how)
        return self.run(_call.conv2d, x, *gated.weight, *conv, how)

    def _materialised(self, task: str | None, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = self.effective(task)
        own = {"weight": weight, "bias": bias}
        if torch.compiler.is_compiling():
            named = {name: value for name, value in own.items() if value is not None}
            y: Tensor = torch.func.functional_call(self.module, named, args, kwargs)
            return y
        # functional_call swaps attributes of the module itself, which other threads would see.
        twin = copy.copy(self.module)
        twin._parameters = {**self.module._parameters, **own}  # type: ignore[dict-item]
        y = twin(*args, **kwargs)
        return y

    def _changed(self, now: str) -> str:
        return (
            f"{self.path}: {type(self.module).__name__} must use its weight as in its trial, in one convolution or "
            f"linear, got it used {now} (exclude it from the conversion)"
        )

    def merged(self, task: str | None) -> nn.Module:
        weight, bias = self.effective(task)
        plain = copy.deepcopy(self.module)
        return fill(plain, weight, bias, self.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None:
                # Not what its class defines: methods and properties of the module would use the base's weight.
                for held in (vars(module), module._buffers, module._modules, module._parameters):
                    if name in held:
                        return held[name]
            raise

    @property
    def how(self) -> str:
        """One line for the conversion report."""
        mixed = "fused" if self.fused else f"task by task ({self.why})"
        return f"its own forward with the effective weight; mixed batches run {mixed}"

    def extra_repr(self) -> str:
        return f"fused={self.fused}, tasks=[{self._opened()}]"


class WrappedLinear(WrappedLayer, nn.Linear):  # type: ignore[misc]
    """Of a linear layer, and so one itself, though not of its subclass."""


class WrappedConv2d(WrappedLayer, nn.Conv2d):  # type: ignore[misc]
    """Of a convolution, and so one itself, though not of its subclass."""


UNUSED = "its forward does not use its weight"


@torch.inference_mode(False)
def trial(module: nn.Linear | nn.Conv2d) -> tuple[bool, str, bool]:
    """Whether a forward on made-up input hands the weight, unchanged, to exactly one call; and if not, why.

    Also whether that call's result is the forward's.
    """
    made: list[Tensor] = []
    twin = copy.deepcopy(module).eval()
    if isinstance(module, nn.Conv2d):
        extent = [
            d * (k - 1) + 1 + s for d, k, s in zip(module.dilation, module.kernel_size, module.stride, strict=True)
        ]
        x = twin.weight.new_zeros(1, module.in_channels, *extent, requires_grad=True)
    else:
        x = twin.weight.new_zeros(1, module.in_features, requires_grad=True)

    def original(inner: Tensor, with_bias: bool, *conv: Any) -> Tensor:
        bias = twin.bias if with_bias else None
        made.append(
            F.conv2d(inner, twin.weight, bias, *conv)
            if isinstance(twin, nn.Conv2d)
            else F.linear(inner, twin.weight, bias)
        )
        return made[-1]

    try:
        # With gradients, since what a forward does without them is no measure of what it does in training.
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), _Intercept(twin, original) as intercept:
            y = twin(x.clone())  # no leaf: it may be changed in place
    except _OtherUse as use:
        return False, f"its weight goes through {use}", False
    except Exception as error:  # whatever a user's forward raises on a made-up input
        return False, f"a trial forward raised {type(error).__name__}", False
    if intercept.calls == 0:
        return False, UNUSED, False
    if intercept.calls > 1:
        return False, f"its weight is used by {intercept.calls} calls", False
    return True, "", y is made[0]
