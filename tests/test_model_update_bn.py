"""`torch.optim.swa_utils.update_bn`: the statistics of the base stay, those of tasks are reset and collected."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from taps_fast import TapsModel

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class Head(nn.Sequential):
    pass


def moved(norms="task"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), Head(nn.BatchNorm1d(16), nn.Linear(16, 3)))
    net(torch.randn(8, 3, 4, 4) + 1)
    return net, TapsModel(net, ["cubs", "cars"], head="3", norms=norms)


def test_the_statistics_of_the_base_stay():
    for norms in ("task", "shared"):
        net, model = moved(norms)
        x, fingerprint = torch.randn(8, 3, 4, 4), model.fingerprint()
        model.eval()
        want = model(x, tasks="base")
        model.set_task("cubs")
        update_bn([x], model)
        model.eval()
        assert torch.equal(model(x, tasks="base"), want) and model.fingerprint() == fingerprint
        own = model.conversion.head.tasks["cubs"][0]
        assert own.num_batches_tracked == 1 and model.conversion.head.tasks["cars"][0].num_batches_tracked == 0
        twin = copy.deepcopy(model)
        update_bn([x], twin)
        assert torch.equal(twin.eval()(x, tasks="base"), want)


def test_copies_of_the_base_reset_as_ever(tmp_path):
    _, model = moved()
    model.save_task("cubs", tmp_path)
    model.load_task(tmp_path, name="birds")
    model.add_task("dogs")
    tasks = [m for name in model.tasks for own in model.modules_of(name).values() for m in own.modules()]
    for module in [*tasks, *model.merge("cubs").modules(), *model.merge("base").modules()]:
        if isinstance(module, BATCH_NORMS):
            assert module.num_batches_tracked == 1 and "reset_running_stats" not in vars(module)
            module.reset_running_stats()
            assert module.num_batches_tracked == 0
