"""Augmentations of the training images, by name and with options in `dataset.augmentation`, applied in that order.

Those of the further views of an image, where a method asks for several, are in `dataset.view_augmentation` alike.

Resident images are augmented in batches on the device (`BatchAugmentation`), those of a folder one by one in the
workers (`ImageAugmentation`, torchvision's transforms). A new one is a class here; its constructor's keyword parameters
are its options, and the ConfigError that it raises for a wrong one begins with the option's name, before which
`build_augmentations` puts the key. In a config, `flip: {}` or `flip: true` takes the defaults, and `flip: false` or
`flip: null` switches it off.
"""

from __future__ import annotations

import inspect
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from vkd.errors import ConfigError, list_names, nearest
from vkd.registry import Registry


class BatchAugmentation(ABC):
    """Works on a whole batch of equally large images at once, on any device, without a loop over images.

    It does not wait for the device either, unless its docstring says so.

    The random choices of an epoch are drawn at once on the CPU, one row for each training image: an image then looks
    the same whatever the device, the batch size and the step at which a run was resumed.
    """

    channels: ClassVar[tuple[int, ...]] = ()
    """The numbers of channels that an image may have; empty where any will do."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, image_size: tuple[int, int], /) -> Tensor:
        """The random choices for `count` images of (height, width) `image_size`: int64 [count, k], on the CPU."""

    @abstractmethod
    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """Augments uint8 `images` [B, C, H, W] as `choices` [B, k] says; both on one device. uint8 [B, C, H, W]."""

    @abstractmethod
    def views(self, image_size: tuple[int, int], /) -> int | None:
        """How many different images one image can become; None where there are too many to number."""

    def number(self, choices: Tensor, image_size: tuple[int, int], /) -> Tensor:
        """Which of the `views` each of the `choices` [B, k] makes: int64 [B] in 0 .. views - 1, where they are drawn.

        Choices that make different images have different numbers, those that make the same image have the same one.
        Logits that are kept on disk are found again by it, so it must not change. One whose `views` is None has none.
        """
        raise TypeError(f"the views of {type(self).__name__} have no numbers")


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
            raise ConfigError(f"padding={padding} is negative", expected="pixels, 0 or more")
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

    def number(self, choices: Tensor, _image_size: tuple[int, int], /) -> Tensor:
        """Row by row: top * (2 * padding + 1) + left."""
        return choices[:, 0] * (2 * self.padding + 1) + choices[:, 1]

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
            raise ConfigError(f"p={p} is not a probability", expected="0 to 1")
        self.p = p

    def draw(self, count: int, generator: torch.Generator, _image_size: tuple[int, int], /) -> Tensor:
        """1 for an image to mirror, else 0: int64 [count, 1]."""
        return (torch.rand((count, 1), generator=generator) < self.p).long()

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """uint8 [B, C, H, W] and choices [B, 1] to uint8 [B, C, H, W]."""
        return torch.where(choices.bool()[:, :, None, None], images.flip(3), images)

    def views(self, _image_size: tuple[int, int], /) -> int:
        return 2 if 0 < self.p < 1 else 1

    def number(self, choices: Tensor, image_size: tuple[int, int], /) -> Tensor:
        """1 for a mirrored image, else 0; 0 where all are mirrored or none is."""
        return choices[:, 0] * (self.views(image_size) - 1)

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
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"scale={list(scale)}", expected="[smallest, largest], shares of the area in (0, 1]")
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"ratio={list(ratio)}", expected="[smallest, largest], both above 0")
        self.scale, self.ratio = scale, ratio

    def transform(self, image_size: int, interpolation: InterpolationMode, /) -> nn.Module:
        return v2.RandomResizedCrop(image_size, scale=self.scale, ratio=self.ratio, interpolation=interpolation)


LEVELS = 10
"""The magnitudes that AutoAugment's search could choose from, evenly spaced from none to the strongest."""


def _strength(strongest: float, level: int, weakest: float = 0.0) -> float:
    """The magnitude of a level in 0 .. LEVELS - 1, rounded as torchvision rounds it: some pixels hang on it."""
    return float(torch.linspace(weakest, strongest, LEVELS)[level])


def _moved(images: Tensor, *, x: int = 0, y: int = 0) -> Tensor:
    return functional.affine(images, angle=0.0, translate=[x, y], scale=1.0, shear=[0.0, 0.0])


def _sheared(images: Tensor, *, x: float = 0.0, y: float = 0.0) -> Tensor:
    """Sheared about the upper left corner; x and y are slopes."""
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    return functional.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


_DIRECTED: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ShearX": lambda images, level, sign: _sheared(images, x=sign * _strength(0.3, level)),
    "ShearY": lambda images, level, sign: _sheared(images, y=sign * _strength(0.3, level)),
    "TranslateX": lambda images, level, sign: _moved(
        images, x=sign * int(_strength(150 / 331 * images.shape[3], level))
    ),
    "TranslateY": lambda images, level, sign: _moved(
        images, y=sign * int(_strength(150 / 331 * images.shape[2], level))
    ),
    "Rotate": lambda images, level, sign: functional.rotate(images, sign * _strength(30.0, level)),
    "Brightness": lambda images, level, sign: functional.adjust_brightness(images, 1 + sign * _strength(0.9, level)),
    "Color": lambda images, level, sign: functional.adjust_saturation(images, 1 + sign * _strength(0.9, level)),
    "Contrast": lambda images, level, sign: functional.adjust_contrast(images, 1 + sign * _strength(0.9, level)),
    "Sharpness": lambda images, level, sign: functional.adjust_sharpness(images, 1 + sign * _strength(0.9, level)),
}
"""AutoAugment's operations that can go either way (sign 1 or -1), on uint8 images [B, C, H, W]."""

_UNDIRECTED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Posterize": lambda images, level: functional.posterize(images, round(_strength(4.0, level, weakest=8.0))),
    "Solarize": lambda images, level: functional.solarize(images, 255 * _strength(0.0, level, weakest=1.0)),
    "AutoContrast": lambda images, _level: functional.autocontrast(images),
    "Equalize": lambda images, _level: functional.equalize(images),
    "Invert": lambda images, _level: functional.invert(images),
}
"""The others; those that ignore the level have none (None) in the policies."""


@AUGMENTATIONS.register("auto_augment")
class AutoAugment(BatchAugmentation, ImageAugmentation):
    """One of 25 pairs of operations, which a search found for a data set, as torchvision's AutoAugment.

    Cubuk, Zoph, Mane, Vasudevan and Le, "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019. An image
    gets a pair at random; each of the two operations happens with a probability of its own and at a strength of its
    own, in either direction where it has two. Places that come in from outside the image are black; pixels that move
    are taken from the nearest place, whatever `dataset.interpolation` says.

    In batches, the images of one operation, strength and direction are gathered and changed at once: some 60 small
    steps, however large the batch. On one core, with 300 photos of 32x32 or more at once, an image takes about as long
    as two or three crops and flips; with 64 it takes several times that. It waits for the device, to learn how many
    images each step has and whenever an operation brings its numbers there, and rounds pixels as the device does. An
    image has 1 or 3 channels; with one, the operation Color leaves it as it is.

    Args:
        policy: the data set of the search: cifar10, imagenet or svhn.
    """

    channels = (1, 3)

    def __init__(self, *, policy: str = "imagenet") -> None:
        policies = [choice.value for choice in transforms.AutoAugmentPolicy]
        if policy not in policies:
            raise ConfigError(
                f"policy={policy!r} is unknown",
                expected=list_names(policies),
                hint=" or ".join(nearest(policy, policies)),
            )
        self.policy = transforms.AutoAugmentPolicy(policy)
        # The older class says in public what its policies are.
        pairs = transforms.AutoAugment(self.policy).policies
        self._probabilities = torch.tensor([[probability for _, probability, _ in pair] for pair in pairs])  # [25, 2]
        numbers: dict[tuple[str, int | None, int], int] = {}
        self._numbers = torch.tensor(
            [
                [
                    [
                        numbers.setdefault((name, level, sign * (name in _DIRECTED)), len(numbers) + 1)
                        for sign in (1, -1)
                    ]
                    for name, _, level in pair
                ]
                for pair in pairs
            ]
        )  # [25, 2, direction]
        self._operations = list(numbers)

    def draw(self, count: int, generator: torch.Generator, _image_size: tuple[int, int], /) -> Tensor:
        """The first and the second operation by its number, 0 for none: int64 [count, 2]."""
        pair = torch.randint(len(self._numbers), (count,), generator=generator)
        happens = torch.rand((count, 2), generator=generator) < self._probabilities[pair]
        direction = torch.randint(2, (count, 2), generator=generator)
        return self._numbers[pair].gather(2, direction[:, :, None]).squeeze(2) * happens

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """uint8 [B, C, H, W] and choices [B, 2] to uint8 [B, C, H, W]; waits for the device."""
        order = choices.argsort(0)
        every_number = torch.arange(len(self._operations) + 1, device=choices.device)
        sizes = (choices[:, None, :] == every_number[:, None]).sum(0).T.tolist()
        images = images.clone()
        for column, counts in enumerate(sizes):
            _unchanged, *groups = order[:, column].split(counts)
            for operation, group in zip(self._operations, groups, strict=True):
                if len(group):
                    images.index_copy_(0, group, _operate(images.index_select(0, group), *operation))
        return images

    def views(self, _image_size: tuple[int, int], /) -> None:
        return None

    def transform(self, _image_size: int, _interpolation: InterpolationMode, /) -> nn.Module:
        return v2.AutoAugment(self.policy, interpolation=InterpolationMode.NEAREST)


def _operate(images: Tensor, name: str, level: int | None, sign: int) -> Tensor:
    """One of AutoAugment's operations on images [B, C, H, W]; `sign` is 0 where it has no direction."""
    return _DIRECTED[name](images, level, sign) if sign else _UNDIRECTED[name](images, level)


_NEEDED = {"resident": BatchAugmentation, "streaming": ImageAugmentation}
_WHY = {
    "resident": "images that lie on the device, all of one size",
    "streaming": "images that are read from files",
}


def build_augmentations(
    config: Mapping[str, Any], loading: str, *, channels: int | None = None, key: str = "dataset.augmentation"
) -> list[Any]:
    """The augmentations that `dataset.augmentation` names, in its order.

    Args:
        config: name of each augmentation with its options; see the head of this file.
        loading: "resident" gives `BatchAugmentation`s, "streaming" gives `ImageAugmentation`s.
        channels: of an image; None where they are not known.
        key: where `config` stands, for the message.

    Raises:
        ConfigError: for an unknown name or option, a value of the wrong type, or one that cannot serve these images.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{key}={config!r}", expected="names with options", hint="{flip: {}}")
    built = []
    for name, options in config.items():
        here = f"{key}.{name}"
        try:
            kind = AUGMENTATIONS[name]
        except ConfigError as error:
            raise ConfigError(f"{here}: {error.problem}", expected=error.expected, hint=error.hint) from None
        if options is None or options is False:
            continue
        if not issubclass(kind, _NEEDED[loading]):
            raise ConfigError(
                f"{here}: augmentation {name!r} cannot be used on {_WHY[loading]}",
                expected=list_names(
                    other for other in AUGMENTATIONS if issubclass(AUGMENTATIONS[other], _NEEDED[loading])
                ),
                hint=f"{here}=null to switch it off",
            )
        if loading == "resident" and kind.channels and channels not in (None, *kind.channels):
            raise ConfigError(
                f"{here}: augmentation {name!r} cannot be used on images of {channels} channels",
                expected=" or ".join(map(str, kind.channels)),
                hint=f"{here}=null to switch it off",
            )
        arguments = _checked_options(here, kind, {} if options is True else options)
        try:
            built.append(kind(**arguments))
        except ConfigError as error:
            raise ConfigError(f"{here}.{error.problem}", expected=error.expected, hint=error.hint) from None
    return built


def _checked_options(key: str, kind: type, options: Any) -> dict[str, Any]:
    """`options`, which stand at `key`, as keyword arguments of `kind`'s constructor, each of the type it declares."""
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
                f"{key} has no option {option!r}",
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
