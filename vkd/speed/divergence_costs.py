"""What each divergence costs, forward and backward, beside torch's `kl_div`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vkd.divergences import make_divergence
from vkd.errors import ConfigError
from vkd.speed.memory import peak_bytes
from vkd.training.clock import seconds_per_call, synchronize
from vkd.training.memory import available_bytes

REFERENCE = "kl_div"
TEMPERATURE = 4.0

PLAUSIBLE_COPIES = 14
"""How many tensors as large as the logits are reckoned with at most: both logits, the gradient and temporaries."""

MOST_ON_A_CPU = 2**25
"""Logits at once on a CPU, which would need minutes for each figure otherwise."""

SHORTEST_SECONDS = 0.05
"""What a timing takes at least, by as many calls as that needs: single calls are shorter than a clock can tell."""


@dataclass
class Cost:
    """What one divergence costs at one shape.

    name, parameters: the divergence; `kl_div` is torch's.
    shape: of the logits, student's and teacher's alike, float32.
    forward_seconds: of the value alone, one figure a repetition.
    seconds: of value and gradient.
    peak_bytes: the most that both take beyond the logits, the gradient included; None where the device does not say.
    """

    name: str
    parameters: dict[str, Any]
    shape: list[int]
    forward_seconds: list[float]
    seconds: list[float]
    peak_bytes: int | None


def parse_shape(text: str) -> list[int]:
    """`8x512x50257` as [8, 512, 50257]. Raises ConfigError unless it is two or more positive numbers."""
    parts = text.split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"shapes holds {text!r}", expected="the logits' shape, classes last", hint="'shapes=[64x100,8x512x50257]'"
        )
    return [int(part) for part in parts]


def fitting(shape: Sequence[int], device: torch.device) -> list[int]:
    """The shape, with as much less in its first dimension as memory, or a CPU, asks for; at least 1."""
    row = math.prod(shape[1:])
    most = available_bytes(device) / (torch.float32.itemsize * PLAUSIBLE_COPIES)
    if device.type == "cpu":
        most = min(most, MOST_ON_A_CPU)
    return [int(max(1, min(shape[0], most // row))), *shape[1:]]


def kl_div(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q) at `TEMPERATURE` by torch's own functions, of logits [..., C], averaged over all positions."""
    student = functional.log_softmax(student_logits.flatten(0, -2) / TEMPERATURE, dim=-1)
    teacher = functional.softmax(teacher_logits.flatten(0, -2) / TEMPERATURE, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean")


def measure(
    divergences: Mapping[str, Mapping[str, Any]],
    shapes: Sequence[Sequence[int]],
    *,
    device: torch.device,
    repetitions: int,
    seed: int = 0,
) -> Iterator[Cost]:
    """Every divergence at every shape, and `kl_div` first, in turn and each repetition in another order.

    Args:
        divergences: name -> its parameters, less the temperature, which is `TEMPERATURE`.
        shapes: of logits [..., C].
        device: where they lie.
        repetitions: figures a cost.
        seed: of the logits, which are normal with a deviation of 3, so that softmax is neither flat nor certain.
    """  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    for shape in shapes:
        student, teacher = (3.0 * torch.randn(shape, generator=random) for _ in range(2))
        student, teacher = student.to(device).requires_grad_(), teacher.to(device)
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {REFERENCE: kl_div}
        for name, parameters in divergences.items():
            functions[name] = make_divergence(name, temperature=TEMPERATURE, **parameters)
        yield from _measure_at(functions, divergences, student, teacher, device, repetitions)


def _measure_at(
    functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    parameters: Mapping[str, Mapping[str, Any]],
    student: Tensor,
    teacher: Tensor,
    device: torch.device,
    repetitions: int,
) -> Iterator[Cost]:
    def both_of(name: str) -> Callable[[], object]:
        def both() -> None:
            student.grad = None
            functions[name](student, teacher).backward()

        return both

    def seconds_of(name: str, calls: int) -> tuple[float, float]:
        """Of the value alone, and of value and gradient: means over so many calls."""
        if calls > 1:
            forward = seconds_per_call(lambda: functions[name](student, teacher), calls, device)
            return forward, seconds_per_call(both_of(name), calls, device)
        # A call that is long enough to be waited for in its middle.
        student.grad = None
        started = time.perf_counter()
        value = functions[name](student, teacher)
        synchronize(device)
        forward = time.perf_counter() - started
        value.backward()
        synchronize(device)
        return forward, time.perf_counter() - started

    costs, calls = {}, {}
    for name in functions:
        peak = peak_bytes(both_of(name), device)
        costs[name] = Cost(name, dict(parameters.get(name, {})), list(student.shape), [], [], peak)
        calls[name] = max(1, math.ceil(SHORTEST_SECONDS / max(1e-9, seconds_of(name, 1)[1])))
    names = list(functions)
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in [*names[first:], *names[:first]]:
            forward, both = seconds_of(name, calls[name])
            costs[name].forward_seconds.append(forward)
            costs[name].seconds.append(both)
    student.grad = None
    yield from costs.values()
