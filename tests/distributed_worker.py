"""What two processes check together; `test_distributed` starts them with torch's launcher."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from taps_fast import TapsModel, TaskBatch

TASKS = ["cubs", "cars", "birds"]
# No sample is a bird, and each process has a task that the other has not.
MIXES = (["cubs", "cubs", "base", "cubs"], ["cars", "base", "cars", "cars"])


def adapted() -> TapsModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    model = TapsModel(net.double(), TASKS, head="3")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim():
                parameter += 0.1 * torch.randn_like(parameter)
    model.probe(torch.randn(2, 6, dtype=torch.float64))
    return model


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6, dtype=torch.float64), torch.randint(4, (8,))


def mine(t: torch.Tensor) -> torch.Tensor:
    return t.chunk(2)[dist.get_rank()]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor, tasks: list[str]) -> torch.Tensor:
    return F.cross_entropy(model(x, tasks=tasks), y)


def alone() -> dict[str, torch.Tensor]:
    """The gradients of one process that has the whole batch; zeros where there are none."""
    model, (x, y) = adapted(), samples()
    loss_of(model, x, y, [*MIXES[0], *MIXES[1]]).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable(model)}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n.removeprefix("module."), p) for n, p in model.named_parameters() if p.requires_grad]


def check_gradients(model: nn.Module) -> None:
    wanted = alone()
    for name, parameter in trainable(model):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(whole, wanted.pop(name), msg=lambda text, name=name: f"{name}: {text}")
    assert not wanted, f"no such parameters: {sorted(wanted)}"


def ddp() -> None:
    """Averaged gradients are those of the whole batch, also of tasks that a process or all of them lack."""
    model = DistributedDataParallel(adapted(), find_unused_parameters=True)
    x, y = map(mine, samples())
    for _ in range(2):
        model.zero_grad()
        loss_of(model, x, y, MIXES[dist.get_rank()]).backward()
        check_gradients(model)
    # The next batch has one task alone, in all processes.
    model.zero_grad()
    loss_of(model, x, y, ["birds"] * 4).backward()
    assert all(p.grad is None or not p.grad.any() for n, p in trainable(model) if ".cubs" in n)


def statistics() -> None:
    """Each process moves the statistics of its own batches; shared, all have their average by the batches counted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))).double()
    for norm in (net[1], net[2][0]):
        norm.num_batches_tracked.fill_(5)
    model = TapsModel(net, TASKS, head="2").train()
    model.probe(torch.randn(2, 6, dtype=torch.float64))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    untouched = copy.deepcopy(model.state_dict())

    def run(*batches: list[str]) -> list[dict[str, torch.Tensor]]:
        """The state of every process after batches of its own, before the statistics are shared."""
        for tasks in batches:
            loss_of(wrapped, torch.randn(4, 6, dtype=torch.float64), torch.randint(4, (4,)), tasks).backward()
        states: list[dict[str, torch.Tensor]] = [{}, {}]
        dist.all_gather_object(states, model.state_dict())
        model.share_statistics()
        return states

    def check(states: list[dict[str, torch.Tensor]], before: dict[str, torch.Tensor], **counts: list[int]) -> None:
        found, seen = model.state_dict(), 0
        for norm in ("model.1.tasks.{}", "model.2.tasks.{}.0"):
            for task, (first, second) in counts.items():
                name, total = norm.format(task), first + second
                assert found[f"{name}.num_batches_tracked"] == before[f"{name}.num_batches_tracked"] + total, name
                for key in (f"{name}.running_mean", f"{name}.running_var"):
                    mean = (first * states[0][key] + second * states[1][key]) / total if total else before[key]
                    torch.testing.assert_close(found[key], mean, msg=lambda text, key=key: f"{key}: {text}")
                    seen += 1
        assert seen == 4 * len(TASKS)

    torch.manual_seed(2 + dist.get_rank())
    both = ["cubs"] * 4
    states = run(both, both, both) if dist.get_rank() == 0 else run(both, ["cars"] * 4, ["cars"] * 2 + both[:2])
    check(states, untouched, cubs=[3, 2], cars=[0, 2], birds=[0, 0])
    before = copy.deepcopy(model.state_dict())
    check(run(), before, cubs=[0, 0], cars=[0, 0], birds=[0, 0])  # shared already
    states = run(["cars"] * 4, [("birds", "cars")[dist.get_rank()]] * 4)
    check(states, before, cubs=[0, 0], cars=[1, 2], birds=[1, 0])
    model.load_state_dict(before)  # the same in all processes, whatever they had counted
    check(run(both), before, cubs=[1, 1], cars=[0, 0], birds=[0, 0])


def shard(model: TapsModel) -> list[nn.Parameter]:
    """Shards all but the scores: they are scalars, and stay float32 whatever the weights are."""
    scores = [p for layer in model.conversion.layers.values() for p in layer.scores.parameters()]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # also where there is a GPU
    for layer in model.conversion.layers.values():
        fully_shard(layer, mesh=mesh, ignored_params=set(scores))
    fully_shard(model, mesh=mesh, ignored_params=set(scores))
    return scores


def fsdp() -> None:
    """The same with sharded parameters. Ids as a TaskBatch give absent tasks zeros, so that all processes agree."""
    model = adapted()
    scores = shard(model)
    assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if ".scores." not in n)
    x, y = map(mine, samples())
    ids = torch.tensor([-1 if name == "base" else TASKS.index(name) for name in MIXES[dist.get_rank()]])
    F.cross_entropy(model(x, tasks=TaskBatch.from_ids(ids, len(TASKS))), y).backward()
    for score in scores:
        dist.all_reduce(score.grad)
        score.grad /= dist.get_world_size()
    check_gradients(model)


def folders(folder: Path) -> None:
    """A sharded model saves the same task as a whole one, and takes no new one."""
    model = adapted()
    model.save_task("cars", folder / "whole")
    sharded = adapted()
    shard(sharded)
    sharded.save_task("cars", folder / "sharded")
    dist.barrier()
    x, _ = samples()
    for which in ("whole", "sharded"):
        other = adapted()
        other.load_task(folder / which, name="again")
        assert torch.equal(other(x, tasks="again"), model(x, tasks="cars"))
    try:
        sharded.load_task(folder / "whole", name="again")
    except ValueError as error:
        assert "load_task: the model must get its tasks before it is sharded, got " in str(error), error
    else:
        raise AssertionError("a sharded model took a new task")


def checkpoints(folder: Path) -> None:
    """Distributed checkpoints, written by a sharded model and read by a wrapped one."""
    import torch.distributed.checkpoint as dcp

    sharded = adapted()
    with torch.no_grad():
        for _, p in trainable(sharded):
            p.add_(1.0)
    expected = copy.deepcopy(sharded.state_dict())
    shard(sharded)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder / "dcp")
    plain = adapted()
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=folder / "dcp")
    plain.load_state_dict(state)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, expected[name]), name


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in (ddp, statistics, fsdp):
        check()
        print(f"rank {dist.get_rank()}: {check.__name__}", flush=True)
    for check in (folders, checkpoints):
        check(folder)
        print(f"rank {dist.get_rank()}: {check.__name__}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
