"""What batches of other sizes would compile, after one of each kind: `python tests/variants.py` prints it as JSON.

Each such kernel would keep a request waiting in the middle of serving.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import aot
import torch
from taps_fast.kernels import coded, linear, pointwise

from taps_fast.tasks import TaskBatch

BATCHES = (
    ((3, 4, 13, 33), (9, 1, 9, 48), (1, 13, 15, 40), (5, 3, 14, 64)),
    ((16, 1, 9, 48), (1, 16, 15, 33), (4, 4, 14, 64)),
)
"""Samples, rows a sample, tasks and deltas: 1, multiples of 16 and others, all with the same tiles. Rows in whole
sixteens may have kernels of their own."""


def operators() -> dict[str, Callable[[int, int, int, int], object]]:
    """Each runs one batch."""
    weight, alone = torch.empty(512, 512, dtype=torch.bfloat16), (None, None, None)

    def index(samples: int, inner: int, tasks: int) -> tuple[object, ...]:
        return (*TaskBatch.from_ids(torch.zeros(samples, dtype=torch.int64), tasks).tensors, inner)

    def split(dtype: torch.dtype, run: Callable[..., object], algorithm: str = "split") -> Callable[..., object]:
        def mixed(samples: int, inner: int, tasks: int, deltas: int) -> None:
            x, base = weight[: samples * inner].to(dtype), weight.to(dtype)
            bias = () if run is linear.linear_dx else (base[: tasks + 1],)
            rest = (*bias, *index(samples, inner, tasks), algorithm)
            run(x, base, [base] * deltas, torch.ones(tasks, deltas), None, *rest)

        return mixed

    def single(samples: int, inner: int, tasks: int, deltas: int) -> None:
        many, coeffs = [weight] * deltas, torch.ones(deltas)
        linear.linear_fwd(weight[: samples * inner], weight, many, coeffs, None, weight[0], *alone, 1, "split")

    def weights(samples: int, inner: int, tasks: int, deltas: int) -> None:
        x, coeffs = weight[: samples * inner], torch.ones(tasks, deltas)
        pairs, wanted = [t * deltas + t for t in range(tasks)], range(32)
        where = index(samples * inner, 1, tasks)  # its loop divides by rows a sample: their kinds stay apart
        linear.linear_dw(x, x, weight, [weight] * deltas, coeffs, None, *where, pairs, wanted, True, True, True)

    def shifted(samples: int, inner: int, tasks: int, deltas: int) -> None:
        x, table = weight[: samples * inner], torch.ones(tasks + 1, 512)
        where = index(samples, inner, tasks)
        pointwise.scale_shift(x, table, table, *where, "relu")
        pointwise.scale_shift(x.t().reshape(-1, 2, 256), None, None, *alone, 1, "relu")

    def codes(samples: int, inner: int, tasks: int, deltas: int) -> None:
        x, factors = weight[: samples * inner], torch.ones(tasks, 512)
        signs = [torch.empty(512, 64, dtype=torch.uint8)] * 40
        coded.coded_fwd(x, x, signs, None, factors, [0] * tasks, *index(samples, inner, tasks), "bits")

    return {
        "forward": split(torch.bfloat16, linear.linear_fwd),
        "exact forward": split(torch.float32, linear.linear_fwd),
        "dx": split(torch.bfloat16, linear.linear_dx),
        "merge": split(torch.bfloat16, linear.linear_fwd, "merge"),
        "one task": single,
        "dw": weights,
        "scale_shift": shifted,
        "coded": codes,
    }


def more() -> dict[str, list[str]]:
    """For each operator the kernels that its later batches compile, and its first did not."""
    found = {}
    for name, run in operators().items():
        found[name] = []
        for first, *others in BATCHES:
            known = aot.recorded((9, 0), lambda run=run, first=first: run(*first))
            later = aot.recorded((9, 0), lambda run=run, others=others: [run(*batch) for batch in others])
            assert known, f"{name} launches nothing"
            found[name] += [f"{launch.kernel} {launch.blocks}" for launch in later if launch not in known]
    return found


if __name__ == "__main__":
    print(json.dumps(more(), indent=1))
