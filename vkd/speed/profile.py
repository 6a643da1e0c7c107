"""What a step's time goes into, and how far its arithmetic is from the fastest that this device does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vkd.speed.bound import BoundLoop
from vkd.speed.memory import without_stderr
from vkd.training.clock import seconds_per_call

KINDS = {
    "convolution forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::_slow_conv2d_forward"),
    "convolution backward": ("aten::convolution_backward",),
    "batch norm": ("batch_norm",),
    "matrix product": ("aten::addmm", "aten::mm", "aten::bmm"),
    "optimizer": ("aten::_fused_", "aten::_foreach", "Optimizer."),
    "elementwise": ("threshold_backward", "clamp_min", "relu", "aten::add", "aten::mul", "aten::sub", "aten::copy_"),
}
"""Parts of the names of operations, by kind; what is none of them is `other`."""

MATRIX = 2048
"""Side of the matrices whose product shows how fast the device's arithmetic can be."""


def measure_profile(loop: BoundLoop, *, repetitions: int, steps: int = 5) -> dict[str, Any]:
    """The profile of the bound's step: the teacher's forward pass, and the student's step beside it.

    Args:
        loop: the bound; its teacher is not compiled, or its operations could not be told apart.
        repetitions: how often each is timed.
        steps: timed together.

    Returns:
        `matrix_flops_per_second`: of a product of two matrices of side `MATRIX`, the best of the repetitions.
        `teacher`, `student`: `flops` of a batch, `seconds` of a step (a list), `flops_per_second` at their median,
        `share`: of the time in each kind of operation.
        `limit_images_per_second`: of `run` and `cached`, if the networks' products were all that a step did and ran at
        the speed of the matrices.
    """
    device = loop.device
    matrix = torch.randn(MATRIX, MATRIX, device=device)
    peak = 2 * MATRIX**3 / min(seconds_per_call(lambda: matrix @ matrix, 1, device) for _ in range(repetitions + 2))
    teacher_output = loop.ask_teacher()
    parts = {"teacher": loop.ask_teacher, "student": lambda: loop.step(teacher_output)}
    found: dict[str, Any] = {"matrix_flops_per_second": peak}
    for name, run in parts.items():
        run()
        with FlopCounterMode(display=False) as counter:
            run()
        flops = counter.get_total_flops()
        seconds = [seconds_per_call(run, steps, device) for _ in range(repetitions)]
        found[name] = {
            "flops": flops,
            "seconds": seconds,
            "flops_per_second": flops / statistics.median(seconds),
            "share": _shares(run, device, steps),
        }
    batch = len(loop.targets)
    both = found["teacher"]["flops"] + found["student"]["flops"]
    found["limit_images_per_second"] = {
        "run": batch * peak / both,
        "cached": batch * peak / found["student"]["flops"],
    }
    return found


def _shares(run: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float]:
    """Of the time in operations, the share of each kind, largest first."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with without_stderr(), profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        times[_kind(event.key)] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(times.values()) or 1.0
    return {kind: spent / total for kind, spent in sorted(times.items(), key=lambda entry: -entry[1])}


def _kind(operation: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), "other")
