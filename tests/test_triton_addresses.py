"""Offsets beyond 2**31 elements, without the memory: strides are huge, and only pages that hold data exist.

Where a kernel takes dense tensors alone, the tensors are that large and mostly holes, and in the interpreter only the
last program of the grid runs: the one whose addresses are the farthest.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton_shim
from taps_fast.kernels import coded, conv2d, fold, linear, merge, pointwise
from triton_shim import DEVICE, INTERPRETED

from taps_fast.tasks import TaskBatch

pytestmark = pytest.mark.large
ROOM = 2**32 + 2**16
"""Elements. Every stride is less than 2**31, so that it is the product with an index that does not fit."""
SHAPES = {0: (4, 4), 1: (2, 132)}
STRIDES = {0: (2**30, 1), 1: (1, 2**24 + 2**18)}
"""By the axis that is far. Columns are many, so that the loop over them takes a second step."""
WIDE = 2**29 + 64
"""Elements a row of a dense tensor of 5 rows: the last row begins beyond 2**31."""
INDEX = (None, None, None)


@pytest.fixture
def room(tmp_path):
    """Makes tensors of zeros of any size: each in a sparse file, or in memory of a device."""
    made = []

    def make(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        made.append(shape)
        if not INTERPRETED:
            return torch.zeros(shape, dtype=dtype, device=DEVICE)
        path = str(tmp_path / f"sparse-{len(made)}")
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    yield make
    if not INTERPRETED:
        torch.cuda.empty_cache()


@pytest.fixture
def far_tensor(room):
    """Makes tensors that end beyond 2**31 elements."""
    memory = room(ROOM)
    used = 0

    def make(values: torch.Tensor, far_axis: int) -> torch.Tensor:
        nonlocal used
        tensor = memory[used:].as_strided(values.shape, STRIDES[far_axis])
        used += 256
        return tensor.copy_(values)

    return make


@pytest.fixture
def dense(room, monkeypatch):
    """Makes dense tensors of zeros but for their last 64 elements, and lets results be as large."""
    torch.use_deterministic_algorithms(False)  # which would fill them
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs memory")
    if INTERPRETED:
        triton_shim.run_only_last_programs(monkeypatch)
        for name in ("new_empty", "new_zeros"):
            monkeypatch.setattr(torch.Tensor, name, roomy(getattr(torch.Tensor, name), room))
        monkeypatch.setattr(torch, "empty_like", roomy(torch.empty_like, room))
        monkeypatch.setattr(torch.Tensor, "clone", lambda t, **_: t)  # it would copy the holes

    def make(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        tensor = room(*shape, dtype=dtype)
        tensor.view(-1)[-64:] = torch.randint(-4, 5, (64,), device=DEVICE).to(dtype)
        return tensor

    return make


def roomy(allocate, room):
    def allocated(like, *rest, **how):
        found = allocate(like.to("meta"), *rest, **how)
        return room(*found.shape, dtype=found.dtype) if found.numel() > 2**16 else allocate(like, *rest, **how)

    return allocated


def end(tensor: torch.Tensor) -> torch.Tensor:
    """The last 64 elements in memory."""
    return tensor.view(-1)[-64:]


@pytest.mark.parametrize("far_axis", (0, 1))
def test_every_operand_may_be_far(far_tensor, far_axis):
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=g).half().to(DEVICE)

    rows, features = SHAPES[far_axis]
    x, dy, base, delta = (draw(n, features) for n in (rows, rows, features, features))
    near = dict(x=x, dy=dy, base=base, delta=delta)
    far = {name: far_tensor(t, far_axis) for name, t in near.items()}
    index = TaskBatch.from_ids(torch.tensor([1, 0], device=DEVICE), 2).tensors

    def run(t, coeffs, tasks):
        weight = (t["base"], [t["delta"]], coeffs, None)
        y = linear.linear_fwd(t["x"], *weight, None, *tasks, 1, "split")
        dx = linear.linear_dx(t["dy"], *weight, *tasks, 1, "split")
        dcoeffs, ddeltas, dbase, _ = linear.linear_dw(t["dy"], t["x"], *weight, *tasks, 1, [], [0], True, True, False)
        return y, dx, dcoeffs, *ddeltas, dbase

    one, each = torch.tensor([0.5], device=DEVICE), torch.tensor([[0.5], [2.0]], device=DEVICE)
    for weights in ((one, (None, None, None)), (each, index)):
        for got, expected in zip(run(far, *weights), run(near, *weights), strict=True):
            # Where strides differ so may the compiled kernels, and the order in which a tile is summed.
            torch.testing.assert_close(got, expected)


def test_results_may_be_far(far_tensor, monkeypatch):
    """y and dx are written row by row: the last row is put beyond 2**31 elements."""
    x, base = torch.randn(4, 16, device=DEVICE).half(), torch.randn(16, 16, device=DEVICE).half()
    none = torch.empty(0, device=DEVICE)
    near = linear.linear_fwd(x, base, [], none, None, None, None, None, None, 1, "split")
    far = far_tensor(torch.zeros(4, 16, device=DEVICE), 0)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **how: far if size == (4, 16) else new_empty(self, *size, **how)
    )
    got = linear.linear_fwd(x, base, [], none, None, None, None, None, None, 1, "split")
    assert got is far
    assert torch.equal(far, near)


@pytest.mark.parametrize("far_axis", (0, 1))
def test_sources_of_a_merged_weight(far_tensor, far_axis):
    base, delta = torch.randn(2, *SHAPES[far_axis], device=DEVICE).half()
    coeffs, rows = torch.tensor([0.5], device=DEVICE), linear.Rows(*INDEX, 1, 1)
    near, far = (
        merge.merged(linear.Weight.of(*sources, coeffs, None), rows, 1, 1)
        for sources in ((base, [delta]), (far_tensor(base, far_axis), [far_tensor(delta, far_axis)]))
    )
    assert torch.equal(near, far)
    torch.testing.assert_close(near[0], (base + 0.5 * delta)[1:2])


def test_slots_of_merged_weights(dense):
    """The last task's weight begins beyond 2**31 elements."""
    base, delta = dense(1, WIDE), dense(1, WIDE)
    coeffs = torch.full((4, 1), 2.0, device=DEVICE)
    index = TaskBatch.from_ids(torch.arange(4, device=DEVICE), 4).tensors
    bank = merge.merged(linear.Weight.of(base, [delta], coeffs, None), linear.Rows(*index, 4, 1), 0, 1)
    assert bank.shape == (5, 1, WIDE)
    assert torch.equal(end(bank), end(base) + 2 * end(delta))


@pytest.mark.parametrize("masked", (False, True))
def test_fold(dense, masked):
    base, delta, coeffs = dense(5, WIDE), dense(5, WIDE), torch.full((1, 1, 1), 2.0, device=DEVICE)
    mask = [dense(5, WIDE, dtype=torch.bool)] * masked
    (out,) = fold.fold([base], [delta], coeffs, [], mask)
    expected = 2 * end(delta)
    assert torch.equal(end(out), end(base) + (expected * end(mask[0]) if mask else expected))
    dcoeffs, _ = fold.fold_grad([base], [delta], coeffs, [], mask, True, False)
    product = end(base).float() * end(delta)
    assert dcoeffs.item() == (product * end(mask[0]) if mask else product).sum()


def test_fold_writes_nothing_behind_a_weight(dense, room, monkeypatch):
    """Whose last block is not whole, and ends beyond 2**31 elements."""
    size = 2**31 + 64
    base, delta, memory = dense(size), dense(size), room(size + 2**12)
    memory[size:] = 5
    monkeypatch.setattr(torch, "empty_like", lambda _: memory[:size])
    (out,) = fold.fold([base], [delta], torch.full((1, 1, 1), 2.0, device=DEVICE), [], [])
    assert torch.equal(end(out), end(base) + 2 * end(delta))
    assert (memory[size:] == 5).all()


@pytest.mark.parametrize("shape", ((5, WIDE), (5, 1, WIDE), (2**31 + 64, 1)), ids=str)
def test_scale_shift(dense, shape):
    """Rows, planes, and more rows than 31 bits count."""
    x, dy = dense(*shape), dense(*shape)
    two = (None if shape[1] == WIDE else torch.full((shape[1],), 2.0, device=DEVICE), None)
    factor = 1 if two[0] is None else 2
    assert torch.equal(end(pointwise.scale_shift(x, *two, *INDEX, 1, "none")), factor * end(x))
    dx = pointwise.scale_shift_dx(dy, x, *two, None, None, *INDEX, 1, "relu")
    assert torch.equal(end(dx), factor * end(dy) * (end(x) > 0))


def test_sums_of_norms(dense):
    """Rows are far, and so are the sums of the last of five groups."""
    x, dy = dense(5, WIDE), dense(5, WIDE)
    index = TaskBatch.from_ids(torch.arange(5, device=DEVICE) % 5 - 1, 4).tensors
    first, second = pointwise.scale_shift_sums(dy, x, None, None, None, *index, 1, "none")
    # The last group's sums are those of task 3, in row 3; the base's are below.
    assert torch.equal(first[3, -64:], end(x).float() * end(dy)) and torch.equal(second[3, -64:], end(dy).float())
    del first, second
    mean, variance = pointwise.moments(x, *index, 1)
    assert torch.equal(mean[3, -64:], end(x).float()) and not variance[3, -64:].any()


def test_rows_and_results_of_coded_products(dense, room):
    x, y = dense(2**27 + 16, 17), dense(2**27 + 16, 17)
    codes = torch.randint(-3, 4, (17, 17), dtype=torch.int8, device=DEVICE)
    how = ([codes], None, torch.ones(1, 17, device=DEVICE), [0], *INDEX, 1, "int8")
    expected = (y[-3:].float() + x[-3:].float() @ codes.float().T).half()
    assert torch.equal(coded.coded_fwd(y, x, *how)[-3:], expected)
    assert torch.equal(coded.coded_dx(x, *how, 17)[-3:], (x[-3:].float() @ codes.float()).half())


@pytest.mark.parametrize("format", coded.FORMATS)
def test_codes_and_tile(dense, room, format):
    """Rows of codes and of the mask's tile, from which dx is made."""
    dy, factors = torch.randn(3, 5, device=DEVICE).half(), torch.ones(1, 5, device=DEVICE)
    tile = dense(5, WIDE) if format == "mask" else None
    codes = room(5, WIDE if format == "int8" else WIDE // 8, dtype=torch.int8 if format == "int8" else torch.uint8)
    far = codes if format == "int8" else room(ROOM, dtype=torch.uint8).as_strided(codes.shape, (WIDE, 1))
    far[:, -8:] = torch.randint(0, 100, (5, 8), device=DEVICE).to(far.dtype)
    dx = coded.coded_dx(dy, [far], tile, factors, [0], *INDEX, 1, format, WIDE)
    last = far[:, -8:]
    if format == "int8":
        weight, dx = last.float(), dx[:, -8:]
    else:
        bits = (last[:, :, None] >> torch.arange(8, device=DEVICE, dtype=torch.uint8) & 1).flatten(1)
        weight, dx = (tile[:, -64:] * bits if tile is not None else bits * 2.0 - 1).float(), dx[:, -64:]
    torch.testing.assert_close(dx, (dy.float() @ weight).half())


def test_results_of_a_convolution(dense):
    """Five images of 2**26 pixels of 8 features; tests of other far tensors are in test_triton_conv2d.py."""
    x, base = dense(5, 2**13, 2**13, 1).movedim(-1, 1), torch.randn(8, 1, 1, 1, device=DEVICE).half()
    coeffs = torch.empty(0, device=DEVICE)
    y = conv2d.conv2d_implicit(x, base, [], coeffs, None, None, [1, 1], [0, 0], [1, 1], None, 1)
    assert y.numel() > 2**31
    expected = x[-1, :, -1, -8:] * base[:, 0, 0]
    assert torch.equal(y[-1, :, -1, -8:], expected)
