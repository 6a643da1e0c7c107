"""Probabilistic knowledge transfer: the teacher's neighbourhoods in a batch, as probabilities, are the student's aim.

Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018 (arXiv 1803.10837).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.normalization import unit_vectors

EPSILON = 1e-7
"""Added to lengths and to both probabilities, as in the published code: probabilities of opposite vectors are 0."""


def neighbour_probabilities(embedding: Tensor) -> Tensor:
    """Vectors [B, D] to [B, B]: each row the cosines with all vectors, mapped to [0, 1] and divided by their sum.

    A zero vector has cosine 0 with every vector, and gets no gradient.
    """
    length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
    unit = unit_vectors(embedding, dim=1) * (length / (length + EPSILON))
    cosines = unit @ unit.mT
    kernel = (cosines + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)


def probability_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Sum over all pairs of p ln(p / q), divided by B^2, for vectors [B, D] and [B, E].

    p is the teacher's and q the student's probability. The division by B^2 instead of B is the published code's, to
    which the literature's weight belongs.
    """
    p = neighbour_probabilities(teacher_embedding.detach())
    q = neighbour_probabilities(student_embedding)
    return (p * ((p + EPSILON) / (q + EPSILON)).log()).mean()


@METHODS.register("pkt")
class ProbabilisticKnowledgeTransfer(Method):
    """weight * divergence of the student's from the teacher's neighbour probabilities, of the classifiers' inputs.

    Args:
        weight: weight of the term (30000 beside a cross-entropy of 1 in the literature).
    """

    needs_features = True
    capturable = True

    def __init__(self, context: MethodContext, *, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `pkt`: a scalar."""
        return {"pkt": self.weight * probability_loss(batch.student.embedding, batch.teacher.embedding)}
