"""Mixed precision: which autocast, and whether gradients are scaled."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("vkd")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How forward passes and gradients are computed.

    fp32 uses neither autocast nor a scaler; bf16 autocasts; fp16 autocasts and scales the loss, since its gradients
    would underflow otherwise. The scaler exists with fp16 alone.

    Args:
        name: fp32, bf16 or fp16.
        device: where it runs.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.dtype = _DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def warn_if_emulated(self) -> None:
        """Say so where the processor has no arithmetic of this precision."""
        if self.name != "bf16" or self.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            logger.warning("this processor has no bfloat16 arithmetic: precision=bf16 is slower than fp32 here")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def update(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        clip: float | None,
        add_up: Callable[[], None] | None = None,
    ) -> None:
        """One backward pass and optimizer step. Gradients are unscaled before their norm is clipped to `clip`.

        Args:
            add_up: brings together the gradients of several processes; None where there is one. An infinite gradient on
                any of them is one on all then, so that all scalers decide alike.
        """
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            if add_up is not None:
                add_up()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            return
        self.scaler.scale(loss).backward()
        if add_up is not None:
            add_up()
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
