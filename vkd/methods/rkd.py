"""Relational knowledge distillation: distances and angles between the images of a batch are drawn to the teacher's.

Park, Kim, Lu and Cho, "Relational Knowledge Distillation", CVPR 2019 (arXiv 1904.05068).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.normalization import unit_vectors


def differences(embedding: Tensor) -> Tensor:
    """Vectors [B, D] to [B, B, D], at (i, j) vector j less vector i: exact for near vectors, unlike inner products."""
    return embedding.unsqueeze(0) - embedding.unsqueeze(1)


def relative_distances(difference: Tensor) -> Tensor:
    """Differences [B, B, D] to distances [B, B] over their mean over all pairs of two images; 0 if all are equal."""
    distance = torch.linalg.vector_norm(difference, dim=2)
    pairs = len(distance) * (len(distance) - 1)
    mean = distance.sum() / max(pairs, 1)
    return distance / torch.where(mean > 0, mean, torch.ones_like(mean))


def angles(difference: Tensor) -> Tensor:
    """Differences [B, B, D] to [B, B, B], at (i, j, k) the cosine of the angle at i between j and k, and 0 at i = j."""
    unit = unit_vectors(difference, dim=2)
    return unit @ unit.mT


@METHODS.register("rkd")
class RelationalDistillation(Method):
    """weight * (distance_weight * L(distances) + angle_weight * L(angles)), L the mean smooth L1 of the differences.

    Compared are the vectors that enter the classifiers. Memory grows as B^2 D, that of the angles as B^3 besides.

    Args:
        weight: weight of both terms (1 beside a cross-entropy of 1 in the literature).
        distance_weight: weight of the distances (25 in the literature).
        angle_weight: weight of the cosines of the angles (50 in the literature).
    """

    needs_features = True
    capturable = True

    def __init__(self, context: MethodContext, *, weight: float, distance_weight: float, angle_weight: float) -> None:
        super().__init__()
        relations = {
            "distance": (weight * distance_weight, relative_distances),
            "angle": (weight * angle_weight, angles),
        }
        self.relations = {name: entry for name, entry in relations.items() if entry[0] != 0}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms `distance` and `angle`, scalars; without those whose weight is 0."""
        student = differences(batch.student.embedding)
        teacher = differences(batch.teacher.embedding.detach())
        return {
            name: weight * functional.smooth_l1_loss(relation(student), relation(teacher))
            for name, (weight, relation) in self.relations.items()
        }
