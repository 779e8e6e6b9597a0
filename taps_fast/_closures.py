"""Functions that a network's modules hold, and that hold modules of it, made to follow a copy of the network.

``self.f = lambda x: self.fc(x)``, a forward replaced on an instance, a hook: deepcopy leaves functions as they are, so
those of a copy would run the original's modules.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def follow(model: nn.Module, memo: dict[int, Any]) -> Callable[[], None]:
    """Puts into ``memo``, a deepcopy's, what each such function of ``model`` becomes.

    Returns:
        What to call after the deepcopy: it gives these functions the modules of the copy.

    Warns of functions that reach a module by a global name, or as methods: they cannot follow.
    """
    own = _Reach(model)
    waiting: list[Callable[[], None]] = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            for function in _functions(value):
                stuck = own.stuck(function)
                if stuck is not None:
                    warnings.warn(
                        f"TapsModel: {f'{path}.{name}'.lstrip('.')} reaches the network that was given {stuck}, so in "
                        "the adapted copy it runs that one's modules (write it as a method of its class)",
                        stacklevel=4,
                    )
                if isinstance(function, types.FunctionType):
                    _twin(function, own, memo, waiting)

    def fill() -> None:
        for each in waiting:
            each()

    return fill


class _Reach:
    """Which values lead to a module of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module) for module in model.modules()}

    def __call__(self, value: Any, seen: frozenset[int] = frozenset()) -> bool:
        if isinstance(value, nn.Module):
            return id(value) in self.modules
        if isinstance(value, types.FunctionType):
            return id(value) not in seen and any(self(v, seen | {id(value)}) for v in _held(value))
        if isinstance(value, types.MethodType):
            return self(value.__self__)
        if isinstance(value, functools.partial):
            return any(self(v, seen) for v in (value.func, *value.args, *value.keywords.values()))
        members = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        return any(map(self, members)) if all(isinstance(member, nn.Module) for member in members) else False

    def stuck(self, function: types.FunctionType | types.MethodType) -> str | None:
        """How a function reaches a module where it cannot be made to reach another; None if it does not."""
        if isinstance(function, types.MethodType):
            inner = function.__func__
            return "from within a method" if isinstance(inner, types.FunctionType) and self(inner) else None
        names = [name for name in _global_names(function.__code__) if self(function.__globals__.get(name))]
        return f"by the global name {names[0]!r}" if names else None


def _functions(value: Any) -> Iterator[types.FunctionType | types.MethodType]:
    """What of an attribute, or in it, is a function."""
    if isinstance(value, (types.FunctionType, types.MethodType)):
        yield value
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif isinstance(value, (dict, list, tuple)):
        for member in value.values() if isinstance(value, dict) else value:
            if isinstance(member, (types.FunctionType, types.MethodType, functools.partial)):
                yield from _functions(member)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _held(function: types.FunctionType) -> list[Any]:
    """What a function carries with it: its closure, and its defaults."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [*map(_content, function.__closure__ or ()), *defaults]


def _global_names(code: types.CodeType) -> list[str]:
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    return own + [
        name for inner in code.co_consts if isinstance(inner, types.CodeType) for name in _global_names(inner)
    ]


def _twin(function: types.FunctionType, own: _Reach, memo: dict[int, Any], waiting: list[Callable[[], None]]) -> None:
    """A function of the same code in ``memo``, whose closure and defaults are filled when ``waiting`` is called."""
    if id(function) in memo or not own(function):
        return
    cells = []
    for cell in function.__closure__ or ():
        content = _content(cell)
        if own(content) and id(cell) not in memo:
            memo[id(cell)] = types.CellType()
            waiting.append(functools.partial(_fill, memo[id(cell)], content, memo))
        cells.append(memo.get(id(cell), cell))
    code, names = function.__code__, (function.__name__, function.__defaults__)
    memo[id(function)] = twin = types.FunctionType(code, function.__globals__, *names, tuple(cells))
    twin.__dict__.update(function.__dict__)
    twin.__qualname__ = function.__qualname__

    def moved(value: Any) -> Any:
        return copy.deepcopy(value, memo) if own(value) else value

    def default() -> None:
        twin.__defaults__ = None if function.__defaults__ is None else tuple(map(moved, function.__defaults__))
        twin.__kwdefaults__ = {key: moved(value) for key, value in (function.__kwdefaults__ or {}).items()}

    waiting.append(default)
    for value in _held(function):
        for inner in _functions(value):
            if isinstance(inner, types.FunctionType):
                _twin(inner, own, memo, waiting)


def _fill(cell: types.CellType, content: Any, memo: dict[int, Any]) -> None:
    cell.cell_contents = copy.deepcopy(content, memo)
