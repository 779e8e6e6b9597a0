"""The networks of the whole-model tables, compact and without downloads: weights are random, shapes are real."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer with a class token (arXiv 2010.11929)."""

    def __init__(self, dim: int, depth: int, heads: int, *, image: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)
        nn.init.constant_(self.bn2.weight, 0.2)  # or random weights would double the signal in each block

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = _conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, out, 1), nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)
        nn.init.constant_(self.bn3.weight, 0.2)  # as in `BasicBlock`

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet (arXiv 1512.03385) with strides in the 3 x 3 convolutions; convolutions are in the usual order."""

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        channels, stages = 64, []
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stages.append(block(channels, 64 << stage, 2 if stage and not i else 1))
                channels = block.expansion * 64 << stage
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, 1000)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), _conv(channels, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """A DenseNet (arXiv 1608.06993): norms come before convolutions."""

    def __init__(self, depths: Sequence[int] = (6, 12, 24, 16), growth: int = 32) -> None:
        super().__init__()
        channels = 2 * growth
        layers = [_conv(3, channels, 7, 2), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for stage, depth in enumerate(depths):
            if stage:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), _conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
                channels //= 2
            layers += [DenseLayer(channels + i * growth, growth) for i in range(depth)]
            channels += depth * growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, 1000)
        _initialise(self, "fan_in")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class InvertedResidual(nn.Sequential):
    """1 x 1 to ``expand`` times the channels, depthwise, 1 x 1 back."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int) -> None:
        wide, layers = expand * channels, []
        if expand > 1:
            layers += [_conv(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [_conv(wide, wide, kernel, stride, wide), nn.BatchNorm2d(wide), nn.ReLU6()]
        super().__init__(*layers, _conv(wide, out, 1), nn.BatchNorm2d(out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6."""

    STAGES = ((1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1),
              (6, 192, 4, 5, 2), (6, 320, 1, 3, 1))  # fmt: skip
    """Expansion, channels, depth, kernel, stride."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6()]
        channels = 32
        for expand, out, depth, kernel, stride in self.STAGES:
            for i in range(depth):
                layers.append(InvertedResidual(channels, out, kernel, 1 if i else stride, expand))
                channels = out
        self.features = nn.Sequential(*layers, _conv(channels, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.classifier = nn.Linear(1280, 1000)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def _initialise(network: nn.Module, mode: str = "fan_out") -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


# Name: how to build it, the path of its head, the shape of one sample.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str | None, tuple[int, ...]]] = {
    "vit_s16": (lambda: ViT(384, 12, 6), "head", (3, 224, 224)),
    "resnet34": (lambda: ResNet(BasicBlock, (3, 4, 6, 3)), "fc", (3, 224, 224)),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), "fc", (3, 224, 224)),
    "resnet50.112": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), "fc", (3, 112, 112)),
    "densenet121": (DenseNet, "classifier", (3, 224, 224)),
    "efficientnet_lite0": (EfficientNetLite0, "classifier", (3, 224, 224)),
    "tiny": (lambda: ViT(64, 2, 2, image=32, patch=8), "head", (3, 32, 32)),
    "batchnorm256": (lambda: nn.Sequential(nn.BatchNorm2d(256)), None, (256, 14, 14)),
    "layernorm384": (lambda: nn.Sequential(nn.LayerNorm(384)), None, (197, 384)),
}


def build(name: str) -> nn.Module:
    """The network, with the same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name][0]()
