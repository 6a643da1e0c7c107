"""A network by its timm name, checked before anything is trained with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model, list_models, split_model_name_tag
from torch import Tensor, nn

from vkd.errors import ModelError, list_names, nearest
from vkd.models.staged_network import no_published_weights

logger = logging.getLogger("vkd")


def create_model(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: tuple[int, int] | None = None,
    pretrained: bool = False,
    allow_new_head: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """The network `arch` on the CPU in training mode: images [B, in_channels, H, W] to logits [B, num_classes].

    It is run once on two black images, so a network that does not take the images fails here and not in training. The
    run leaves random numbers and BatchNorm statistics as they were.

    Args:
        arch: a name of `timm.list_models()`, with a pretrained tag or without.
        num_classes: length of the logits.
        in_channels: channels of the images.
        image_size: height and width; None for the size that the network was made for. Networks with a fixed input size
            (ViT, Swin) are built for it.
        pretrained: load the published weights, from timm's cache or the hub.
        allow_new_head: with `pretrained`, replace a classifier of other classes by a random one rather than refuse.
        seed: draw the weights under this seed and leave the global generator as it was; None to draw from the latter.

    Raises:
        ModelError: there is no such network, pretrained tag or published weights; the weights cannot be downloaded or
            have other classes; the network cannot be built for these images or classes.
    """
    _check_sizes(num_classes, in_channels, image_size)
    check_arch(arch)
    cfg = get_pretrained_cfg(arch)
    if pretrained:
        _check_pretrained(arch, cfg, num_classes, in_channels, allow_new_head)
    asked = f"{arch!r} for {_describe(in_channels, image_size)} and {num_classes} classes"
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        arguments["img_size"] = tuple(image_size)
    with _seeded(seed), torch.device("cpu"):
        try:
            model = timm.create_model(arch, pretrained=pretrained, **arguments)
        except ModelError:
            raise
        except Exception as error:
            if not pretrained:
                raise ModelError(
                    f"timm cannot build {asked}: {_first_line(error)}",
                    hint="another image size or network; networks called cifar_resnet* take images of any size",
                ) from error
            fault = "cannot be loaded"
            if _is_download_failure(error):
                fault = "are not in the local cache, and the hub could not be reached"
            raise ModelError(
                f"the pretrained weights of {arch!r} {fault}: {_first_line(error)}",
                expected="a network connection, or a checkpoint in a file",
                hint="teacher.pretrained=false teacher.checkpoint=path/to/weights.safetensors",
            ) from error
    if pretrained:
        model.pretrained_normalization = _normalization(cfg, in_channels)
    size = image_size or tuple(cfg.input_size[-2:] if cfg is not None else (224, 224))
    _check_output(model, asked, num_classes, (in_channels, *size))
    return model


def count_parameters(model: nn.Module) -> int:
    """How many numbers of `model` are trained: the parameters that require a gradient."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: nn.Module, image: Tensor) -> int | None:
    """Multiply-accumulates of the convolutions and matrix products of one forward pass; None where they escape us.

    Args:
        model: as it should run: in eval mode, if that is what is meant.
        image: one normalised image [1, channels, height, width], where the network is.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    try:
        # Fused attention is a kernel for each device, and not all of them are known to the counter.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(image)
    except Exception as error:  # a figure for the record is worth no run
        logger.warning("the multiply-accumulates of %s cannot be counted: %s", type(model).__name__, error)
        return None
    return counter.get_total_flops() // 2


def input_normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation, one per input channel, that pretrained weights expect their images in [0, 1] to have
    been normalised with. None for a network that `create_model` made without pretrained weights.

    Where the network takes another number of channels than it was trained on, every channel gets the average.
    """
    return getattr(model, "pretrained_normalization", None)


def pretrained_image_size(arch: str) -> tuple[int, int] | None:
    """(height, width) of the images that pretrained weights of `arch` were trained on; None where there are none."""
    cfg = get_pretrained_cfg(arch)
    return None if cfg is None or not cfg.has_weights else tuple(cfg.input_size[-2:])


def _check_sizes(num_classes: int, in_channels: int, image_size: tuple[int, int] | None) -> None:
    if num_classes < 1 or in_channels < 1:
        raise ModelError(
            f"a network cannot have {num_classes} classes and {in_channels} input channels",
            expected="1 or more of each",
        )
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ModelError(f"{image_size} is no image size", expected="height and width, 1 or more each")


def check_arch(arch: str) -> None:
    """Raise ModelError, with the nearest names, unless `arch` is a network that timm knows."""
    if any(mark in arch for mark in "/\\:"):
        raise ModelError(
            f"{arch!r} names a hub or a path",
            expected="the name of a network that timm knows, such as resnet18 or cifar_resnet20",
            hint="teacher.arch=<timm name> teacher.checkpoint=path/to/weights.safetensors",
        )
    name, tag = split_model_name_tag(arch)
    if name not in list_models():
        prefixed = [f"cifar_{name}"] if is_model(f"cifar_{name}") else []
        near = list(dict.fromkeys(prefixed + nearest(name, list_models())))[:3]
        raise ModelError(
            f"there is no network {name!r}",
            expected='a name of timm.list_models(), or of timm.list_models("cifar_*") for the CIFAR networks',
            hint=" or ".join(near) or "cifar_resnet20",
        )
    known = {split_model_name_tag(full)[1] for full in get_arch_pretrained_cfgs(name)} - {""}
    if tag and tag not in known:
        raise ModelError(
            f"network {name!r} has no pretrained tag {tag!r}",
            expected=f"one of {list_names(known, most=20)}" if known else "no tag: it has none",
            hint=" or ".join([f"{name}.{near}" for near in nearest(tag, known)] or [name]),
        )


def _check_pretrained(arch: str, cfg: Any, num_classes: int, in_channels: int, allow_new_head: bool) -> None:
    name, _ = split_model_name_tag(arch)
    if cfg is None or not cfg.has_weights:
        raise no_published_weights(arch)
    if cfg.num_classes != num_classes and not allow_new_head:
        has = f"{cfg.num_classes} classes" if cfg.num_classes else "no classifier"
        raise ModelError(
            f"the pretrained weights of {arch!r} have {has}, {num_classes} classes were asked for",
            expected=f"weights for {num_classes} classes: never a silently random head",
            hint=f"teacher.pretrained=false teacher.checkpoint=<weights of {name} trained on these classes>",
        )
    if in_channels != cfg.input_size[0] and (cfg.input_size[0] != 3 or cfg.first_conv is None):
        raise ModelError(
            f"the pretrained weights of {arch!r} take {cfg.input_size[0]} channels, the images have {in_channels}",
            expected="images with as many channels: the first layer would be random",
            hint="a network without pretrained weights, or another pretrained one",
        )


def _check_output(model: nn.Module, asked: str, num_classes: int, input_size: tuple[int, int, int]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters())
    images = torch.zeros(2, *input_size, dtype=parameter.dtype, device=parameter.device)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(images)
    except Exception as error:
        raise ModelError(
            f"network {asked} does not take images of {input_size[1]}x{input_size[2]} pixels: {_first_line(error)}",
            hint="another image size or network; networks called cifar_resnet* take images of any size",
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"network {asked} gives {found} for two images",
            expected=f"logits of shape [2, {num_classes}]: a classifier of images",
            hint="cifar_resnet20, resnet18 or another classifier of timm.list_models()",
        )


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draws on the CPU come from `seed`, and the CPU's generator is put back; other devices' are never touched."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _is_download_failure(error: BaseException | None) -> bool:
    """Whether an input or network error is what `error` is, or what led to it."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "huggingface_hub":
            return True
        error = error.__cause__ or error.__context__
    return False


def _normalization(cfg: Any, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (tuple(float(number) for number in numbers) for numbers in (cfg.mean, cfg.std))
    if len(mean) != in_channels:
        mean, std = ((sum(numbers) / len(numbers),) * in_channels for numbers in (mean, std))
    return mean, std


def _describe(in_channels: int, image_size: tuple[int, int] | None) -> str:
    size = f"{image_size[0]}x{image_size[1]} images" if image_size else "images"
    return f"{size} of {in_channels} channel{'s' if in_channels > 1 else ''}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
