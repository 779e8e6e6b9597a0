"""State dicts, copies and wrapped parts of a model: what belongs to the network that was adapted stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Transformer, images, three_tasks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torch.nn.utils.parametrizations import orthogonal
from torch.optim.swa_utils import AveragedModel

from taps_fast import TapsModel


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_tasks_of_a_model_with_a_wrapped_part_load_elsewhere(wrap, tmp_path):
    net = Transformer()
    model, other = three_tasks(net), TapsModel(net, head="fc")
    model.model.block = wrap(model.model.block)
    model.model.norm = wrap(model.model.norm)
    assert model.fingerprint() == other.fingerprint()
    model.save_task("cubs", tmp_path)
    other.load_task(tmp_path)
    if wrap is checkpoint_wrapper:
        x = images(2)
        assert torch.equal(other(x, tasks="cubs"), model(x, tasks="cubs"))


def test_a_model_whose_head_is_parametrized_can_be_copied():
    net = nn.Sequential(nn.Linear(4, 4), orthogonal(nn.Linear(4, 4)))
    model = TapsModel(net, ["cubs", "cars"], head="1")
    twin = copy.deepcopy(model)
    assert type(twin.model[1]) is type(model.model[1])
    x = torch.randn(3, 4)
    assert torch.equal(twin(x, tasks=[0, 1, None]), model(x, tasks=[0, 1, None]))
    AveragedModel(model).update_parameters(model)
