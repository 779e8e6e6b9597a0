"""The implicit convolution through the public function: on a CUDA device where there is one, else interpreted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taps_fast.kernels import _arguments, _configs, conv2d
from triton_shim import DEVICE, INTERPRETED, to_tf32

from taps_fast import BackendError, _autograd, _dispatch, _fakes, _tuned, delta_conv2d, testing
from taps_fast._problem import Problem
from taps_fast.tasks import TaskBatch
from taps_fast.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def exact():
    """float32 as it is: PyTorch lets convolutions use tf32, and the vendor's small ones do not."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    yield
    conv.fp32_precision = before


IDS = (1, 3, -1, 1, 0)
SETTINGS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((6, 4, 3, 3), dict(stride=2, padding=1)),
    ((6, 4, 2, 3), dict(padding="same")),
    ((6, 4, 3, 3), dict(padding=(2, 1), dilation=(2, 3), stride=(1, 2))),
    ((6, 4, 1, 1), dict(stride=2, padding=1)),
    ((67, 70, 2, 1), dict(stride=(3, 4))),
]


@pytest.fixture(autouse=True)
def kernels_take_cpu_tensors(monkeypatch):
    """Without a device, the public function is led to the interpreted kernel; with one, nothing is patched."""
    if INTERPRETED:
        monkeypatch.setattr(_autograd, "ops", SimpleNamespace(conv2d_implicit=conv2d.conv2d_implicit))
        monkeypatch.setitem(_dispatch._REASONS, "triton", conv2d.not_supported_reasons)
    _dispatch._cached_select.cache_clear()
    yield
    _dispatch._cached_select.cache_clear()


@torch.no_grad()
def check(case: Case) -> torch.Tensor:
    """y against the oracle; the inputs unchanged."""
    n = testing.make_inputs(case, DEVICE)
    before = [t.clone() for t in (n.x, n.base, *n.deltas, n.coeffs)]
    y = testing.ours("triton")(n)
    for t, old in zip((n.x, n.base, *n.deltas, n.coeffs), before, strict=True):
        assert torch.equal(t.nan_to_num(), old.nan_to_num())
    testing.assert_no_worse_than_torch(y, testing.oracle(n.to(torch.float64)), testing.plain_torch(n.to(case.dtype)))
    return y


MIXED = Case(
    rows=5, shape=(6, 4, 2, 2), num_deltas=4, tasks=IDS, num_tasks=5, zeros=(0, 9), bias="base", channels_last=True,
    conv=dict(stride=2, padding=1),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("shape", "conv"), SETTINGS, ids=str)
def test_settings_of_convolutions(shape, conv, dtype):
    check(dataclasses.replace(MIXED, dtype=dtype, shape=shape, conv=conv))


CHANGES: tuple[dict[str, Any], ...] = (
    dict(tasks=None, zeros=(1,), bias="shared", rows=2),
    dict(tasks=None, zeros=(), num_deltas=0, bias=None, rows=2),
    dict(tasks=None, num_tasks=0, zeros=(), num_deltas=1, baked=(0,), bias="shared", rows=1),
    dict(num_deltas=0, zeros=(), bias="task"),
    dict(num_deltas=0, zeros=(), baked=(1, 2)),
    dict(rows=10, bias="task"),
    dict(baked=(1, 3), bias=None),
    dict(tasks=(-1,) * 5, bias="shared"),
    dict(rows=0, tasks=()),
    dict(channels_last=False),
    dict(channels_last=False, strided=True),
    dict(channels_last=False, shape=(6, 70, 1, 2)),
)


@pytest.mark.parametrize(("changes", "dtype"), list(zip(CHANGES, itertools.cycle(DTYPES), strict=False)), ids=str)
def test_tasks_and_layouts(changes, dtype):
    y = check(dataclasses.replace(MIXED, dtype=dtype, **changes))
    layout = torch.channels_last if changes.get("channels_last", True) else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("dtype", "bias"), [(DTYPES[0], "shared"), (DTYPES[1], "task"), (DTYPES[2], None)])
def test_sums_in_parts(monkeypatch, dtype, bias):
    """What is chosen where tiles are too few for the chip: here 4 parts of 6 steps, of which the last has none."""
    monkeypatch.setattr(_configs, "splits", lambda *_: 4)
    check(dataclasses.replace(MIXED, dtype=dtype, shape=(6, 4, 3, 2), bias=bias))


def test_more_deltas_than_arguments():
    case = Case(
        torch.bfloat16, rows=3, shape=(6, 4, 2, 2), num_deltas=40, tasks=(39, 0, 7), num_tasks=40, channels_last=True,
        zeros=tuple(i for i in range(1600) if i % 41),
    )  # fmt: skip
    assert len(case.tasks or ()) < _arguments.ARGUMENTS < case.num_deltas
    check(case)


def test_layouts_that_differ():
    """Weights that disagree are brought to one layout; x runs as it lies."""
    x, base, delta = (torch.randn(s, device=DEVICE) for s in ((2, 5, 6, 6), (7, 5, 3, 3), (7, 5, 3, 3)))
    ref, low = (F.conv2d(x.to(d), base.to(d) + 0.5 * delta.to(d)) for d in (torch.float64, torch.float32))
    last = [w.contiguous(memory_format=torch.channels_last) for w in (base, delta)]
    for weights in ((last[0], delta), (base, last[1]), last):
        for images in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
            y = delta_conv2d(images, weights[0], [weights[1]], torch.tensor([0.5], device=DEVICE), backend="triton")
            testing.assert_no_worse_than_torch(y, ref, low)


def test_another_tasks_nan_stays_its_own():
    x, base = torch.randn(3, 4, 5, 5, device=DEVICE), torch.randn(6, 4, 3, 3, device=DEVICE)
    diverged = torch.full_like(base, float("nan"))
    y = delta_conv2d(
        x, base, [diverged, base], torch.eye(2, device=DEVICE), tasks=[0, 1, -1], padding=1, backend="triton"
    )
    assert y[0].isnan().all() and y[1:].isfinite().all()


def test_what_follows_the_product():
    check(dataclasses.replace(MIXED, scale="task", shift="base", activation="relu"))


@pytest.mark.parametrize("channels_last", (False, True))
def test_tracing_expects_what_comes(channels_last):
    """Shape and strides of the operator's traced output."""
    n = testing.make_inputs(dataclasses.replace(MIXED, channels_last=channels_last), DEVICE)
    how = (n.x, n.base, n.deltas, n.coeffs, None, None, [2, 1], [1, 2], [1, 1], torch.tensor(IDS, device=DEVICE), 1)
    with torch.no_grad():
        got, traced = conv2d.conv2d_implicit(*how), _fakes.conv2d_implicit(*how)
    assert (got.shape, got.stride()) == (traced.shape, traced.stride())
    assert got.shape == F.conv2d(n.x, n.base, None, [2, 1], [1, 2]).shape


FAR = {
    "images and features": ((2**30, 1, 8, 4), 2, (2**30, 1, 4, 4)),
    "rows": ((8, 1, 2**30, 4), 2, (8, 1, 4, 4)),
    "taps": ((64, 1, 8, 4), 4, (4, 1, 2**30, 4)),
}
"""Strides of x, taps, strides of the weights: a stride of 2**30 fits 31 bits, its product with an index does not."""


@pytest.mark.parametrize("far", FAR)
def test_offsets_beyond_31_bits(tmp_path, far):
    """Only pages that hold data exist."""
    room = 2**32 + 2**10
    if INTERPRETED:
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=room, dtype=torch.float16)
    else:
        memory = torch.empty(room, dtype=torch.float16, device=DEVICE)
    of_x, taps, of_w = FAR[far]
    x, base, delta = (torch.randn(s, device=DEVICE).half() for s in ((4, 4, 4, 2), (4, 4, taps, 1), (4, 4, taps, 1)))

    def move(t: torch.Tensor, strides: tuple[int, ...], start: int) -> torch.Tensor:
        return memory[start:].as_strided(t.shape, strides).copy_(t)

    how: Any = (torch.tensor([0.5], device=DEVICE), None, None, [1, 1], [1, 0], [1, 1], None, 1)
    expected = conv2d.conv2d_implicit(*(t.to(memory_format=torch.channels_last) for t in (x, base)), [delta], *how)
    got = conv2d.conv2d_implicit(move(x, of_x, 0), move(base, of_w, 256), [move(delta, of_w, 512)], *how)
    assert torch.equal(got, expected)


# --- which backend --------------------------------------------------------------------------------------------------

GOOD = Problem(
    "conv2d", "cuda", torch.bfloat16, (512, 512, 3, 3), 8, 8, 8, grad=False, pixels=49, channels_last=True
)  # fmt: skip


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(_tuned, "arch", lambda index=None: "sm_90")
    monkeypatch.setitem(_dispatch._REASONS, "triton", conv2d.not_supported_reasons)


FEW = GOOD._replace(num_deltas=2)


def test_small_images_of_a_mixed_batch_take_it(on_hopper):
    """140 pixels a task: 600 TFLOP/s·2 bytes / (2·4.3 TB/s)."""
    assert _dispatch._select(FEW, None, "auto") == ("triton", "split")
    text = _dispatch.explain(FEW)
    assert "->  triton    split  an implicit product" in text
    assert (
        "fewer than 140 output pixels a task (modelled for sm_90 from 4.3 TB/s and 600 TFLOP/s, not measured), or in "
        "16 bits of 4 deltas or more" in text
    )
    assert "no  triton    merge  serves delta_linear only" in text
    assert _dispatch._select(FEW._replace(rows=16), None, "auto") == ("triton", "split")
    assert _dispatch._select(FEW._replace(num_tasks=100), None, "auto") == ("triton", "split")


def test_many_deltas_take_it_whatever_the_images(on_hopper):
    for change in (dict(rows=24), dict(num_tasks=2), dict(pixels=196), dict(num_deltas=4, pixels=3136)):
        assert _dispatch._select(GOOD._replace(**change), None, "auto") == ("triton", "split")


@pytest.mark.parametrize(
    "problem",
    (
        FEW._replace(rows=24),
        FEW._replace(num_tasks=2),
        FEW._replace(pixels=196),
        GOOD._replace(num_deltas=3, pixels=196),
        GOOD._replace(dtype=torch.float32, pixels=196),
        GOOD._replace(num_tasks=None),
        GOOD._replace(num_deltas=0),
        GOOD._replace(channels_last=False),
        GOOD._replace(shape=(512, 508, 3, 3)),
        GOOD._replace(shape=(512, 512, 1, 1), row_taps=1),
    ),
    ids=str,
)
def test_everything_else_stays_where_it_was(on_hopper, problem):
    assert _dispatch._select(problem, None, "auto").backend in ("aten", "linear")
    assert _dispatch._select(problem, "triton", "auto") == ("triton", "split")
    assert "yes triton    split" in _dispatch.explain(problem)


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (dict(grad=True), "computes no gradients of convolutions"),
        (dict(groups=2), "has no convolution kernel with groups, got 2"),
        (dict(dtype=torch.float64), "computes float32, bfloat16 and float16"),
        (dict(rows=2**20, pixels=2**11), "31 bits"),
    ),
    ids=str,
)
def test_what_it_cannot_take_is_refused_with_its_reason(on_hopper, change, reason):
    assert list(conv2d.not_supported_reasons(GOOD)) == []
    problem = GOOD._replace(**change)
    (text,) = conv2d.not_supported_reasons(problem)
    assert reason in text
    assert _dispatch._select(problem, None, "auto").backend == "aten"
    with pytest.raises(BackendError, match=reason):
        _dispatch._select(problem, "triton", "auto")


def test_gradients_are_refused_when_asked_for_by_name():
    x, base = torch.randn(2, 4, 5, 5, device=DEVICE, requires_grad=True), torch.randn(6, 4, 3, 3, device=DEVICE)
    with pytest.raises(BackendError, match="computes no gradients of convolutions"):
        delta_conv2d(x, base, [], torch.ones(0, device=DEVICE), backend="triton")
    with pytest.raises(BackendError, match="serves delta_linear only"):
        delta_conv2d(x.detach(), base, [], torch.ones(0, device=DEVICE), backend="triton", algorithm="merge")


# --- what only a CUDA device can show -------------------------------------------------------------------------------


def tensors(side: int, dtype: torch.dtype = torch.bfloat16, images: int = 8, tasks: int = 4) -> list[torch.Tensor]:
    """x, base and a delta a task, on channels last."""
    x = torch.randn(images, 256, side, side, device="cuda", dtype=dtype)
    weights = torch.randn(1 + tasks, 192, 256, 3, 3, device="cuda", dtype=dtype) * (9 * 256) ** -0.5
    return [t.contiguous(memory_format=torch.channels_last) for t in (x, *weights)]


def summed(coeffs: torch.Tensor, base: torch.Tensor, deltas: Iterable[torch.Tensor]) -> torch.Tensor:
    """One task's weight, in float64."""
    return base.double() + sum(c * delta.double() for c, delta in zip(coeffs, deltas, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("side", (1, 4, 7, 14))
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(side, dtype):
    """Every config of the table, sums in parts and whole, float32 with tf32 and without."""
    coeffs = torch.diag(torch.tensor([1.0, 0.5, 0.0, -2.0], device="cuda"))
    ids = torch.tensor([1, 3, -1, 1, 0, 2, 2, 3], device="cuda")
    for precision, images in itertools.product(("ieee", "tf32"), (8, 128)):
        torch.backends.cudnn.conv.fp32_precision = precision
        x, base, *deltas = tensors(side, dtype, images)
        y = delta_conv2d(x, base, deltas, coeffs, padding=1, tasks=ids, backend="triton")
        assert y.is_contiguous(memory_format=torch.channels_last)
        table = torch.cat([coeffs, coeffs.new_zeros(1, 4)]).double()
        for task in range(-1, 4):
            mine = (ids == task).repeat_interleave(images // 8)
            weight = summed(table[task], base, deltas)
            ref = F.conv2d(x[mine].double(), weight, padding=1)
            if dtype == torch.float32 and precision == "tf32":
                weight = summed(table[task], to_tf32(base), map(to_tf32, deltas))
                low = F.conv2d(to_tf32(x[mine]).double(), weight, padding=1).float()
            else:
                low = F.conv2d(x[mine], weight.to(dtype), padding=1)
            testing.assert_no_worse_than_torch(y[mine], ref, low)


@pytest.mark.gpu
def test_a_graph_replays_with_other_ids_and_gates():
    """And nothing in a call waits for the host."""
    torch.use_deterministic_algorithms(False)
    x, base, *deltas = tensors(7)
    coeffs, ids = torch.eye(4, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")

    def call() -> torch.Tensor:
        batch = TaskBatch.from_ids(ids, 4)
        return delta_conv2d(x, base, deltas, coeffs, padding=1, tasks=batch, backend="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(4):
        g = torch.Generator("cuda").manual_seed(seed)
        ids.random_(-1, 4, generator=g)
        coeffs.copy_(torch.diag(torch.randint(0, 2, (4,), generator=g, device="cuda").float()))
        graph.replay()
        assert torch.equal(captured.clone(), call())
