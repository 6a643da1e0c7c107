"""The ResNet-50 of the CIFAR literature.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, the network for ImageNet with a 3x3 stem
without stride or pooling, as the distillation literature uses it (RepDistiller, mdistiller). Parameter names are
theirs, so their checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import StagedNetwork, build, cifar_cfg


class BottleneckBlock(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution beside a shortcut: [B, C, H, W] to
    [B, 4 * width, ceil(H / stride), ceil(W / stride)].

    The shortcut is a strided 1x1 convolution with BatchNorm where the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.act3(x + shortcut)


class CifarBottleneckResNet(StagedNetwork):
    """A ResNet of bottleneck blocks: a 3x3 stem, four stages, global pooling, `linear`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes].

    Args:
        depths: blocks of each of the four stages.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.
    """

    stage_names = ("layer1", "layer2", "layer3", "layer4")
    classifier_name = "linear"

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        self.in_chans = in_chans
        channels = 64
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "act1"}]
        for index, (name, depth) in enumerate(zip(self.stage_names, depths, strict=True)):
            width = 64 * 2**index
            blocks = [BottleneckBlock(channels, width, stride=1 if index == 0 else 2)]
            blocks += [BottleneckBlock(4 * width, width) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*blocks))
            channels = 4 * width
            self.feature_info.append({"num_chs": channels, "reduction": 2**index, "module": name})
        self.num_features = channels
        self._make_head(num_classes, global_pool)
        self._initialize_all()


default_cfgs = generate_default_cfgs({"cifar_resnet50": cifar_cfg(classifier="linear")})


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarBottleneckResNet:
    """ResNet-50 for small images: 23,705,252 parameters at 100 classes."""
    return build(CifarBottleneckResNet, "cifar_resnet50", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})
