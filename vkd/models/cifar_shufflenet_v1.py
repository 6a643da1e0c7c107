"""The ShuffleNet of the CIFAR literature.

Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018, in
the form in which the distillation literature uses it (RepDistiller, mdistiller): a 1x1 stem without stride or pooling,
and ReLU behind the depthwise convolutions too. Parameter names are theirs, so their checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import StagedNetwork, build, cifar_cfg


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """[B, C, H, W] with the channels of its `groups` groups dealt out in turn: channel g * C / groups + i goes to
    i * groups + g.
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """A grouped 1x1 convolution, a shuffle of the channels, a depthwise 3x3 and a grouped 1x1 convolution, all with
    BatchNorm: [B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)].

    The input is added; with a stride it is average-pooled and its channels put behind the others, which are then that
    many fewer.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        own_channels = out_channels - in_channels if stride == 2 else out_channels
        channels = own_channels // 4
        self.conv1 = nn.Conv2d(in_channels, channels, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.first_groups = first_groups
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, own_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own_channels)
        self.act3 = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        own = shuffle_channels(self.act1(self.bn1(self.conv1(x))), self.first_groups)
        own = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(own)))))
        return self.act3(own + x if self.pool is None else torch.cat([own, self.pool(x)], dim=1))


class CifarShuffleNetV1(StagedNetwork):
    """A ShuffleNet: a 1x1 stem, three stages of shuffle units, each at half the resolution of the one before, global
    pooling, `linear`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes].

    Args:
        widths: channels of the three stages.
        depths: units of each.
        groups: groups of the 1x1 convolutions, but for the first one, which has one group.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.
    """

    stage_names = ("layer1", "layer2", "layer3")
    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int] = (240, 480, 960),
        depths: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
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
            # The paper has one group there, since the stem has few channels.
            units = [ShuffleUnit(channels, width, 2, groups, first_groups=1 if index == 0 else groups)]
            units += [ShuffleUnit(width, width, 1, groups, first_groups=groups) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(*units))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (index + 1), "module": name})
            channels = width
        self.num_features = channels
        self._make_head(num_classes, global_pool)

    def _initialize(self, layer: nn.Module) -> None:
        """Layers keep torch's own initialisation, as published."""


default_cfgs = generate_default_cfgs({"cifar_shufflenet_v1": cifar_cfg(classifier="linear")})


@register_model
def cifar_shufflenet_v1(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV1:
    """ShuffleNet with three groups: 949,258 parameters at 100 classes."""
    return build(CifarShuffleNetV1, "cifar_shufflenet_v1", pretrained, **kwargs)
