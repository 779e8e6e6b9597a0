"""Small networks that have what real ones have, and tasks that differ in everything a task can have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from taps_fast import TapsModel

TASKS = ("cubs", "cars", "dogs")


class PadConv2d(nn.Conv2d):
    """Pads in its forward, as EfficientNet's and timm's "same" convolutions do, and reads its weight's shape."""

    def forward(self, x):
        rows, columns = (k - 1 for k in self.weight.shape[-2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StdConv2d(nn.Conv2d):
    """Standardises its weight, as BiT's convolutions do: not linear in it."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class ConvNet(nn.Module):
    def __init__(self, third=nn.Conv2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = PadConv2d(8, 8, 3, groups=2)
        self.conv3 = third(8, 6, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(2, 6)
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv3(F.relu(self.conv2(x)))))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Takes [B, 3, H, W], or [H, W] tokens a sample through ``layout``'s axes inside."""

    def __init__(self, width=8):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.block = Block(width)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 7)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.fc(self.norm(self.block(x))[:, 0])


def images(count, size=8, dtype=torch.float64):
    return torch.randn(count, 3, size, size, dtype=dtype)


def perturb(model: TapsModel, closed=("cars",)) -> TapsModel:
    """Gives every task weights, norms and statistics of its own; the first layer's gate is closed for all, and every
    second one for the tasks in ``closed``."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            owned = any(f".{task}" in name for task in model.tasks)
            if owned and ".scores." not in name and value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.3)
        for i, layer in enumerate(model.conversion.layers.values()):
            for task in model.tasks:
                if i == 0 or (task in closed and i % 2):
                    layer.scores[task].fill_(0.03)
    return model


def three_tasks(net, head="fc", dtype=torch.float64, **options) -> TapsModel:
    """``net`` adapted to `TASKS` of 3, 5 and as many classes as the base, each different from the base."""
    torch.manual_seed(1)
    model = TapsModel(net.to(dtype).eval(), head=head, **options)
    for task, classes in zip(TASKS, (3, 5, None), strict=True):
        model.add_task(task, classes if head else None)
    return perturb(model)


def assert_rows_as_separate(model: TapsModel, x, tasks, batch_dim=0, run=None):
    """One mixed forward gives each sample what its task's merged model gives for that task's samples alone."""
    mixed = (run or model)(x, tasks=tasks)
    for task in dict.fromkeys(tasks):
        rows = [i for i, name in enumerate(tasks) if name == task]
        alone = model.merge(task or "base")(x.index_select(batch_dim, torch.tensor(rows)))
        mine = mixed.index_select(batch_dim if mixed.dim() == x.dim() else 0, torch.tensor(rows))
        width = alone.shape[-1]
        torch.testing.assert_close(mine[..., :width], alone)
        assert bool((mine[..., width:] == -torch.inf).all())
    return mixed
