"""From uint8 pixels to the float32 input of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd.errors import ConfigError


def channel_values(values: Any, channels: int, key: str) -> list[float]:
    """`values` as one finite float per channel; a single one serves all of them.

    Raises:
        ConfigError: naming `key`, when they are not numbers or their count fits neither 1 nor `channels`.
    """
    single = isinstance(values, (int, float))
    numbers = [values] if single else list(values) if isinstance(values, Sequence) else [values]
    if isinstance(values, str) or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    ):
        raise ConfigError(f"{key}={values!r} is not a list of numbers", expected=f"{channels} numbers, one a channel")
    if len(numbers) not in (1, channels):
        raise ConfigError(
            f"{key} has {len(numbers)} values, but the images have {channels} channel{'s' if channels > 1 else ''}",
            expected=f"{channels} numbers, or one for all channels" if channels > 1 else "one number",
            hint=f"{key}=[{','.join(['0.5'] * channels)}] with this data set's own figures",
        )
    return [float(number) for number in numbers] * (1 if len(numbers) == channels else channels)


class Normalization(nn.Module):
    """(x / 255 - mean) / std as one multiply-add, and a resizing where a network wants another size.

    The two constants stay float32 when a surrounding module is cast (`.half()`, `.to(torch.bfloat16)`), and are in no
    state dict, so a saved network has the standard parameter names alone.

    Args:
        mean, std: per channel for pixels in [0, 1], C values each, or one that serves all channels.
        channels: C.
        memory_format: of the output.
        image_size: (height, width) that images are resized to, by antialiased bilinear interpolation; None leaves them
            as they are.
        key: where mean and std stand in the config, for the error message.

    Raises:
        ConfigError: naming `<key>.mean` or `<key>.std`, when a count is wrong or a std is not positive.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float] | float,
        std: Sequence[float] | float,
        channels: int,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        image_size: tuple[int, int] | None = None,
        key: str = "dataset",
    ) -> None:
        super().__init__()
        self.mean = channel_values(mean, channels, f"{key}.mean")
        self.std = channel_values(std, channels, f"{key}.std")
        if min(self.std) <= 0:
            raise ConfigError(f"{key}.std={self.std} is not positive", expected="standard deviations above 0")
        self.memory_format = memory_format
        self.image_size = image_size
        self._set_constants(torch.device("cpu"))

    def _set_constants(self, device: torch.device) -> None:
        scale = [1 / (255 * std) for std in self.std]
        shift = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        for name, values in (("scale", scale), ("shift", shift)):
            constant = torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalization:
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self._set_constants(self.scale.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, *image_size]. Raises TypeError for pixels that are not uint8."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, 0 to 255, not {images.dtype}")
        pixels = images.to(torch.float32, memory_format=self.memory_format)
        pixels = torch.addcmul(self.shift, pixels, self.scale)
        if self.image_size is not None and pixels.shape[2:] != self.image_size:
            pixels = functional.interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        return pixels.contiguous(memory_format=self.memory_format)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"
