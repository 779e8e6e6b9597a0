"""The emulator that the CUDA kernels are tested in: right where a GPU is, and strict where a GPU is lenient."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
import torch

emulated = emulator.load()
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def settings():
    emulated.reset()
    emulated.settings().has_clusters = True
    yield emulated.settings()
    emulated.reset()


def packed(pair: torch.Tensor) -> torch.Tensor:
    """Two 16-bit numbers in one 32-bit register, the first in the low half."""
    return pair.contiguous().view(torch.int32)[..., 0]


@pytest.mark.parametrize("dtype", TYPES)
def test_mma_is_a_product_in_ptx_fragments(dtype):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": rows and columns of each register."""
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(size, generator=g) for size in ((16, 16), (16, 8), (16, 8)))
    a, b = a.to(TYPES[dtype]), b.to(TYPES[dtype])
    registers = torch.empty(32, 10)
    places = []
    for lane in range(32):
        group, within = divmod(lane, 4)
        rows = [group + 8 * (r % 2) for r in range(4)]
        columns = [2 * within + 8 * (r // 2) for r in range(4)]
        words = [packed(a[row, k : k + 2]) for row, k in zip(rows, columns, strict=True)]
        words += [packed(b[k : k + 2, group]) for k in (2 * within, 2 * within + 8)]
        registers[lane, :6] = torch.stack(words).view(torch.float32)
        place = [(group + 8 * (r // 2), 2 * within + r % 2) for r in range(4)]
        registers[lane, 6:] = torch.stack([c[p] for p in place])
        places += place
    got = torch.from_numpy(getattr(emulated, f"mma_{dtype}")(registers.flatten().numpy(), 128))
    expected = c + a.float() @ b.float()
    torch.testing.assert_close(got, torch.stack([expected[p] for p in places]))


def test_warp_instructions():
    x = np.linspace(-1, 1, 32, dtype=np.float32)[::-1].copy()
    lane = np.arange(32)
    shuffled, below, up, has_one, has_two = emulated.warp(x, 5 * 32).reshape(5, 32)
    assert (shuffled == x[lane ^ 5]).all()
    assert (up == np.where(lane < 3, lane, lane - 3)).all()
    assert (has_one == 1).all() and (has_two == 0).all()
    assert (below == np.concatenate([[0], np.cumsum(x > 0)[:-1]])).all()


ORDERS = ("forward", "backward", "random")


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_of_a_block(settings, order):
    settings.order = order
    x = np.arange(64, dtype=np.float32)
    assert (emulated.neighbour(x, 64, threads=64) == np.roll(x, -1)).all()


def test_a_missing_barrier_shows_in_some_order(settings):
    x = np.arange(64, dtype=np.float32)
    assert not (emulated.neighbour_without_barrier(x, 64, threads=64) == np.roll(x, -1)).all()


def test_asynchronous_copies_arrive_when_waited_for_and_not_before():
    x = np.arange(128, dtype=np.float32)
    zeros = np.zeros((32, 4))
    done = emulated.copy(x, 256).reshape(32, 2, 4)
    assert (done[:, 0] == x.reshape(32, 4)).all() and (done[:, 1] == zeros).all()
    first = emulated.copy_first(x, 256).reshape(32, 2, 4)
    assert (first[:, 0] == x.reshape(32, 4)).all() and np.isnan(first[:, 1]).all()
    assert np.isnan(emulated.copy_without_wait(x, 256)).all()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cluster_read_each_other(settings, order):
    settings.order = order
    x = np.array([1, 20, 300, 4000], dtype=np.float32)
    assert (emulated.cluster(x, 4, blocks=4) == 4321).all()
    assert np.isnan(emulated.cluster_without_barrier(x, 4, blocks=4)).any()


@pytest.mark.parametrize(
    ("probe", "text"),
    (
        ("deadlock", "deadlock: thread 0 of block 0 waits at __syncthreads, where 31 of 32 have come; 1 threads"),
        ("reads_beyond", "a read outside of the inputs (thread 0 of block 0)"),
        ("writes_input", "a write outside of the outputs (thread 0 of block 0)"),
        ("misaligned_copy", "a global address that is not a multiple of its size (thread 0 of block 0)"),
        ("writes_beyond_shared", "a write beyond the block's shared memory"),
    ),
)
def test_what_would_be_a_fault_is_an_error(probe, text):
    x = np.zeros(16, dtype=np.float32)
    with pytest.raises(RuntimeError) as error:
        getattr(emulated, probe)(x, 16)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"shared_limit": 1024}, "too much shared memory"),
        ({"has_clusters": False}, "invalid cluster"),
        ({"refuse": "no"}, "no"),
    ),
)
def test_launches_are_refused_as_a_gpu_does(settings, change, text):
    for name, value in change.items():
        setattr(settings, name, value)
    with pytest.raises(RuntimeError, match=text):
        emulated.cluster(np.zeros(2, dtype=np.float32), 2, blocks=2)


def test_more_blocks_than_a_grid_has_are_refused(settings):
    with pytest.raises(RuntimeError, match="a grid has fewer than 2\\^31 blocks"):
        emulated.warp(np.zeros(32, dtype=np.float32), 160, blocks=2**31)
    assert not settings.launches
