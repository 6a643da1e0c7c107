"""Intermediate features of any timm network, without a table of networks.

A network's stages are found from timm's `forward_intermediates`: for the CIFAR networks everything behind the stem, for
other pyramids the last four maps, for networks that keep one resolution throughout (ViT, mixers) the maps at a quarter,
half, three quarters and the end of their depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vkd.errors import ModelError
from vkd.models.staged_network import StagedNetwork

STAGES = 4
"""The most stages that are taken of a network from timm."""


@dataclass(frozen=True)
class FeatureShapes:
    """The shapes, for one image, of what a network gives beside its logits.

    maps: (channels, height, width) after each stage, first stage first.
    embedding: length of the vector that enters the classifier.
    """

    maps: tuple[tuple[int, int, int], ...]
    embedding: int


class Intermediates:
    """Runs a network so that its stages' maps and the vector ahead of its classifier come out beside its logits.

    The network's weights stay where they are; logits are those that it gives by itself.

    Args:
        network: an image classifier of timm, or one with timm's interface; neither changed nor copied.
        image_shape: (channels, height, width) of its images.
        arch: its name, for the messages.

    Attributes:
        shapes: of the features for one image.

    Raises ModelError when it gives no intermediates, or other logits on the way through them.
    """

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int], *, arch: str) -> None:
        self._network = network
        self._run: Callable[..., tuple[Tensor, list[Tensor]]] | None = getattr(network, "forward_intermediates", None)
        if self._run is None or not hasattr(network, "get_classifier"):
            raise _no_features(arch, "it has no forward_intermediates")
        self._taken: list[int] | None = None
        with _probed(network, image_shape) as images:
            try:
                _, _, embedding, maps = self._forward(images)
                self._taken = _stages(network, maps)
                logits, maps, embedding = self(images)
            except Exception as error:
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise _no_features(arch, reason) from error
            with _captured(_classifier(network)) as inputs:
                expected = network(images)
        # A classifier that starts at zero gives the same logits whatever it is given.
        if not (_close(logits, expected) and inputs and _close(embedding, inputs[0].flatten(1))):
            raise _no_features(arch, "its logits differ when they are computed from its intermediates")
        if any(entry.ndim != 4 for entry in maps):
            raise _no_features(arch, f"its features have shapes {[tuple(entry.shape[1:]) for entry in maps]}")
        self.shapes = FeatureShapes(
            tuple((entry.shape[1], entry.shape[2], entry.shape[3]) for entry in maps), embedding.shape[1]
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Images [B, channels, H, W] to logits [B, C], a map [B, c, h, w] for each stage, and the embedding [B, D]."""
        logits, _, embedding, maps = self._forward(images)
        return logits, maps, embedding

    def compile(self) -> None:
        """Compile the body of the network; the head stays as it is."""
        self._run = torch.compile(self._run)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        last, maps = self._run(images, indices=self._taken)
        with _captured(_classifier(self._network)) as inputs:
            logits = self._network.forward_head(last)
        return logits, last, inputs[0].flatten(1), list(maps)


def _classifier(network: nn.Module) -> nn.Module:
    """The layer that gives the logits; the first where there are several (distillation tokens)."""
    classifier = network.get_classifier()
    return classifier[0] if isinstance(classifier, (tuple, list)) else classifier


def _stages(network: nn.Module, maps: list[Tensor]) -> list[int]:
    """Which of all `maps` of a network are its stages'."""
    count = len(maps)
    if isinstance(network, StagedNetwork):
        return list(range(1, count))
    if count > STAGES and len({entry.shape[2:] for entry in maps}) == 1:
        return [round(count * quarter / STAGES) - 1 for quarter in range(1, STAGES + 1)]
    return list(range(max(0, count - STAGES), count))


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    tolerance = 1e-3 * expected.abs().max().clamp_min(1e-6).item()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=tolerance)


@contextmanager
def _captured(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs that a layer gets within the block."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _probed(network: nn.Module, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Two images to try the network on, in eval mode, without a trace in its state or any generator."""
    modes = [(module, module.training) for module in network.modules()]
    parameter = next(network.parameters())
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, *image_shape, generator=random).to(parameter)
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield images
    finally:
        for module, training in modes:
            module.training = training


def _no_features(arch: str, reason: str) -> ModelError:
    return ModelError(
        f"{arch!r} cannot give its intermediate features: {reason}",
        expected="a network with timm's forward_intermediates and one linear classifier, for a method that compares "
        "features",
        hint="another network, or a method that compares logits alone, such as method=kd",
    )
