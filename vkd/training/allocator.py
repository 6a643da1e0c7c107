"""The C library's memory: freed memory kept for the next step rather than given back to the system.

A training step on a CPU frees and takes again some hundred megabytes of activations. Left to itself, glibc returns
them to the system and gets them back page by page, each of which the kernel clears first: a tenth of a step of
ResNet-20 on CIFAR images.
"""

from __future__ import annotations

import ctypes
import platform

# Numbers of mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}


def can_keep_freed_memory() -> bool:
    """Whether this process's C library can be told to."""
    return platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> None:
    """Let this process keep what it frees, from now on. No effect on any number."""
    library = ctypes.CDLL(None)
    for parameter, value in _KEPT.items():
        library.mallopt(parameter, value)
