"""The tensors of a whole network's workload, the truth about it, and what it must cost."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import taps_fast
from taps_fast import testing

from .networks import NETWORKS, build
from .timing import storage_bytes
from .workloads import Workload, open_layers

Results = dict[str, Tensor]


class NetworkProblem:
    """A network, its tasks' random deltas, norms and heads, and a batch.

    Attributes:
        base: the network without tasks. model: the same, adapted; a closed gate has no delta in inference.
        ids: int64 [B]. labels: int64 [B], for training, which is one task's (``task0``).
    """

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self.device = workload, device
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.train = workload.phase == "train"
        _, head, size = NETWORKS[workload.layer]
        self.base = build(workload.layer).to(device, self.dtype).train(self.train)
        if len(size) == 3:
            self.base = self.base.to(memory_format=torch.channels_last)
        # Not sliced, as by itself where memory is kept: processes that measure memory must run what was timed.
        self.model = taps_fast.TapsModel(self.base, head=head, slice=None)
        self._draw = torch.Generator().manual_seed(0)
        for t in range(workload.tasks or 0):
            self.model.add_task(f"task{t}")
            self._adapt(t)
        self.images = self._randn(workload.samples, *size)
        if len(size) == 3:
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.ids = torch.tensor(workload.ids(), device=device)
        self.labels = torch.randint(1000, (workload.samples,), generator=self._draw).to(device)

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._draw).to(self.device, self.dtype)

    @torch.no_grad()
    def _adapt(self, task: int) -> None:
        name, layers = f"task{task}", list(self.model.conversion.layers.values())
        if isinstance(self.workload.gates, str):
            opened = open_layers(task, len(layers), self.workload.gates)
        else:
            opened = set(range(len(layers))) if task in self.workload.open_tasks() else set()
        for i, layer in enumerate(layers):
            layer.scores[name].fill_(layer.initial_score if i in opened else 0.0)
            for own in (layer.deltas, layer.bias_deltas):
                if name in own and (i in opened or self.train):
                    own[name].copy_(0.1 * layer.base.std() * self._randn(*own[name].shape))
                elif name in own:
                    del own[name]
        for module in self.model.modules_of(name).values():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor += 0.1 * self._randn(*tensor.shape).abs()

    def groups(self) -> list[tuple[int, Tensor | slice]]:
        """Samples by task, from the ids: part of what is timed."""
        counts = self.ids.bincount(minlength=self.workload.tasks or 1).tolist()
        present = [t for t, n in enumerate(counts) if n]
        if len(present) == 1:
            return [(present[0], slice(None))]
        rows = self.ids.argsort(stable=True).split(counts)
        return [(t, rows[t]) for t in present]

    def merged(self, task: int, dtype: torch.dtype | None = None) -> nn.Module:
        return self.model.merge(f"task{task}").to(dtype or self.dtype)

    @functools.cached_property
    def copies(self) -> list[nn.Module]:
        """Every task's merged network."""
        return [self.merged(t) for t in range(self.workload.tasks or 0)]

    @functools.cached_property
    def _judged(self) -> tuple[list[int], Results, Results, dict[str, float]]:
        """The samples judged, the truth in float64, PyTorch's own answer, and the scales of sums that cancel."""
        if self.train:
            exact = Materialised(self, torch.float64)
            ref, found = exact.learn()
            size = max(float(found[n].norm() * w.detach().norm()) for n, w in exact.named() if n.endswith(".delta"))
            # A deep network's gradients differ by the order of the batch alone: PyTorch's error is the worst of three.
            plain = Materialised(self, self.dtype)
            draws = [plain.learn(order)[0] for order in (None, *(torch.randperm(len(self.images)) for _ in range(2)))]
            low = {n: max((d[n] for d in draws), key=functools.partial(_distance, r)) for n, r in ref.items()}
            return list(range(len(self.images))), ref, low, {"dscores": size}
        # One sample of each task, of four tasks at most: samples do not meet in inference.
        first = {int(t): i for i, t in reversed(list(enumerate(self.ids.tolist())))}
        chosen = sorted(first.items())[:4]
        ref, low = (
            {"y": torch.cat([self.merged(t, dtype)(self.images[i : i + 1].to(dtype)) for t, i in chosen])}
            for dtype in (torch.float64, self.dtype)
        )
        return [i for _, i in chosen], ref, low, {}

    def check(self, results: Results) -> None:
        """Judges outputs, and in training gradients, by `taps_fast.testing`'s rule."""
        samples, ref, low, scales = self._judged
        for name, value in ref.items():
            out = results[name][samples] if name == "y" else results[name]
            testing.assert_no_worse_than_torch(out, value, low[name], scale=scales.get(name), name=name)

    def flops(self) -> int:
        """Of the plain network, counted by PyTorch; in training with all its gradients."""
        network = copy.deepcopy(self.base).requires_grad_(self.train)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(self.train):
            y = network(self.images)
            if self.train:
                y.sum().backward()
        return int(counter.get_total_flops())

    def bytes(self, merged: bool) -> int:
        """Weights that the batch needs, once a pass, and the images; activations could stay in the cache."""
        present = [f"task{t}" for t in sorted(set(self.ids.tolist()))]
        base = storage_bytes(list(self.base.parameters()))
        own = storage_bytes([p for name in present for p in self._own(name)])
        weights = len(present) * base if merged else base + own
        return (2 * weights + own if self.train else weights) + storage_bytes([self.images])

    def _own(self, task: str) -> Iterator[Tensor]:
        for layer in self.model.conversion.layers.values():
            yield from (own[task] for own in (layer.deltas, layer.bias_deltas) if task in own)
        for module in self.model.modules_of(task).values():
            yield from module.parameters()

    def weight_bytes(self) -> int:
        return storage_bytes(list(self.model.parameters()))

    def keep(self, weights: Sequence[Tensor]) -> None:
        """Forgets the networks that a provider has made others of; what it runs, it holds itself."""
        self.base = self.model = None
        self.__dict__.pop("copies", None)


class Materialised:
    """One task of a problem the way the public TAPS layer does it: W + I(s)·Δ summed in autograd."""

    def __init__(self, p: NetworkProblem, dtype: torch.dtype) -> None:
        self.images, self.labels = p.images.to(dtype), p.labels
        self.network = p.model.merge("task0").requires_grad_(False)
        for path in p.model.modules_of("task0"):
            self.network.get_submodule(path).requires_grad_()
        for path, layer in p.model.conversion.layers.items():
            self.network.set_submodule(path, MaterialisedLayer(self.network.get_submodule(path), layer))
        self.network.to(dtype).train()

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained."""
        return ((name, w) for name, w in self.network.named_parameters() if w.requires_grad)

    def learn(self, order: Tensor | None = None) -> tuple[Results, dict[str, Tensor]]:
        """`learned` for this network, with the batch in another order."""
        order = torch.arange(len(self.images)) if order is None else order
        joined, found = learned(self.network, self.images[order], self.labels[order], dict(self.named()))
        joined["y"] = joined["y"][order.argsort()]
        return joined, found


class MaterialisedLayer(nn.Module):
    def __init__(self, plain: nn.Linear | nn.Conv2d, layer: nn.Module) -> None:
        super().__init__()
        self.op = F.linear
        if isinstance(plain, nn.Conv2d):
            self.op = functools.partial(
                F.conv2d, stride=plain.stride, padding=plain.padding, dilation=plain.dilation, groups=plain.groups
            )
        self.threshold = layer.threshold
        self.register_buffer("base", layer.base.detach())
        self.register_buffer("base_bias", None if layer.base_bias is None else layer.base_bias.detach())
        self.delta = nn.Parameter(layer.deltas["task0"].detach().clone())
        self.bias_delta = None
        if layer.base_bias is not None:
            self.bias_delta = nn.Parameter(layer.bias_deltas["task0"].detach().clone())
        self.score = nn.Parameter(layer.scores["task0"].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.score >= self.threshold).to(x.dtype) + self.score - self.score.detach()
        bias = None if self.bias_delta is None else self.base_bias + gate * self.bias_delta
        return self.op(x, self.base + gate * self.delta, bias)


def learned(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, named: dict[str, Tensor]
) -> tuple[Results, dict[str, Tensor]]:
    """y and the gradients of the loss joined by kind, to be judged; and each gradient by name."""
    y = forward(images)
    gradients = torch.autograd.grad(F.cross_entropy(y, labels), list(named.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(named.items(), gradients, strict=True)
    }
    joined: dict[str, list[Tensor]] = {}
    for name, gradient in found.items():
        kind = "dscores" if name.endswith(".score") else "ddeltas" if name.endswith(".delta") else "dothers"
        joined.setdefault(kind, []).append(gradient.flatten())
    return {"y": y.detach()} | {kind: torch.cat(parts) for kind, parts in joined.items()}, found


def _distance(ref: Tensor, out: Tensor) -> float:
    return float((out - ref).abs().max())
