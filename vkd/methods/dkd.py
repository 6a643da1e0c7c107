"""Decoupled knowledge distillation: the target class and the rest are compared apart, each with a weight of its own.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022 (arXiv 2203.08679). With the alpha-beta
divergence this is ABDKD (ABKD, ICML 2025): there the rest takes the divergence, and the target stays forward KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkd.divergences import make_divergence
from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext


@METHODS.register("dkd")
class DecoupledDistillation(Method):
    """min(epoch / warmup_epochs, 1) * T^2 * (target_weight * TCKD + nontarget_weight * NCKD).

    TCKD compares the two-way distributions (target class, all others together), NCKD the softmax over the C - 1
    classes other than the target, both at temperature T. KL(p || q) = TCKD + (1 - p_target) * NCKD: plain distillation
    binds the second weight to the teacher's confidence, which is undone here.

    Args:
        target_weight, nontarget_weight: weights of the two terms (1 and 2 to 8 by pair, beside a cross-entropy of 1).
        warmup_epochs: epochs over which both rise from 1/warmup_epochs of their weight; 0 for none.
        temperature_squared: multiply by T^2, as published.
        target_divergence: "fkld" compares the two-way distributions by forward KL whatever the divergence is, as DKD
            and ABDKD do; "same" compares them by the configured divergence too.

    Raises ConfigError for another target_divergence.
    """

    uses_divergence = True
    capturable = True
    per_image = True

    def __init__(
        self,
        context: MethodContext,
        *,
        target_weight: float,
        nontarget_weight: float,
        warmup_epochs: int,
        temperature_squared: bool,
        target_divergence: str = "fkld",
    ) -> None:
        super().__init__()
        if target_divergence not in ("fkld", "same"):
            raise ConfigError(
                f"method.dkd.target_divergence={target_divergence} is not a choice",
                expected="fkld, or same for the configured divergence",
            )
        self.divergence = context.divergence
        self.target_divergence = make_divergence("fkld") if target_divergence == "fkld" else context.divergence
        self.warmup_epochs = warmup_epochs
        scale = self.divergence.temperature**2 if temperature_squared else 1.0
        self.target_weight, self.nontarget_weight = scale * target_weight, scale * nontarget_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms `target` and `nontarget`: scalars."""
        pair = [_split(output.logits, batch.targets) for output in (batch.student, batch.teacher)]
        temperature = self.divergence.temperature
        two_way = [torch.cat([target / temperature, _total(others / temperature)], dim=-1) for target, others in pair]
        warmup = min(batch.progress.epoch / max(self.warmup_epochs, 1), 1.0)
        return {
            "target": warmup * self.target_weight * self.target_divergence(*two_way, temperature=1.0),
            "nontarget": warmup * self.nontarget_weight * self.divergence(*(others for _, others in pair)),
        }


def _split(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] taken apart into those of the targets [B, 1] and those of the other classes [B, C - 1]."""
    targets = targets.unsqueeze(-1)
    others = torch.arange(logits.shape[-1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(-1, targets), logits.gather(-1, others + (others >= targets))


def _total(logits: Tensor) -> Tensor:
    """The logit [B, 1] of all these classes [B, C] together; as a sum of probabilities it would underflow."""
    return logits.logsumexp(dim=-1, keepdim=True)
