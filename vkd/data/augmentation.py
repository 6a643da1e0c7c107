"""Augmentations of the training images, by name and with options in `dataset.augmentation`, applied in that order.

Resident images are augmented in batches on the device (`BatchAugmentation`), those of a folder one by one in the
workers (`ImageAugmentation`, torchvision's transforms). A new one is a class here; its constructor's keyword parameters
are its options. In a config, `flip: {}` or `flip: true` takes the defaults, and `flip: false` or `flip: null` switches
it off.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from vkd.errors import ConfigError, list_names, nearest
from vkd.registry import Registry


class BatchAugmentation(ABC):
    """Works on a whole batch of equally large images at once, on any device, without a loop over images or a sync.

    The random choices of an epoch are drawn at once on the CPU, one row for each training image: an image then looks
    the same whatever the device, the batch size and the step at which a run was resumed.
    """

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, image_size: tuple[int, int], /) -> Tensor:
        """The random choices for `count` images of (height, width) `image_size`: int64 [count, k], on the CPU."""

    @abstractmethod
    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """Augments uint8 `images` [B, C, H, W] as `choices` [B, k] says; both on one device. uint8 [B, C, H, W]."""

    @abstractmethod
    def views(self, image_size: tuple[int, int], /) -> int | None:
        """How many different images one image can become; None where there are too many to number."""


class ImageAugmentation(ABC):
    """Works on one decoded image at a time, in a worker."""

    resizes: ClassVar[bool] = False
    """Whether it takes an image of any size to the wanted one, so that no resizing is to come before it."""

    @abstractmethod
    def transform(self, image_size: int, interpolation: InterpolationMode, /) -> nn.Module:
        """The transform of a PIL image, random through torch's CPU generator. `image_size` is the side in pixels."""


AUGMENTATIONS: Registry[type[BatchAugmentation | ImageAugmentation]] = Registry("augmentation")


@AUGMENTATIONS.register("crop")
class Crop(BatchAugmentation, ImageAugmentation):
    """Zero-pads every side and cuts the original size at a uniformly random place, as torchvision's RandomCrop.

    Args:
        padding: pixels added on each side.
    """

    def __init__(self, *, padding: int = 4) -> None:
        if padding < 0:
            raise ConfigError(f"dataset.augmentation.crop.padding={padding} is negative", expected="pixels, 0 or more")
        self.padding = padding

    def draw(self, count: int, generator: torch.Generator, _image_size: tuple[int, int], /) -> Tensor:
        """Top and left of the cut in the padded image, each in 0 .. 2 * padding: int64 [count, 2]."""
        return torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """uint8 [B, C, H, W] and choices [B, 2] (top, left) to uint8 [B, C, H, W], by one gather."""
        batch, channels, height, width = images.shape
        padded = nn.functional.pad(images, (self.padding,) * 4)
        row_length = width + 2 * self.padding
        rows = torch.arange(height, device=images.device).mul_(row_length)
        pixels = (rows[:, None] + torch.arange(width, device=images.device)).flatten()  # [H * W]
        corner = choices[:, 0] * row_length + choices[:, 1]  # [B]
        index = (corner[:, None] + pixels)[:, None, :].expand(batch, channels, height * width)
        return padded.flatten(2).gather(2, index).view(images.shape)

    def views(self, _image_size: tuple[int, int], /) -> int:
        return (2 * self.padding + 1) ** 2

    def transform(self, image_size: int, _interpolation: InterpolationMode, /) -> nn.Module:
        return v2.RandomCrop(image_size, padding=self.padding)


@AUGMENTATIONS.register("flip")
class Flip(BatchAugmentation, ImageAugmentation):
    """Mirrors left and right.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ConfigError(f"dataset.augmentation.flip.p={p} is not a probability", expected="0 to 1")
        self.p = p

    def draw(self, count: int, generator: torch.Generator, _image_size: tuple[int, int], /) -> Tensor:
        """1 for an image to mirror, else 0: int64 [count, 1]."""
        return (torch.rand((count, 1), generator=generator) < self.p).long()

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """uint8 [B, C, H, W] and choices [B, 1] to uint8 [B, C, H, W]."""
        return torch.where(choices.bool()[:, :, None, None], images.flip(3), images)

    def views(self, _image_size: tuple[int, int], /) -> int:
        return 2 if 0 < self.p < 1 else 1

    def transform(self, _image_size: int, _interpolation: InterpolationMode, /) -> nn.Module:
        return v2.RandomHorizontalFlip(self.p)


@AUGMENTATIONS.register("random_resized_crop")
class RandomResizedCrop(ImageAugmentation):
    """Cuts a random part of the image and resizes it, as torchvision's; for image folders.

    Args:
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
    """

    resizes = True

    def __init__(
        self, *, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        key = "dataset.augmentation.random_resized_crop"
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(
                f"{key}.scale={list(scale)}", expected="[smallest, largest], shares of the area in (0, 1]"
            )
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"{key}.ratio={list(ratio)}", expected="[smallest, largest], both above 0")
        self.scale, self.ratio = scale, ratio

    def transform(self, image_size: int, interpolation: InterpolationMode, /) -> nn.Module:
        return v2.RandomResizedCrop(image_size, scale=self.scale, ratio=self.ratio, interpolation=interpolation)


_NEEDED = {"resident": BatchAugmentation, "streaming": ImageAugmentation}
_WHY = {
    "resident": "images that lie on the device, all of one size",
    "streaming": "images that are read from files",
}


def build_augmentations(config: Mapping[str, Any], loading: str) -> list[Any]:
    """The augmentations that `dataset.augmentation` names, in its order.

    Args:
        config: name of each augmentation with its options; see the head of this file.
        loading: "resident" gives `BatchAugmentation`s, "streaming" gives `ImageAugmentation`s.

    Raises:
        ConfigError: for an unknown name or option, a value of the wrong type, or one that cannot serve this loading.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"dataset.augmentation={config!r}", expected="names with options", hint="{flip: {}}")
    built = []
    for name, options in config.items():
        kind = AUGMENTATIONS[name]
        if options is None or options is False:
            continue
        if not issubclass(kind, _NEEDED[loading]):
            raise ConfigError(
                f"augmentation {name!r} cannot be used on {_WHY[loading]}",
                expected=list_names(
                    other for other in AUGMENTATIONS if issubclass(AUGMENTATIONS[other], _NEEDED[loading])
                ),
                hint=f"dataset.augmentation.{name}=null to switch it off",
            )
        built.append(kind(**_checked_options(name, kind, {} if options is True else options)))
    return built


def _checked_options(name: str, kind: type, options: Any) -> dict[str, Any]:
    """`options` as keyword arguments of `kind`'s constructor, each of the type that it declares."""
    key = f"dataset.augmentation.{name}"
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{key}={options!r}", expected="a mapping of options, or true, false or null", hint=f"{key}={{}}"
        )
    hints = typing.get_type_hints(kind.__init__)
    known = [parameter for parameter in inspect.signature(kind).parameters if parameter in hints]
    arguments = {}
    for option, value in options.items():
        if option not in known:
            near = nearest(str(option), known) or known
            raise ConfigError(
                f"augmentation {name!r} has no option {option!r}",
                expected=list_names(known),
                hint=" or ".join(f"{key}.{choice}" for choice in near),
            )
        try:
            arguments[option] = _as_type(value, hints[option])
        except TypeError:
            hint = hints[option]
            words = (
                hint.__name__ if typing.get_origin(hint) is None else f"{len(typing.get_args(hint))} numbers in a list"
            )
            raise ConfigError(f"{key}.{option}={value!r}", expected=words) from None
    return arguments


def _as_type(value: Any, hint: Any) -> Any:
    """`value` as `hint` (int, float, bool or a tuple of such); TypeError where it is something else."""
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(parts):
            raise TypeError
        return tuple(_as_type(item, part) for item, part in zip(value, parts, strict=True))
    if isinstance(value, bool) != (hint is bool):
        raise TypeError
    if hint is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, hint):
        raise TypeError
    return value
