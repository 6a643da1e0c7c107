"""Correlation congruence, in the form behind the literature's tables: products of neighbouring images' errors.

Peng, Jin, Liu, Li, Wu, Liu, Zhou and Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019
(arXiv 1904.01802). The paper compares matrices of a Gaussian kernel over all pairs of a batch; RepDistiller, whose
tables are quoted as this method's, computes what follows instead, and so does this file.
"""

from __future__ import annotations

from torch import Tensor, nn

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext


def congruence_loss(student_vectors: Tensor, teacher_vectors: Tensor) -> Tensor:
    """Inner products of neighbouring rows of |student - teacher|, averaged over the B - 1 neighbours: [B, D] twice."""
    difference = (student_vectors - teacher_vectors).abs()
    return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)


@METHODS.register("cc")
class CorrelationCongruence(Method):
    """weight * congruence_loss of both classifiers' inputs, each through a linear map of its own that is learned.

    Args:
        weight: weight of the term (0.02 beside a cross-entropy of 1 in the literature).
        embedding_size: length of the vectors that are compared (128 in the literature).

    Raises ConfigError when `embedding_size` is not positive.
    """

    needs_features = True
    capturable = True

    def __init__(self, context: MethodContext, *, weight: float, embedding_size: int) -> None:
        super().__init__()
        if embedding_size < 1:
            raise ConfigError(
                f"method.cc.embedding_size = {embedding_size}",
                expected="a positive number",
                hint="method.cc.embedding_size=128",
            )
        self.weight = weight
        self.student_embedding = nn.Linear(context.student_features.embedding, embedding_size)
        self.teacher_embedding = nn.Linear(context.teacher_features.embedding, embedding_size)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `cc`: a scalar."""
        student = self.student_embedding(batch.student.embedding)
        teacher = self.teacher_embedding(batch.teacher.embedding.detach())
        return {"cc": self.weight * congruence_loss(student, teacher)}
