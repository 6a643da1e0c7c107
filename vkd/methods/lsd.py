"""Logit standardization: the shapes of the softened outputs are compared, whatever the size of the logits.

Sun, Ren, Li, Wang and Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024 (arXiv 2403.01427). With the
alpha-beta divergence this is ABLSD (ABKD, ICML 2025).
"""

from __future__ import annotations

from torch import Tensor

from vkd.methods.contract import METHODS, Batch, Method, MethodContext

_SMALLEST_DEVIATION = 1e-2
"""Logits that vary less are divided by this. They are almost constant (a classifier initialised to zero), and their
own deviation would blow up rounding errors and the gradient."""


@METHODS.register("lsd")
class LogitStandardization(Method):
    """weight * T^2 * D(p || q) of logits that are standardized sample by sample, (z - mean) / (std + 1e-7).

    The deviation is the unbiased one over the C classes, at least 1e-2. Adding a number to a sample's logits, or
    multiplying them by a positive one, changes nothing as long as they deviate by more than that.

    Args:
        weight: weight of the term (9 at T = 2 beside a cross-entropy of 0.1 in the paper's rows).
        temperature_squared: multiply by T^2, as published.
    """

    cross_entropy_weight = 0.1
    uses_divergence = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float, temperature_squared: bool) -> None:
        super().__init__()
        self.divergence = context.divergence
        self.weight = weight * (self.divergence.temperature**2 if temperature_squared else 1.0)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `lsd`: a scalar."""
        student_logits, teacher_logits = _standardized(batch.student.logits), _standardized(batch.teacher.logits)
        return {"lsd": self.weight * self.divergence(student_logits, teacher_logits)}


def _standardized(logits: Tensor) -> Tensor:
    """Logits [B, C] with mean 0 and deviation 1 in every row, but for the bound."""
    deviation = logits.std(dim=-1, keepdim=True).clamp(min=_SMALLEST_DEVIATION)
    return (logits - logits.mean(dim=-1, keepdim=True)) / (deviation + 1e-7)
