"""A program that uses the public names. Not run: tests/test_typing.py has mypy read it."""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor, nn, randn
from typing_extensions import assert_type

import taps_fast
import taps_fast.merging
import taps_fast.peft
import taps_fast.store
from taps_fast import TapsModel

model = TapsModel(nn.Linear(4, 2), ["cubs"])
assert_type(model, taps_fast.model.TapsModel)
assert_type(model.tasks, list[str])
assert_type(model.penalty("cubs"), Tensor)
assert_type(model.merge("cubs"), nn.Module)
assert_type(taps_fast.FastTapsLinear(4, 2), taps_fast.nn.FastTapsLinear)
assert_type(taps_fast.FastTapsConv2d(4, 2, 3), taps_fast.nn.FastTapsConv2d)
assert_type(taps_fast.delta_linear(randn(3, 4), randn(2, 4), [], randn(0)), Tensor)
assert_type(taps_fast.delta_conv2d(randn(3, 4, 5, 5), randn(2, 4, 1, 1), [], randn(0)), Tensor)
assert_type(taps_fast.scale_shift(randn(3, 4), randn(4)), Tensor)
assert_type(taps_fast.TaskBatch.from_ids([0, 0], 1), taps_fast.TaskBatch)
assert_type(taps_fast.train, ModuleType)
assert_type(taps_fast.merging.ties(taps_fast.merging.TaskVectors({}, {}, [])), dict[str, Tensor])
assert_type(taps_fast.stacked.Stack.__len__(taps_fast.stacked.Stack([])), int)
assert_type(taps_fast.formats.compress(randn(2, 4), "int8"), taps_fast.formats.Format)
errors: Sequence[type[Exception]] = (
    taps_fast.BackendError,
    taps_fast.TaskFolderError,
    taps_fast.AdapterError,
    taps_fast.store.TaskFolderError,
    taps_fast.peft.AdapterError,
)
print(taps_fast.wrong)  # type: ignore[attr-defined]
taps_fast.delta_linear(randn(3, 4), algorithm=3)  # type: ignore[call-arg, arg-type]
taps_fast.TapsModel(7)  # type: ignore[arg-type]
