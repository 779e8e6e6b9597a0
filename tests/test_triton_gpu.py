"""What only a CUDA device can show: replayed graphs, streams, compiled and autocast code, no waiting, tf32 obeyed."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import cuda_build
import pytest
import torch
import torch.nn.functional as F
import triton
from taps_fast.kernels import _configs, _gradients, _launch, coded, conv2d, fold, linear, merge, pointwise
from triton import JITFunction
from triton_shim import to_tf32

from taps_fast import _ext
from taps_fast.functional import delta_linear
from taps_fast.tasks import TaskBatch
from taps_fast.testing import assert_no_worse_than_torch

pytestmark = pytest.mark.gpu
TASKS = 4
PAIRS = [(t, t) for t in range(TASKS)]


class Layer:
    """A mixed-batch layer whose forward and backward run on tensors that stay where they are."""

    def __init__(self, algorithm: str, rows: int = 96, size: int = 256, dtype: torch.dtype = torch.bfloat16) -> None:
        self.algorithm = algorithm
        self.x = torch.randn(rows, size, device="cuda", dtype=dtype).requires_grad_()
        weights = torch.randn(1 + TASKS, size, size, device="cuda", dtype=dtype) * size**-0.5
        self.base, *self.deltas = (w.clone().requires_grad_() for w in weights)
        self.coeffs = torch.eye(TASKS, device="cuda").requires_grad_()
        self.ids = torch.zeros(rows // 2, dtype=torch.int64, device="cuda")
        self.dy = torch.randn(rows, size, device="cuda", dtype=dtype)
        self.inputs = [self.x, self.base, self.coeffs, *self.deltas]

    def change(self, seed: int) -> None:
        g = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            self.ids.random_(-1, TASKS, generator=g)
            self.coeffs.copy_(torch.diag(torch.randint(0, 2, (TASKS,), generator=g, device="cuda").float()))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return delta_linear(
            x, self.base, self.deltas, self.coeffs,
            tasks=TaskBatch.from_ids(ids, TASKS), pairs=PAIRS, backend="triton", algorithm=self.algorithm,
        )  # fmt: skip

    def __call__(self) -> list[torch.Tensor]:
        y = self.forward(self.x, self.ids)
        return [y, *torch.autograd.grad(y, self.inputs, self.dy)]


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_a_graph_replays_with_other_ids_and_gates(algorithm):
    torch.use_deterministic_algorithms(False)
    layer = Layer(algorithm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for seed in range(4):
        layer.change(seed)
        graph.replay()
        replayed = [t.clone() for t in captured]
        for got, expected in zip(replayed, layer(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_nothing_waits_for_the_host(algorithm):
    torch.use_deterministic_algorithms(False)
    layer = Layer(algorithm)
    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_the_same_bits_each_time_and_on_two_streams_at_once(algorithm):
    """No scratch memory is shared, and the current stream is the one that is used."""
    torch.use_deterministic_algorithms(False)
    layers, streams = [Layer(algorithm), Layer(algorithm, dtype=torch.float32)], [torch.cuda.Stream() for _ in range(2)]
    for seed, layer in enumerate(layers):
        layer.change(seed)
    expected = [layer() for layer in layers]
    torch.cuda.synchronize()
    found: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(20):
        for n, (layer, on) in enumerate(zip(layers, streams, strict=True)):
            with torch.cuda.stream(on):
                found[n].append(layer())
    torch.cuda.synchronize()
    for n in range(2):
        assert all(torch.equal(a, b) for again in found[n] for a, b in zip(again, expected[n], strict=True))


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_compiled_whole_and_never_again_for_another_mix(algorithm):
    layer = Layer(algorithm)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            layer.change(seed)
            y = compiled(layer.x, layer.ids)
            got = [y, *torch.autograd.grad(y, layer.inputs, layer.dy)]
            torch.testing.assert_close(got, layer())


@pytest.fixture
def unwatched(monkeypatch):
    """Whoever counts launches is a hook, so that nothing would be direct."""
    if not _launch.DIRECT:
        pytest.skip("Triton launches")
    torch.use_deterministic_algorithms(False)
    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        monkeypatch.setattr(hook, "calls", [])


def by_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_launch.Kernel, "launch", lambda self, grid, *args, **how: self.jit[grid](*args, **how))


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_launched_directly_and_by_triton_alike(monkeypatch, unwatched, algorithm):
    """The same bits."""
    layer, ways = Layer(algorithm), []
    layer()
    for seed in range(3):
        layer.change(seed)
        ways.append(layer())
    assert _gradients.dw_task_kernel.known
    with monkeypatch.context() as patch:
        by_triton(patch)
        for seed in range(3):
            layer.change(seed)
            assert all(map(torch.equal, layer(), ways[seed]))


def operators(seed: int, device: str = "cuda") -> dict[str, Callable[[], object]]:
    """Calls that together launch every kernel of Triton's there is, but that which writes tables."""
    g = torch.Generator(device).manual_seed(seed)
    rows, size = 16, 1024

    def draw(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).to(dtype)

    x, image, taps = draw(rows, size), draw(rows, 64, 6, 6), draw(3, 64, 64, 3, 3)
    image, *taps = (t.contiguous(memory_format=torch.channels_last) for t in (image, *taps))
    base, *deltas = draw(1 + TASKS, size, size).unbind()
    ids = torch.randint(-1, TASKS, (rows,), generator=g, device=device)
    index, none = TaskBatch.from_ids(ids, TASKS).tensors, (None, None, None)
    each, one, two = (torch.eye(TASKS, device=device), *(torch.ones(n, device=device) for n in (TASKS, (TASKS, 2))))
    all_of = (list(range(TASKS)), True, True, True)
    diagonal = [t * (TASKS + 1) for t in range(TASKS)]
    table = draw(TASKS + 1, size, dtype=torch.float32)
    signs = torch.randint(0, 256, (size, size // 8), generator=g, device=device, dtype=torch.uint8)
    folded, masks = ([base], deltas, one.view(1, 1, -1), []), [base > 0]

    def joined() -> object:
        rows = linear.Rows(*index, x.shape[0], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "_planned_by_extension", lambda rows, tasks: False)
            found, ends = linear._joined(linear.Weight.of(base, deltas, each, None), rows)
        return found.place, ends

    return {
        "forward": lambda: linear.linear_fwd(x, base, deltas, each, None, None, *index, 1, "split"),
        "one forward": lambda: linear.linear_fwd(x, base, deltas, one, None, base[0], *none, 1, "split"),
        "dx": lambda: linear.linear_dx(x, base, deltas, each, None, *index, 1, "split"),
        "merge": lambda: linear.linear_fwd(x, base, deltas, one, None, None, *none, 1, "merge"),
        "dw": lambda: linear.linear_dw(x, x, base, deltas, each, None, *index, 1, diagonal, *all_of),
        "one dw": lambda: linear.linear_dw(x, x, base, deltas, one, None, *none, 1, [], *all_of),
        "joined": joined,
        "norm": lambda: pointwise.scale_shift(x, table, table, *index, 1, "relu"),
        "moments": lambda: pointwise.moments(x, *index, 1),
        "coded": lambda: coded.coded_fwd(x, x, [signs] * TASKS, None, table[1:], [*range(TASKS)], *index, 1, "bits"),
        "conv": lambda: conv2d.conv2d_implicit(
            image, taps[0], taps[1:], two, None, None, [1, 1], [1, 1], [1, 1], index[0], 1
        ),
        "fold": lambda: fold.fold(*folded, []),
        "fold by masks": lambda: fold.fold(*folded, masks),
        "fold_grad": lambda: fold.fold_grad([base], *folded[1:], masks, True, True),
    }


def test_every_kernel_is_launched_directly_and_by_triton_alike(monkeypatch, unwatched):
    """The same bits, and of the second launch of each, with other numbers in memory, as of the first."""
    found = {}
    for seed in (0, 0, 1):  # the first time by Triton
        found |= {(seed, name): call() for name, call in operators(seed).items()}
    for module in (linear, _gradients, merge, pointwise, coded, conv2d, fold):
        for name, kernel in vars(module).items():
            assert not name.endswith("_kernel") or isinstance(kernel, JITFunction) or kernel.known, name
    by_triton(monkeypatch)
    for seed in (0, 1):
        for name, call in operators(seed).items():
            torch.testing.assert_close(call(), found[seed, name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_trained_in_the_compilers_own_graphs(algorithm):
    """It warms up uncaptured, and then raises if anything but results stays in its graphs' memory."""
    torch.use_deterministic_algorithms(False)
    layer = Layer(algorithm)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        layer.change(seed)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(layer.x, layer.ids)
        got = [t.clone() for t in (y, *torch.autograd.grad(y, layer.inputs, layer.dy))]
        torch.testing.assert_close(got, layer())


@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_many_deltas_in_the_compilers_own_graphs(algorithm):
    """More than travel as arguments: their addresses lie in a table."""
    torch.use_deterministic_algorithms(False)
    base, *deltas = torch.randn(41, 64, 64, device="cuda", dtype=torch.bfloat16) / 8
    coeffs = torch.rand(3, 40, device="cuda")

    def forward(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        batch = TaskBatch.from_ids(ids, 3)
        return delta_linear(x, base, deltas, coeffs, tasks=batch, backend="triton", algorithm=algorithm)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        x = torch.randn(24, 64, device="cuda", dtype=torch.bfloat16)
        ids = torch.randint(-1, 3, (24,), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x, ids), forward(x, ids))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("algorithm", linear.ALGORITHMS)
def test_autocast(algorithm, dtype):
    """Products in the narrow type, gradients in the parameters' own, as of `F.linear`."""
    layer = Layer(algorithm, dtype=torch.float32)
    layer.change(0)
    with torch.autocast("cuda", dtype):
        y = layer.forward(layer.x, layer.ids)
        assert y.dtype == F.linear(layer.x, layer.base).dtype == dtype
    grads = torch.autograd.grad(y, layer.inputs, layer.dy.to(dtype))
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    narrow = [w.detach().to(dtype) for w in (layer.base, *layer.deltas)]
    plain = delta_linear(
        layer.x.detach().to(dtype), narrow[0], narrow[1:], layer.coeffs.detach(),
        tasks=TaskBatch.from_ids(layer.ids, TASKS), backend="triton", algorithm=algorithm,
    )  # fmt: skip
    assert torch.equal(y, plain)


def test_float32_is_exact_unless_torch_allows_tf32():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x, base = torch.randn(64, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    coeffs = torch.empty(0, device="cuda")
    ref = x.double() @ base.double().T
    try:
        for allowed in ("ieee", "tf32"):
            matmul.fp32_precision = allowed
            assert _configs.precision(torch.float32) == allowed
            y = delta_linear(x, base, [], coeffs, backend="triton", algorithm="split")
            low = x @ base.T if allowed == "ieee" else (to_tf32(x).double() @ to_tf32(base).double().T).float()
            assert_no_worse_than_torch(y, ref, low)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("rows", (1, 16, 33, 64, 129, 1000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_real_sizes(rows, dtype):
    """Every config of the table, with reductions in parts and pipelines full."""
    x = torch.randn(rows, 1024, device="cuda", dtype=dtype)
    base, delta = torch.randn(2, 768, 1024, device="cuda", dtype=dtype) * 1024**-0.5
    coeffs = torch.tensor([0.5], device="cuda")
    for algorithm in linear.ALGORITHMS:
        y = delta_linear(x, base, [delta], coeffs, backend="triton", algorithm=algorithm)
        ref = x.double() @ (base.double() + 0.5 * delta.double()).T
        assert_no_worse_than_torch(y, ref, x @ (base + 0.5 * delta).T)


def test_tensors_decide_the_device():
    """With one device this says little; with several, a launch on the current one would fail."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    x, base = torch.randn(2, 16, 16, device=last)
    with torch.cuda.device(0):
        y = delta_linear(x, base, [], torch.empty(0, device=last), backend="triton", algorithm="split")
    assert y.device == last
    assert_no_worse_than_torch(y, x.double() @ base.double().T, x @ base.T)


@pytest.mark.parametrize(
    ("samples", "num_tasks", "deltas", "inner"), ((1, 1, 1, 1), (13, 5, 0, 7), (300, 70, 33, 3), (4096, 256, 256, 16))
)
@pytest.mark.parametrize("baked", (False, True))
def test_plan_of_a_layer_is_that_of_separate_kernels(monkeypatch, samples, num_tasks, deltas, inner, baked):
    if reason := _ext.cuda_refusal():
        assert cuda_build.toolkit(torch.version.cuda) is None or shutil.which("c++") is None, reason
        pytest.skip("needs nvcc")
    base = torch.ones(8, 8, device="cuda")
    coeffs = (torch.rand(num_tasks, deltas, device="cuda") < 0.02).float()
    base_coeffs = torch.randint(0, 2, (num_tasks,), device="cuda").float() if baked else None
    weight = linear.Weight.of(base, [base] * deltas, coeffs, base_coeffs)
    index = TaskBatch.from_ids(torch.randint(-1, num_tasks, (samples,), device="cuda"), num_tasks).tensors
    rows = linear.Rows(*index, samples * inner, inner)
    assert linear._planned_by_extension(rows, num_tasks)
    one, ends = linear._joined(weight, rows)
    monkeypatch.setattr(linear, "_planned_by_extension", lambda rows, tasks: False)
    plain, plain_ends = linear._joined(weight, rows)
    assert torch.equal(ends, plain_ends)
    for got, want in zip(one[:3] + one[-1:], plain[:3] + plain[-1:], strict=True):
        assert torch.equal(got, want)
