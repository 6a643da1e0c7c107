"""The switches of speed: which are on, chosen by device where the config leaves them open.

None of them changes what is computed but for rounding, so none is part of a fingerprint. The choices come from
`python -m vkd.benchmark` (results/speed/): on a CPU channels-last images, a folded teacher, the fused optimizer and
freed memory that is kept pay; compiling won less than the noise there, a few per cent for the teacher, and is left to
the config. On CUDA nothing has been measured yet: compiled networks and CUDA graphs are off there until they are asked
for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from vkd.config import Config
from vkd.errors import ConfigError
from vkd.training.allocator import can_keep_freed_memory

logger = logging.getLogger("vkd")


@dataclass(frozen=True)
class Switches:
    """What is on.

    channels_last: images and weights lie channels last.
    fold: the teacher's BatchNorms are folded into its convolutions.
    compile_teacher, compile_student: forward passes are compiled.
    fused_optimizer: the optimizer's fused implementation; torch's `foreach` otherwise.
    graphs: steps are captured in CUDA graphs (`vkd.training.graphs`), where method, optimizer and precision allow it.
    keep_freed_memory: the C library keeps freed memory for the next step.
    cache: "views" keeps the teacher's logits, "none" asks it anew.
    precision: fp32, bf16 or fp16.
    """

    channels_last: bool
    fold: bool
    compile_teacher: bool
    compile_student: bool
    fused_optimizer: bool
    graphs: bool
    keep_freed_memory: bool
    cache: str
    precision: str

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def describe(self) -> str:
        """On one line, what is on and what is off."""
        named = {
            "channels last": self.channels_last,
            "teacher folded": self.fold,
            "teacher compiled": self.compile_teacher,
            "student compiled": self.compile_student,
            "fused optimizer": self.fused_optimizer,
            "CUDA graphs": self.graphs,
            "freed memory kept": self.keep_freed_memory,
            "teacher views cached": self.cache == "views",
        }
        on = [name for name, value in named.items() if value]
        off = [name for name, value in named.items() if not value]
        return f"on: {', '.join(on) or 'none'}; off: {', '.join(off) or 'none'}"


def choose_switches(config: Config, device: torch.device, student: nn.Module) -> Switches:
    """The switches of a run: the config's, and where it has null what pays on this device.

    Raises ConfigError where channels last is asked for and torch would compute wrong gradients.
    """
    on_cuda = device.type == "cuda"
    safe = device.type != "cpu" or not _miscomputed_channels_last(student)
    if config.channels_last and not safe:
        raise ConfigError(
            f"channels_last=true: torch computes wrong gradients, and writes beyond its memory, for strided 1x1 "
            f"convolutions of fewer than 8 channels on a CPU, which {config.student.arch} has",
            expected="channels_last=false for this student",
            hint="channels_last=false",
        )
    teacher = None if config.is_plain else config.teacher
    if config.graphs and not on_cuda:
        logger.info("graphs=true: there are no CUDA graphs on %s", device.type)
    return Switches(
        channels_last=_choose(config.channels_last, safe and device.type in ("cpu", "cuda")),
        fold=teacher is not None and teacher.fold,
        compile_teacher=teacher is not None and _choose(teacher.compile, False),
        compile_student=_choose(config.compile, False),
        fused_optimizer=_choose(config.fused_optimizer, device.type in ("cpu", "cuda")),
        graphs=on_cuda and _choose(config.graphs, False),
        keep_freed_memory=_choose(config.keep_freed_memory, device.type == "cpu" and can_keep_freed_memory()),
        cache="none" if teacher is None else teacher.cache,
        precision=config.precision,
    )


def _miscomputed_channels_last(network: nn.Module) -> bool:
    """Whether a network has a convolution whose weights' gradient oneDNN gets wrong for channels-last images.

    Seen with torch 2.14 (oneDNN 3.12) on AVX2: 1x1, stride above 1, fewer than 8 input channels. From 8 channels on,
    and for larger kernels, gradients agree with float64.
    """
    return any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 8
        for module in network.modules()
    )


def _choose(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given
