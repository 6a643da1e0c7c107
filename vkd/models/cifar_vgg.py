"""The VGG networks of the CIFAR literature.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, in the form in which
the distillation literature uses them (RepDistiller, mdistiller): BatchNorm behind every convolution, global pooling and
a single linear layer, and an eight-layer network that the paper does not have. Parameter names are theirs, so their
checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vkd.models.staged_network import Names, StagedNetwork, build, cifar_cfg

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five blocks."""


class CifarVGG(StagedNetwork):
    """A VGG network: five blocks of 3x3 convolutions, each with BatchNorm and ReLU, max-pooling between them, global
    pooling, `classifier`.

    Maps images [B, in_chans, H, W] of 8x8 pixels and more to logits [B, num_classes]. The first block is the stem; the
    features of a block are those ahead of the pooling behind it. As published, the last two blocks have pooling between
    them only for images 64 pixels high.

    Args:
        depths: convolutions of each of the five blocks.
        num_classes: length of the logits; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling ahead of the classifier ("avg", "max", ..., "" for none).
        drop_rate: dropout ahead of the classifier, in training.
    """

    stem_name = "block0"
    stage_names = (("pool0", "block1"), ("pool1", "block2"), ("pool2", "block3"), ("pool3", "block4"))
    layers_per_block = 3
    classifier_name = "classifier"

    def __init__(
        self,
        depths: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(drop_rate=drop_rate)
        self.in_chans = in_chans
        self.feature_info = []
        channels = in_chans
        for index, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            if index > 0:
                self.add_module(f"pool{index - 1}", nn.MaxPool2d(2))
            self.add_module(f"block{index}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** min(index, 3), "module": f"block{index}"})
        self.num_features = channels
        self._make_head(num_classes, global_pool)
        self._initialize_all()

    def _stages_for(self, images: Tensor) -> tuple[Names, ...]:
        if images.shape[2] == 64:
            return self.stage_names
        return (*self.stage_names[:-1], "block4")

    def _initialize(self, layer: nn.Module) -> None:
        super()._initialize(layer)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


_cfg = cifar_cfg(first_conv="block0.0", classifier="classifier")

default_cfgs = generate_default_cfgs(
    {
        "cifar_vgg8": _cfg,
        "cifar_vgg11": _cfg,
        "cifar_vgg13": _cfg,
        "cifar_vgg16": _cfg,
        "cifar_vgg19": _cfg,
    }
)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-8: 3,965,028 parameters at 100 classes."""
    return build(CifarVGG, "cifar_vgg8", pretrained, **{"depths": (1, 1, 1, 1, 1), **kwargs})


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11: 9,277,284 parameters at 100 classes."""
    return build(CifarVGG, "cifar_vgg11", pretrained, **{"depths": (1, 1, 2, 2, 2), **kwargs})


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-13: 9,462,180 parameters at 100 classes."""
    return build(CifarVGG, "cifar_vgg13", pretrained, **{"depths": (2, 2, 2, 2, 2), **kwargs})


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16: 14,774,436 parameters at 100 classes."""
    return build(CifarVGG, "cifar_vgg16", pretrained, **{"depths": (2, 2, 3, 3, 3), **kwargs})


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-19: 20,086,692 parameters at 100 classes."""
    return build(CifarVGG, "cifar_vgg19", pretrained, **{"depths": (2, 2, 4, 4, 4), **kwargs})
