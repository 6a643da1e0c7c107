"""A folder for what the benchmark writes while it measures, of which nothing is left behind."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, removed at the end; on SIGTERM too, which raises KeyboardInterrupt as long as this lasts.

    A table of the teacher's views may take gigabytes there. Signals reach the main thread alone, so elsewhere SIGTERM
    does what it did.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        with tempfile.TemporaryDirectory(prefix="vkd-benchmark-") as folder:
            yield Path(folder)
    finally:
        if in_main_thread:
            # None stands for a handler that Python did not install and cannot name.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
