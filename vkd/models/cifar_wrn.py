"""The Wide ResNets of the CIFAR literature.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016, without dropout inside the blocks, as the distillation
literature uses them (RepDistiller, mdistiller). Parameter names are theirs, so their checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import StagedNetwork, build, cifar_cfg


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each behind BatchNorm and ReLU, beside a shortcut: [B, C, H, W] to
    [B, out_channels, ceil(H / stride), ceil(W / stride)].

    The shortcut is the identity where the channels stay, else a strided 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        activated = self.act1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(self.act2(self.bn2(self.conv1(activated))))


class CifarWideResNet(StagedNetwork):
    """A Wide ResNet: a 3x3 stem, three stages of (depth - 4) / 6 pre-activation blocks each, BatchNorm and ReLU, global
    pooling, `fc`.

    Maps images [B, in_chans, H, W] of any size to logits [B, num_classes]. The features of its stages are those ahead
    of the next BatchNorm.

    Args:
        depth: 6n + 4.
        width: multiple of the stages' 16, 32 and 64 channels.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.

    Raises:
        ValueError: `depth` is not 6n + 4.
    """

    stem_name = "conv1"
    stage_names = ("block1.layer", "block2.layer", "block3.layer")
    norm_name = ("bn1", "act1")

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 22, ...), not {depth}")
        self.in_chans = in_chans
        channels = 16
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.feature_info = [{"num_chs": channels, "reduction": 1, "module": "conv1"}]
        for index, name in enumerate(self.stage_names):
            out_channels = 16 * width * 2**index
            blocks = [PreActivationBlock(channels, out_channels, stride=1 if index == 0 else 2)]
            blocks += [PreActivationBlock(out_channels, out_channels) for _ in range((depth - 4) // 6 - 1)]
            stage, layer = name.split(".")
            self.add_module(stage, nn.ModuleDict({layer: nn.Sequential(*blocks)}))
            self.feature_info.append({"num_chs": out_channels, "reduction": 2**index, "module": name})
            channels = out_channels
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.num_features = channels
        self._make_head(num_classes, global_pool)
        self._initialize_all()

    def _initialize(self, layer: nn.Module) -> None:
        super()._initialize(layer)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


default_cfgs = generate_default_cfgs(
    {
        "cifar_wrn_16_1": cifar_cfg(),
        "cifar_wrn_16_2": cifar_cfg(),
        "cifar_wrn_40_1": cifar_cfg(),
        "cifar_wrn_40_2": cifar_cfg(),
    }
)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-1: 180,916 parameters at 100 classes."""
    return build(CifarWideResNet, "cifar_wrn_16_1", pretrained, **{"depth": 16, "width": 1, **kwargs})


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-2: 703,284 parameters at 100 classes."""
    return build(CifarWideResNet, "cifar_wrn_16_2", pretrained, **{"depth": 16, "width": 2, **kwargs})


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-1: 569,780 parameters at 100 classes."""
    return build(CifarWideResNet, "cifar_wrn_40_1", pretrained, **{"depth": 40, "width": 1, **kwargs})


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2: 2,255,156 parameters at 100 classes."""
    return build(CifarWideResNet, "cifar_wrn_40_2", pretrained, **{"depth": 40, "width": 2, **kwargs})
