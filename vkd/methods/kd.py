"""Knowledge distillation: the student's softened outputs are drawn to the teacher's.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 Deep Learning Workshop
(arXiv 1503.02531). With the alpha-beta divergence this is ABKD (ICML 2025, arXiv 2505.04560).
"""

from __future__ import annotations

from torch import Tensor

from vkd.methods.contract import METHODS, Batch, Method, MethodContext


@METHODS.register("kd")
class KnowledgeDistillation(Method):
    """weight * T^2 * D(p || q), where p and q are the teacher's and student's softmax at temperature T.

    Args:
        weight: weight of the term (0.9 beside a cross-entropy of 0.1 in the literature's KD rows).
        temperature_squared: multiply by T^2, which keeps the gradient's size when T changes. The published ABKD
            weights (32, 64) were used without it.
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
        """The one term `kd`: a scalar."""
        return {"kd": self.weight * self.divergence(batch.student.logits, batch.teacher.logits)}
