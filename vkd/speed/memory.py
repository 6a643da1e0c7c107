"""How much memory something takes: what it holds between steps, and what a step takes on top of that.

Of tensors, not of the process, in which several parts are measured and none is alone. On CUDA the allocator keeps
count. On a CPU the profiler tells of every allocation, so that those within an operation count too.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from vkd.training.teacher_views import TeacherViews

_MARK = "vkd: weighed"

_NEVER_ENTERED = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.GeneratorType,
    logging.Logger,
    TeacherViews,
)
"""What leads from an object to the whole program; and tables in files, of which the system keeps in memory what it
likes."""


def weigh(
    loop: Any,
    take_steps: Callable[[int], None],
    running: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> dict[str, int | None]:
    """What a loop holds between steps, what a step takes on top at its peak, and both, in bytes; null where unknown."""
    with running():
        take_steps(1)
        step = peak_bytes(lambda: take_steps(1), device)
        held = None if step is None else held_bytes(loop, device)
    return {"held": held, "step": step, "total": None if step is None else held + step}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that tensors on `device` take at once while `work` runs, beyond what they took before.

    None where the device does not say. On a CPU the work is done twice, and weighed the second time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        return _peak_host_bytes(work)
    work()
    return None


def _peak_host_bytes(work: Callable[[], object]) -> int:
    # Twice, since the profiler knows nothing of what was allocated before it came: what the first time leaves, such as
    # gradients, is what the second finds.
    with (
        without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        work()
        with record_function(_MARK):
            work()
    events = recorded.profiler.kineto_results.events()
    (began,) = (event.start_ns() for event in events if event.name() == _MARK)
    live, before, peak = 0, 0, 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        if event.start_ns() < began:
            before = peak = live
        peak = max(peak, live)
    return peak - before


@contextmanager
def without_stderr() -> Iterator[None]:
    """The profiler's library says there when it begins and ends, and of what it knows nothing; nobody can stop it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def held_bytes(loop: Any, device: torch.device) -> int:
    """Bytes of the tensors on `device` that `loop` leads to, and of what its CUDA graphs keep to themselves.

    On a CPU the arrays of NumPy count too, those aside that are files. What two of its objects share counts once.
    """
    storages: dict[int, int] = {}
    pools = set()
    for entry in _reachable(loop):
        if isinstance(entry, Tensor):
            for tensor in (entry, entry.grad if entry.is_leaf else None):
                if tensor is not None and tensor.device.type == device.type:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(entry, np.ndarray) and device.type == "cpu":
            while isinstance(entry.base, np.ndarray):
                entry = entry.base
            if not isinstance(entry, np.memmap):
                storages[entry.ctypes.data] = entry.nbytes
        elif isinstance(entry, torch.cuda.CUDAGraph):
            pools.add(tuple(entry.pool()))
    in_pools = 0
    if pools:
        for segment in torch.cuda.memory_snapshot():
            if tuple(segment["segment_pool_id"]) in pools:
                in_pools += segment["total_size"]
                start, end = segment["address"], segment["address"] + segment["total_size"]
                storages = {pointer: size for pointer, size in storages.items() if not start <= pointer < end}
    return sum(storages.values()) + in_pools


def _reachable(root: Any) -> Iterator[Any]:
    """Every object that `root` leads to by its attributes and contents."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        entry = waiting.pop()
        yield entry
        for other in gc.get_referents(entry):
            if id(other) not in seen and not isinstance(other, _NEVER_ENTERED):
                seen.add(id(other))
                waiting.append(other)
