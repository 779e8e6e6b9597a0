"""The Triton kernels for bits and int8, against the same products in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from taps_fast.kernels import coded
from triton_shim import DEVICE

from taps_fast import _coded
from taps_fast.formats import pack_bits
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

IDS = [2, 0, -1, 2, 3, 0, 0]


def arguments(format, shape, dtype, mixed, inner=2):
    g = torch.Generator().manual_seed(0)
    out_features, in_features = shape

    def draw(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)

    if format == "int8":
        codes = [torch.randint(-127, 128, shape, generator=g, dtype=torch.int8).to(DEVICE) for _ in range(3)]
    else:
        codes = [pack_bits(torch.rand(shape, generator=g) < 0.5).to(DEVICE) for _ in range(3)]
    tile = draw(*shape) if format == "mask" else None
    which = [1, -1, 2, 1] if mixed else [2]
    factors = torch.randn(len(which), out_features, generator=g).to(DEVICE)
    index = TaskBatch.from_ids(torch.tensor(IDS, device=DEVICE), 4).tensors if mixed else (None, None, None)
    rows = inner * len(IDS)
    x, y, dy = draw(rows, in_features), draw(rows, out_features), draw(rows, out_features)
    return x, y, dy, (codes, tile, factors, which, *index, inner if mixed else 1, format)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(70, 130), (9, 5)])
@pytest.mark.parametrize("format", coded.FORMATS)
def test_products(format, shape, dtype, mixed):
    x, y, dy, rest = arguments(format, shape, dtype, mixed)
    codes, tile, factors, *how = rest
    wide = (codes, None if tile is None else tile.double(), factors.double(), *how)
    for name, found, low, truth in (
        (
            "y",
            coded.coded_fwd(y, x, *rest),
            y + _coded.coded_fwd(torch.zeros_like(y), x, *rest),
            _coded.coded_fwd(y.double(), x.double(), *wide),
        ),
        (
            "dx",
            coded.coded_dx(dy, *rest, shape[1]),
            rounded_dx(dy, *rest, shape[1]),
            _coded.coded_dx(dy.double(), *wide, shape[1]),
        ),
    ):
        assert_no_worse_than_torch(found, truth, low, name=name)


def rounded_dx(dy, codes, tile, factors, which, ids, order, offsets, inner, format, in_features):
    """What a user would write: each delta as a weight of x's dtype."""
    dx = dy.new_zeros(dy.shape[0], in_features)
    for task, k in enumerate(which):
        if k >= 0:
            weight = (factors[task][:, None] * _coded.decoded(codes[k], tile, format, in_features)).to(dy.dtype)
            row = torch.arange(len(dy), device=dy.device)
            mine = row >= 0 if ids is None else ids[row // inner % len(ids)] == task
            dx += torch.where(mine[:, None], dy @ weight, 0)
    return dx


def test_what_another_task_holds_does_not_matter():
    x, y, _, (codes, _, factors, *how) = arguments("bits", (9, 70), torch.float32, True)
    factors[1] = torch.nan  # of a task without a delta
    assert coded.coded_fwd(y, x, codes, None, factors, *how).isfinite().all()


def test_nothing_to_do():
    x, y, dy, rest = arguments("bits", (9, 70), torch.float32, False)
    codes, tile, factors, which, *_ = rest
    none = (codes, tile, factors, which, None, None, None, 1, "bits")
    assert coded.coded_fwd(y[:0], x[:0], *none).shape == (0, 9) and coded.coded_dx(dy[:0], *none, 70).shape == (0, 70)
    with pytest.raises(
        TypeError, match="x must be float32, bfloat16 or float16 with compressed deltas, got torch.float64"
    ):
        coded.coded_fwd(y.double(), x.double(), codes, None, factors.double(), *rest[3:])
