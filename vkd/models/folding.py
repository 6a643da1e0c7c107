"""A network for inference alone, with every BatchNorm that follows a convolution folded into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Largest difference of the folded network's logits, relative to the largest logit (or to 1, where that is smaller)."""


def fold_batch_norms(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """A copy of `model` in eval mode, in which convolutions do what the BatchNorms behind them did.

    Which BatchNorm follows which convolution is seen by running the network once; nothing else is known about it, so
    any network of timm will do. A BatchNorm behind anything but a convolution stays, and so does one whose folding
    would change the logits by more than `TOLERANCE`, for instance since the convolution's output is used elsewhere too.

    Args:
        model: the network; it is left alone.
        images: normalised images to see it on and to compare with [B, channels, H, W], on its device.

    Returns:
        The copy, and how many BatchNorms were folded: 0 where nothing could be.
    """
    original = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        pairs = _find_pairs(original, images)
        logits = original(images).double()
        folded = _with_folded(original, pairs)
        if not _agree(folded(images), logits):
            pairs = [pair for pair in pairs if _agree(_with_folded(original, [pair])(images), logits)]
            folded = _with_folded(original, pairs)
            if not _agree(folded(images), logits):
                return original, 0
    return folded, len(pairs)


def _agree(logits: Tensor, expected: Tensor) -> bool:
    return bool((logits - expected).abs().amax() <= TOLERANCE * expected.abs().amax().clamp_min(1.0))


def _with_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy in which these BatchNorms are folded into these convolutions."""
    folded = copy.deepcopy(model)
    for convolution, norm in pairs:
        _fold(folded.get_submodule(convolution), folded.get_submodule(norm))
        folded.set_submodule(norm, _rest(folded.get_submodule(norm)))
    return folded


def _find_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) by name, for each pair of which one takes the other's output and both run once."""
    names = {module: name for name, module in model.named_modules()}
    runs = dict.fromkeys(names, 0)
    producer: dict[int, nn.Module] = {}
    kept: list[Tensor] = []  # as long as a tensor lives, no other one has its identity
    pairs = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        if _is_foldable_norm(module) and id(inputs[0]) in producer:
            pairs.append((producer[id(inputs[0])], module))

    def note_output(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        producer[id(output)] = module
        kept.append(output)

    with ExitStack() as hooks:
        for module in names:
            if _is_foldable_norm(module) or type(module) is nn.Conv2d:
                hooks.callback(module.register_forward_pre_hook(count).remove)
            if type(module) is nn.Conv2d:
                hooks.callback(module.register_forward_hook(note_output).remove)
        model(images)
    return [
        (names[convolution], names[norm])
        for convolution, norm in pairs
        if runs[convolution] == runs[norm] == 1 and not _is_shared(convolution, model)
    ]


def _is_foldable_norm(module: nn.Module) -> bool:
    known = type(module) in (nn.BatchNorm2d, BatchNormAct2d)
    return known and module.running_mean is not None and module.running_var is not None


def _is_shared(convolution: nn.Module, model: nn.Module) -> bool:
    """Whether another module has the same weight."""
    return sum(entry is convolution.weight for entry in _every_parameter(model)) > 1


def _every_parameter(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters as often as modules have them."""
    for module in model.modules():
        yield from module.parameters(recurse=False)


def _fold(convolution: nn.Conv2d, norm: nn.Module) -> None:
    """Make the convolution give what the BatchNorm would make of its output. Computed in float64."""
    weight = convolution.weight
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = torch.zeros_like(factor) if convolution.bias is None else convolution.bias.double()
    bias = (bias - norm.running_mean.double()) * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    convolution.weight = nn.Parameter((weight.double() * factor[:, None, None, None]).to(weight), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _rest(norm: nn.Module) -> nn.Module:
    """What a BatchNorm does beside normalising: timm's come with dropout and an activation."""
    return nn.Sequential(norm.drop, norm.act).eval() if isinstance(norm, BatchNormAct2d) else nn.Identity()
