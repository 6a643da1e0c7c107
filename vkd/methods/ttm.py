"""Transformed teacher matching: the teacher is softened, the student is not.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 (arXiv 2402.11148). With the
alpha-beta divergence this is ABTTM (ABKD, ICML 2025).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext


@METHODS.register("ttm")
class TransformedTeacherMatching(Method):
    """weight * D(p' || q), where q is the student's softmax at T = 1 and p' the teacher's raised to `power`.

    p' is proportional to p^power, which is the teacher's softmax at T = 1 / power. There is no factor T^2.

    Args:
        weight: weight of the term (45 and 76 at power 0.1 in the two published commands, beside a cross-entropy of 1).
        power: the exponent, above 0; below 1 it softens the teacher.

    Raises ConfigError for a power that is not above 0.
    """

    uses_divergence = True
    uses_temperature = False
    capturable = True
    per_image = True
    name: ClassVar[str] = "ttm"

    def __init__(self, context: MethodContext, *, weight: float, power: float) -> None:
        super().__init__()
        if power <= 0:
            raise ConfigError(f"method.{self.name}.power={power} is not above 0", expected="above 0; below 1 to soften")
        self.divergence, self.weight, self.power = context.divergence, weight, power

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `ttm`: a scalar."""
        # softmax(power * z), not a power of the softmax: small probabilities would be 0 before they are raised.
        transformed = self.power * batch.teacher.logits
        return {"ttm": self.weight * self.divergence(batch.student.logits, transformed, temperature=1.0)}
