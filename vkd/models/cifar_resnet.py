"""The CIFAR ResNets of the literature.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, in the form in which the
distillation literature uses them (RepDistiller, mdistiller): projection shortcuts in place of the paper's padded
identities. Parameter names are theirs, so their checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import StagedNetwork, build, cifar_cfg


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)].

    The shortcut is a strided 1x1 convolution with BatchNorm where the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(x + shortcut)


class CifarResNet(StagedNetwork):
    """A CIFAR ResNet: a 3x3 stem, three stages of (depth - 2) / 6 basic blocks each, global pooling, `fc`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes].

    Args:
        depth: 6n + 2.
        widths: channels of the stem and of the three stages.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    stage_names = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), not {depth}")
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": widths[0], "reduction": 1, "module": "act1"}]
        for index, name in enumerate(self.stage_names):
            stride = 1 if index == 0 else 2
            blocks = [BasicBlock(widths[index], widths[index + 1], stride)]
            blocks += [BasicBlock(widths[index + 1], widths[index + 1]) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": widths[index + 1], "reduction": 2**index, "module": name})
        self.num_features = widths[-1]
        self._make_head(num_classes, global_pool)
        self._initialize_all()


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet8_width4": cifar_cfg(),
        "cifar_resnet8": cifar_cfg(),
        "cifar_resnet14": cifar_cfg(),
        "cifar_resnet20": cifar_cfg(),
        "cifar_resnet32": cifar_cfg(),
        "cifar_resnet44": cifar_cfg(),
        "cifar_resnet56": cifar_cfg(),
        "cifar_resnet110": cifar_cfg(),
        "cifar_resnet8x4": cifar_cfg(),
        "cifar_resnet32x4": cifar_cfg(),
    }
)


@register_model
def cifar_resnet8_width4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 with four channels in every layer, for 8x8 scans of digits: so small that a teacher matters."""
    return build(CifarResNet, "cifar_resnet8_width4", pretrained, **{"depth": 8, "widths": (4, 4, 4, 4), **kwargs})


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8: 83,892 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet8", pretrained, **{"depth": 8, **kwargs})


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-14: 181,108 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet14", pretrained, **{"depth": 14, **kwargs})


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 278,324 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet20", pretrained, **{"depth": 20, **kwargs})


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32: 472,756 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet32", pretrained, **{"depth": 32, **kwargs})


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44: 667,188 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet44", pretrained, **{"depth": 44, **kwargs})


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 861,620 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet56", pretrained, **{"depth": 56, **kwargs})


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110: 1,736,564 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet110", pretrained, **{"depth": 110, **kwargs})


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8 at four times the width (32-64-128-256): 1,233,540 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet8x4", pretrained, **{"depth": 8, "widths": (32, 64, 128, 256), **kwargs})


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 at four times the width (32-64-128-256): 7,433,860 parameters at 100 classes."""
    return build(CifarResNet, "cifar_resnet32x4", pretrained, **{"depth": 32, "widths": (32, 64, 128, 256), **kwargs})
