"""`deterministic=true`: the same bits each time, as far as torch has algorithms for it, and what has none is named."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from vkd.config import Config
from vkd.training.environment import choose_device

logger = logging.getLogger("vkd")

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = (":4096:8", ":16:8")
"""What cuBLAS repeats itself with; torch looks when it first multiplies matrices on CUDA."""

_COMPLAINT = re.compile(
    r"(?:(?P<operation>\S[^\n]*?) (?:does not have a deterministic implementation|defaults to a non-deterministic)"
    r"|[^\n]*this operation is not deterministic because it uses CuBLAS)"
)
"""How torch's warnings about operations without a deterministic form begin."""


@dataclass
class Determinism:
    """What was asked for, and where it was not possible.

    asked: whether the config asks for deterministic algorithms.
    exceptions: the operations without one that were met, in torch's words, each once.
    """

    asked: bool
    exceptions: list[str] = field(default_factory=list)

    def note(self, operation: str) -> None:
        """Say, once, that an operation may give other bits another time."""
        if operation not in self.exceptions:
            self.exceptions.append(operation)
            logger.warning("not deterministic: %s", operation)

    def as_record(self) -> dict[str, Any]:
        """As `result.json` keeps it."""
        return {"asked": self.asked, "exceptions": sorted(self.exceptions)}


@contextmanager
def determinism(config: Config) -> Iterator[Determinism]:
    """Within it torch's algorithms are deterministic ones where `config.deterministic` asks for that.

    An operation that has none goes on and is noted. Attention on CUDA is computed the plain way, since its fast kernels
    add their gradients up in no fixed order; TF32 is left as it is. Afterwards, also after an error, everything is as
    it was before, so that a run that does not ask for it is not slowed by one that did.

    Raises ConfigError where the device does not exist here.
    """
    found = Determinism(config.deterministic)
    if not found.asked:
        yield found
        return
    with ExitStack() as after:
        _choose_algorithms(after, on_cuda=choose_device(config.device).type == "cuda")
        _listen(after, found)
        yield found


def _choose_algorithms(after: ExitStack, *, on_cuda: bool) -> None:
    """Switch torch's process-wide switches; `after` switches them back."""
    after.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    _set(after, torch.backends.cudnn, "benchmark", False)
    # It would be for finding programs that read what they have not written, at the price of writing everything twice.
    _set(after, torch.utils.deterministic, "fill_uninitialized_memory", False)
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    if workspace not in _CUBLAS_FIXED:
        after.callback(_put_back, workspace)
        os.environ[CUBLAS_WORKSPACE] = _CUBLAS_FIXED[0]
    if on_cuda:
        backends = torch.backends.cuda
        for kernel in ("flash", "mem_efficient", "cudnn"):
            enable = getattr(backends, f"enable_{kernel}_sdp")
            after.callback(enable, getattr(backends, f"{kernel}_sdp_enabled")())
            enable(False)


def _set(after: ExitStack, owner: Any, name: str, value: Any) -> None:
    after.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _put_back(workspace: str | None) -> None:
    if workspace is None:
        os.environ.pop(CUBLAS_WORKSPACE, None)
    else:
        os.environ[CUBLAS_WORKSPACE] = workspace


def _listen(after: ExitStack, found: Determinism) -> None:
    """Note torch's warnings about operations in `found` instead of showing them; others are shown as ever."""
    after.enter_context(warnings.catch_warnings())
    # Python would show one only once a line of code, also to the next run of this process.
    warnings.filterwarnings("always", message=_COMPLAINT.pattern)
    show = warnings.showwarning

    def noted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        complaint = _COMPLAINT.match(str(message))
        if complaint is None:
            show(message, category, filename, lineno, file, line)
        else:
            found.note(complaint["operation"] or f"cuBLAS, which was in use before {CUBLAS_WORKSPACE} was set")

    warnings.showwarning = noted
