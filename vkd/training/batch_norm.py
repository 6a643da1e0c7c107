"""BatchNorm over several processes: statistics of the whole batch instead of each process's share.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015 (arXiv 1502.03167).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as convert_for_cuda
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vkd.errors import ConfigError
from vkd.training.distribution import Processes

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


def synchronized(network: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """The network with BatchNorms that normalise, in training mode, over the images of all processes.

    Parameters, buffers and their names stay as they are, and so does what happens in eval mode. The running statistics
    are the same on all processes. On CUDA this is torch's SyncBatchNorm, elsewhere `_Synchronized`. Layers that take
    statistics of a batch in other ways (timm's EvoNorm B) are left alone.

    Raises ConfigError for a kind of BatchNorm whose normalisation is its own.
    """
    found = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for module in found:
        if type(module) not in _KNOWN:
            raise ConfigError(
                f"the statistics of {type(module).__name__} cannot be taken over several processes",
                expected="BatchNorm1d, 2d or 3d of torch, or timm's BatchNormAct2d",
                hint="sync_batch_norm=false, for statistics over each process's share",
            )
    if device.type == "cuda":
        return convert_for_cuda(network)
    return _converted(network, processes)


def _converted(module: nn.Module, processes: Processes) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _converted(child, processes))
    if not isinstance(module, _BatchNorm):
        return module
    # A copy has the same parameters and buffers, and whatever else the layer holds.
    made = copy.copy(module)
    made.__class__ = _SynchronizedAct if isinstance(module, BatchNormAct2d) else _Synchronized
    made.processes = processes
    return made


class _Synchronized(_BatchNorm):
    """A BatchNorm of any number of dimensions with statistics over all processes; exact, and made for a CPU.

    The variance is taken from the differences to the mean, summed in float64.
    """

    processes: Processes

    def _check_input_dim(self, input: Tensor) -> None:
        """The layer that it was made of has been fed in the first forward pass of its network already."""

    @torch.compiler.disable
    def forward(self, images: Tensor) -> Tensor:
        """[B, C, ...] to the same, normalised channel by channel."""
        if not self.training:
            return super().forward(images)
        output, mean, variance, count = _Normalize.apply(images, self.weight, self.bias, self.eps, self.processes)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            # None stands for the mean over all batches.
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return output


class _SynchronizedAct(_Synchronized):
    """The same with timm's dropout and activation behind it."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return self.act(self.drop(super().forward(images)))


class _Normalize(torch.autograd.Function):
    """Images [B, C, ...] of this process to the normalised ones, with mean [C], biased variance [C] and their count.

    The gradient by weight and bias is that of this process's images alone, a summand as that of any parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = images.double()
        count = values.new_tensor([values.numel() // values.shape[1]])
        total = values.sum(_others(values))
        processes.sum_([total, count])
        if count <= 1:
            raise ValueError("BatchNorm in training mode wants more than one value a channel")
        mean = total / count
        centred = values - _along(mean, values)
        squares = centred.square().sum(_others(values))
        processes.sum_([squares])
        variance = squares / count
        scale = (variance + eps).rsqrt()
        normalised = centred * _along(scale, values)
        ctx.save_for_backward(normalised.to(torch.promote_types(images.dtype, torch.float32)), weight, scale, count)
        ctx.processes, ctx.dtype = processes, images.dtype
        output = normalised
        if weight is not None:
            output = output * _along(weight.double(), values)
        if bias is not None:
            output = output + _along(bias.double(), values)
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(images.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normalised, weight, scale, count = ctx.saved_tensors
        gradient, normalised = gradient.double(), normalised.double()
        by_bias = gradient.sum(_others(gradient))
        by_weight = (gradient * normalised).sum(_others(gradient))
        over_all = [by_bias.clone(), by_weight.clone()]
        ctx.processes.sum_(over_all)
        first, second = (_along(entry / count, gradient) for entry in over_all)
        factor = scale if weight is None else scale * weight.double()
        by_images = _along(factor, gradient) * (gradient - first - normalised * second)
        if weight is None:
            return by_images.to(ctx.dtype), None, None, None, None
        return by_images.to(ctx.dtype), by_weight.to(weight.dtype), by_bias.to(weight.dtype), None, None


def _others(images: Tensor) -> list[int]:
    """All dimensions of [B, C, ...] but C."""
    return [0, *range(2, images.ndim)]


def _along(values: Tensor, images: Tensor) -> Tensor:
    """[C] in a shape that goes with [B, C, ...]."""
    return values.view(1, -1, *[1] * (images.ndim - 2))
