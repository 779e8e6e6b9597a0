"""Methods without training, each against a plain restatement on whole flat vectors."""

from __future__ import annotations

import pytest
import torch

from taps_fast import merging
from taps_fast.merging import TaskVectors

SHAPES = {"stem.w": (5, 3), "blocks.0.w": (4, 4), "blocks.0.b": (4,), "blocks.1.w": (4, 2), "norm.w": (3,)}
K = 4


def random_vectors():
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    deltas = {n: [torch.randn(s, generator=g) for _ in range(K)] for n, s in SHAPES.items()}
    return TaskVectors(base, deltas, [f"t{k}" for k in range(K)], {f"t{k}": {"head": torch.ones(k)} for k in range(K)})


@pytest.fixture(scope="module")
def vectors():
    return random_vectors()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def flattened(vectors):
    """W0 [N] and τ [K, N]."""
    tau = torch.stack([flat(d[k] for d in vectors.deltas.values()) for k in range(K)])
    return flat(vectors.base.values()), tau


def check(state, wanted):
    torch.testing.assert_close(flat(state[n] for n in SHAPES), wanted)


def test_task_arithmetic(vectors):
    base, tau = flattened(vectors)
    check(merging.task_arithmetic(vectors, 0.4), base + 0.4 * tau.sum(0))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(vectors, density):
    base, tau = flattened(vectors)
    keep = torch.zeros_like(tau)
    count = round(density * tau.shape[1])
    keep.scatter_(1, tau.abs().topk(count, 1).indices, 1.0)
    trimmed = tau * keep
    sign = torch.sign(trimmed.sum(0))
    chosen = torch.where(torch.sign(trimmed) == sign, trimmed, 0.0)
    mean = chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)
    check(merging.ties(vectors, 0.7, density), base + 0.7 * mean)
    elected = merging.elected(vectors, density)
    check(elected.fold([1.0, 0.0, 0.0, 0.0]), base + chosen[0])
    assert elected.own is not vectors.own and elected.own == vectors.own


def test_lines(vectors):
    base, tau = flattened(vectors)
    depth = {"stem.w": 0, "blocks.0.w": 0, "blocks.0.b": 0, "blocks.1.w": 1, "norm.w": 1}
    assert merging.block_depths(vectors.names) == depth
    scale = flat(torch.full(s, 0.2 + 0.5 * depth[n]) for n, s in SHAPES.items())
    check(merging.lines(vectors, 0.2, 0.5), base + scale * tau.sum(0))
    depth = {n: i for i, n in enumerate(SHAPES)}
    scale = flat(torch.full(s, 0.2 + 0.5 * i / 4) for i, s in enumerate(SHAPES.values()))
    check(merging.lines(vectors, 0.2, 0.5, depth), base + scale * tau.sum(0))


def test_tall_masks_and_consensus(vectors):
    base, tau = flattened(vectors)
    lam = [0.2, 0.4, 0.6, 0.0]
    total = tau.sum(0)
    masks = torch.stack([tau[k].abs() > lam[k] * (total - tau[k]).abs() for k in range(K)])
    tall = merging.tall_masks(vectors, lam)
    for k, task in enumerate(tall.tasks):
        check(tall.state(task), base + torch.where(masks[k], total, 0.0))
        assert tall.state(task)["head"].shape == (k,)
    for least in (1, 2, 4):
        agreed = masks.sum(0) >= least
        check(merging.consensus(vectors, 0.4, lam, least), base + torch.where(agreed, 0.4 * total, 0.0))
    numbers = base.numel()
    assert tall.bytes() == 2 * 4 * numbers + K * -(-numbers // 8)


def test_emr(vectors):
    base, tau = flattened(vectors)
    sign = torch.sign(tau.sum(0))
    agree = torch.sign(tau) == sign
    unified = sign * torch.where(agree, tau.abs(), 0.0).amax(0)
    merged = merging.emr(vectors)
    for k, task in enumerate(merged.tasks):
        mask = tau[k] * unified > 0
        scale = tau[k].abs().sum() / (unified.abs() * mask).sum()
        check(merged.state(task), base + scale * mask * unified)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_emr_of_small_deltas_in_half_precision(dtype):
    """Their products are below the smallest number of float16."""
    vectors = random_vectors().moved(lambda t: (1e-4 * t).to(dtype))
    merged, wanted = merging.emr(vectors), merging.emr(vectors.moved(lambda t: t.double()))
    assert all(torch.equal(merged.masks[t][n], wanted.masks[t][n]) for t in vectors.tasks for n in vectors.names)
    assert merged.scales == pytest.approx(wanted.scales, rel=1e-2)


def test_doge():
    """Against autograd on the loss as it is written, one matrix after the other."""
    g = torch.Generator().manual_seed(1)
    shapes = {"0.w": (12, 9), "0.b": (12,), "1.w": (8, 2, 3, 3)}
    base = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    deltas = {n: [0.1 * torch.randn(s, generator=g) for _ in range(3)] for n, s in shapes.items()}
    deltas["1.w"][2] = torch.zeros(shapes["1.w"])
    seen = []
    got = merging.doge(
        TaskVectors(base, deltas, ["a", "b", "c"]), 0.5, 0.3, subspace=2, steps=40, lr=1e-2, progress=seen.append
    )
    assert seen == ["0.w", "1.w"]
    assert torch.equal(got["0.b"], base["0.b"])
    matrices = [n for n in shapes if n != "0.b"]
    sizes = [torch.cat([deltas[n][k].flatten() for n in matrices]).abs() for k in range(3)]
    limits = [s.sort(descending=True).values[round(0.3 * len(s)) - 1] for s in sizes]
    for name in matrices:
        tau = [d.flatten(1) for d in deltas[name]]
        lam = [0.5 / t.norm() if t.any() else torch.tensor(0.0) for t in tau]
        rank = min(tau[0].shape)
        left = torch.cat([torch.linalg.svd(t)[0][:, : rank // 3] for t in tau], 1)
        shared = torch.linalg.svd(left)[0][:, : rank // 2]
        delta = torch.zeros_like(tau[0], requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=1e-2)
        for _ in range(40):
            merged = sum(c * (t + delta) for c, t in zip(lam, tau, strict=True))
            loss = sum(((t * (t - merged)).sum(1) ** 2).sum() for t in tau)
            optimizer.zero_grad()
            loss.backward()
            delta.grad -= shared @ shared.T @ delta.grad
            optimizer.step()
        assert delta.abs().max() > 1e-2
        masked = ((t.abs() >= m) * (t + delta) for t, m in zip(tau, limits, strict=True))
        wanted = base[name].flatten(1) + sum(c * m for c, m in zip(lam, masked, strict=True))
        torch.testing.assert_close(got[name].flatten(1), wanted.detach(), atol=1e-4, rtol=1e-4)


def test_a_task_that_nothing_serves_has_scale_0():
    vectors = TaskVectors({"w": torch.zeros(1)}, {"w": [torch.tensor([3.0]), torch.tensor([-1.0])]}, ["a", "b"])
    assert merging.emr(vectors).scales == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda v: merging.ties(v, density=0.0), r"ties: density must be in \(0, 1\], got 0.0"),
        (lambda v: merging.doge(v, density=1.5), r"doge: density must be in \(0, 1\], got 1.5"),
        (
            lambda v: merging.doge(v, subspace=0),
            "doge: subspace must be at least 1 and steps at least 0, got 0 and 400",
        ),
        (lambda v: merging.tall_masks(v, [0.4]), "tall_masks: lam must be one number or 4, got 1"),
        (lambda v: merging.tall_masks(v).state("x"), "MaskedDelta: task must be one of t0, t1, t2, t3, got 'x'"),
        (lambda v: merging.lines(v, 1, 1, {}), "lines: depths must name every merged tensor, got none for 'stem.w'"),
    ],
)
def test_errors(vectors, call, text):
    with pytest.raises(ValueError, match=text):
        call(vectors)


def test_a_number_may_be_a_tensor(vectors):
    for lam in (torch.tensor(0.4), torch.full((4,), 0.4), [torch.tensor(0.4)] * 4):
        for task in vectors.tasks:
            found, wanted = merging.tall_masks(vectors, lam).masks[task], merging.tall_masks(vectors).masks[task]
            assert all(torch.equal(found[name], wanted[name]) for name in vectors.names)
    for lam in ("x", None, torch.ones(4, 1)):
        with pytest.raises(TypeError, match="consensus: lam must be one number or 4, got "):
            merging.consensus(vectors, lam=lam)


def test_no_tensors():
    """Nothing to merge is the base, for every method."""
    empty = TaskVectors({"w": torch.ones(2)}, {}, ["a", "b"])
    for state in (
        merging.task_arithmetic(empty),
        merging.ties(empty),
        merging.doge(empty),
        merging.lines(empty, 1, 1),
        merging.consensus(empty),
        merging.tall_masks(empty).state("a"),
        merging.emr(empty).state("b"),
    ):
        assert state["w"].tolist() == [1.0, 1.0]
