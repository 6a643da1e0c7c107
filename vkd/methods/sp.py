"""Similarity-preserving distillation: images that excite the teacher alike shall excite the student alike.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019 (arXiv 1907.09682).
"""

from __future__ import annotations

from torch import Tensor

from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.normalization import unit_vectors


def similarities(feature_map: Tensor) -> Tensor:
    """A map [B, c, h, w] to the inner products of all pairs of images [B, B], each row of length 1."""
    flat = feature_map.flatten(1)
    return unit_vectors(flat @ flat.mT, dim=1)


def similarity_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of the similarities; the two maps [B, c, h, w] may differ in all but B."""
    return (similarities(student_map) - similarities(teacher_map.detach())).square().mean()


@METHODS.register("sp")
class SimilarityPreserving(Method):
    """weight * mean squared difference of the row-normalised similarities [B, B] of the last maps.

    Args:
        weight: weight of the term (3000 beside a cross-entropy of 1 in the literature).
    """

    needs_features = True
    capturable = True

    def __init__(self, context: MethodContext, *, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `sp`: a scalar."""
        return {"sp": self.weight * similarity_loss(batch.student.features[-1], batch.teacher.features[-1])}
