"""The MobileNetV2 of the CIFAR literature.

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, in the form in
which the distillation literature uses it (RepDistiller, mdistiller): ReLU in place of ReLU6, an expansion layer in
the first block too, no stride in the second group, no dropout. Parameter names are theirs, so their checkpoints load as
they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import StagedNetwork, build, cifar_cfg

SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""The paper's table, strides changed: expansion, channels at full width, blocks and first stride of each group."""


class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expansion` times the channels, a depthwise 3x3 one, and a linear 1x1 one back, all with
    BatchNorm: [B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)].

    The input is added where the shape stays.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        return x + self.conv(x) if self.adds_input else self.conv(x)


class CifarMobileNetV2(StagedNetwork):
    """A MobileNetV2: a strided 3x3 stem, seven groups of inverted residuals, a 1x1 convolution, global pooling,
    `classifier`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes]. The seven groups are four stages, which end
    with the groups of 24, 32, 96 and 320 channels at full width.

    Args:
        width: factor of all channels but those of the last convolution, which has 1280 at least.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.
    """

    stem_name = "conv1"
    stage_names = (("blocks.0", "blocks.1"), "blocks.2", ("blocks.3", "blocks.4"), ("blocks.5", "blocks.6"))
    head_name = "conv2"
    classifier_name = "classifier.0"

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        self.in_chans = in_chans
        channels, reduction = int(32 * width), 2
        self.conv1 = _convolution(in_chans, channels, kernel_size=3, stride=2)
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "conv1"}]
        self.blocks = nn.ModuleList()
        ends = [names if isinstance(names, str) else names[-1] for names in self.stage_names]
        for index, (expansion, full_width, count, stride) in enumerate(SETTINGS):
            out_channels, reduction = int(full_width * width), reduction * stride
            blocks = [InvertedResidual(channels, out_channels, stride, expansion)]
            blocks += [InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(count - 1)]
            self.blocks.append(nn.Sequential(*blocks))
            if f"blocks.{index}" in ends:
                info = {"num_chs": out_channels, "reduction": reduction, "module": f"blocks.{index}"}
                self.feature_info.append(info)
            channels = out_channels
        self.num_features = int(1280 * max(width, 1.0))
        self.conv2 = _convolution(channels, self.num_features, kernel_size=1)
        self.classifier = nn.Sequential()
        self._make_head(num_classes, global_pool)
        self._initialize_all()

    def _initialize(self, layer: nn.Module) -> None:
        super()._initialize(layer)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


default_cfgs = generate_default_cfgs(
    {"cifar_mobilenetv2_half": cifar_cfg(first_conv="conv1.0", classifier="classifier.0")}
)


@register_model
def cifar_mobilenetv2_half(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNetV2 at half the width: 812,836 parameters at 100 classes."""
    return build(CifarMobileNetV2, "cifar_mobilenetv2_half", pretrained, **{"width": 0.5, **kwargs})
