"""Curriculum temperature: the temperature is learned against the student, so that the task grows harder.

Li, Li, Yang, Zhao, Song, Luo, Li and Yang, "Curriculum Temperature for Knowledge Distillation", AAAI 2023
(arXiv 2211.16231).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext

_SCOPES = ("global", "instance")

_HIDDEN_SIZE = 256


@METHODS.register("ctkd")
class CurriculumTemperature(Method):
    """weight * mean of T^2 * D(p || q) over the samples, at T = minimum_temperature + temperature_range * sigmoid(x).

    x is learned and minimizes nothing: its gradient is multiplied by minus a factor that rises from 0 to
    `reversal_weight` along half a cosine over the first `reversal_epochs` epochs, (1 - cos(pi * epoch /
    reversal_epochs)) / 2. It sees T in the student's softmax, in the teacher's and in T^2, as in the published code.

    With scope "global", x is one number that starts at 1 (T = 15.6). With "instance" every sample has its own T, from
    two linear layers 2C -> 256 -> 1 with a ReLU between, on both softmaxes at T = 1, without gradient to the student.
    The last layer starts at 0 (T = 11). The paper names a small network of both predictions; its public code has none,
    so sizes, inputs and start, and T^2 sample by sample, are our choice.

    Args:
        weight: weight of the term (0.9 beside a cross-entropy of 0.1, as kd).
        temperature_squared: multiply by T^2, as published.
        scope: "global" or "instance".
        minimum_temperature, temperature_range: bounds of T (1 and 20), above 0 and from 0.
        reversal_weight, reversal_epochs: largest factor, and the epoch from which it holds (1 and 10).

    Raises ConfigError for a value out of its range, or a divergence without a dual.
    """

    cross_entropy_weight = 0.1
    uses_divergence = True
    capturable = True
    per_image = True
    uses_temperature = False

    def __init__(
        self,
        context: MethodContext,
        *,
        weight: float,
        temperature_squared: bool,
        scope: str,
        minimum_temperature: float,
        temperature_range: float,
        reversal_weight: float,
        reversal_epochs: int,
    ) -> None:
        super().__init__()
        if scope not in _SCOPES:
            raise ConfigError(f"method.ctkd.scope={scope} is not a choice", expected=" or ".join(_SCOPES))
        if minimum_temperature <= 0 or temperature_range < 0:
            raise ConfigError(
                f"method.ctkd: temperatures from {minimum_temperature} on, over a range of {temperature_range}",
                expected="minimum_temperature above 0, temperature_range from 0",
            )
        self.divergence, self.dual = context.divergence, context.divergence.dual
        self.weight, self.temperature_squared = weight, temperature_squared
        self.minimum_temperature, self.temperature_range = minimum_temperature, temperature_range
        self.reversal_weight, self.reversal_epochs = reversal_weight, reversal_epochs
        if scope == "global":
            self.raw_temperature = nn.Parameter(torch.ones(1))
            self.network = None
        else:
            last = nn.Linear(_HIDDEN_SIZE, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.network = nn.Sequential(nn.Linear(2 * context.num_classes, _HIDDEN_SIZE), nn.ReLU(), last)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `ctkd`: a scalar."""
        student_logits, teacher_logits = batch.student.logits, batch.teacher.logits.detach()
        progress = min(batch.progress.epoch / max(self.reversal_epochs, 1), 1.0)
        factor = self.reversal_weight * (1.0 - math.cos(math.pi * progress)) / 2
        temperature = self._temperature(student_logits.detach(), teacher_logits, factor)
        # [1, 1] or [B, 1]. A divergence takes a number for a temperature, so the logits bring theirs along.
        student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        each = self.divergence(student_logits, teacher_logits, temperature=1.0, reduction="none")
        # The temperature moves the teacher's distribution too. The dual has the same value, and the gradient by the
        # teacher's logits alone.
        mirrored = self.dual(teacher_logits, student_logits, temperature=1.0, reduction="none")
        each = each + (mirrored - mirrored.detach())
        if self.temperature_squared:
            each = temperature.squeeze(-1).square() * each
        return {"ctkd": self.weight * each.mean()}

    def _temperature(self, student_logits: Tensor, teacher_logits: Tensor, factor: float) -> Tensor:
        """T, [1, 1] or [B, 1]; on the way back its gradient is multiplied by -factor."""
        if self.network is None:
            raw = self.raw_temperature.unsqueeze(-1)
        else:
            both = torch.cat([student_logits.softmax(dim=-1), teacher_logits.softmax(dim=-1)], dim=-1)
            raw = self.network(both.to(self.network[0].weight.dtype))
        raw = raw.detach() - factor * (raw - raw.detach())
        return (self.minimum_temperature + self.temperature_range * raw.sigmoid()).to(student_logits.dtype)
