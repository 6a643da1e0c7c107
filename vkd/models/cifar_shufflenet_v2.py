"""The ShuffleNet V2 of the CIFAR literature.

Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018, in the form
in which the distillation literature uses it (RepDistiller, mdistiller): a 1x1 stem without stride or pooling. Parameter
names are theirs, so their checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.cifar_shufflenet_v1 import shuffle_channels
from vkd.models.staged_network import StagedNetwork, build, cifar_cfg


class SplitUnit(nn.Module):
    """A 1x1, a depthwise 3x3 and a 1x1 convolution of the second half of the channels, beside the first half as it is,
    then a shuffle of both: [B, C, H, W] to [B, C, H, W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        kept, own = x.chunk(2, dim=1)
        own = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(own)))))
        own = self.act3(self.bn3(self.conv3(own)))
        return shuffle_channels(torch.cat([kept, own], dim=1), groups=2)


class DownUnit(nn.Module):
    """Two strided branches from all channels, each giving half of the new ones, then a shuffle of both: [B, C, H, W] to
    [B, out_channels, ceil(H / 2), ceil(W / 2)].

    One is a depthwise 3x3 and a 1x1 convolution, the other a 1x1, a depthwise 3x3 and a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.act5 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / 2), ceil(W / 2)]."""
        left = self.act2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.act3(self.bn3(self.conv3(x)))))
        right = self.act5(self.bn5(self.conv5(right)))
        return shuffle_channels(torch.cat([left, right], dim=1), groups=2)


class CifarShuffleNetV2(StagedNetwork):
    """A ShuffleNet V2: a 1x1 stem, three stages, each at half the resolution of the one before, a 1x1 convolution,
    global pooling, `linear`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes].

    Args:
        widths: channels of the three stages.
        depths: units of each at the new resolution, behind the one that halves it.
        head_width: channels of the last convolution.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.
    """

    stage_names = ("layer1", "layer2", "layer3")
    head_name = ("conv2", "bn2", "act2")
    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int] = (116, 232, 464),
        depths: tuple[int, int, int] = (3, 7, 3),
        head_width: int = 1024,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        self.in_chans = in_chans
        channels = 24
        self.conv1 = nn.Conv2d(in_chans, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "act1"}]
        for index, (name, width, depth) in enumerate(zip(self.stage_names, widths, depths, strict=True)):
            units = [DownUnit(channels, width), *(SplitUnit(width) for _ in range(depth))]
            self.add_module(name, nn.Sequential(*units))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (index + 1), "module": name})
            channels = width
        self.conv2 = nn.Conv2d(channels, head_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_width)
        self.act2 = nn.ReLU(inplace=True)
        self.num_features = head_width
        self._make_head(num_classes, global_pool)

    def _initialize(self, layer: nn.Module) -> None:
        """Layers keep torch's own initialisation, as published."""


default_cfgs = generate_default_cfgs({"cifar_shufflenet_v2": cifar_cfg(classifier="linear")})


@register_model
def cifar_shufflenet_v2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    """ShuffleNet V2 at the paper's width 1: 1,355,528 parameters at 100 classes."""
    return build(CifarShuffleNetV2, "cifar_shufflenet_v2", pretrained, **kwargs)
