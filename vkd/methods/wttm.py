"""Weighted transformed teacher matching: samples about which the teacher is less sure count for more.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 (arXiv 2402.11148).
"""

from __future__ import annotations

from torch import Tensor

from vkd.methods.contract import METHODS, Batch
from vkd.methods.ttm import TransformedTeacherMatching


@METHODS.register("wttm")
class WeightedTransformedTeacherMatching(TransformedTeacherMatching):
    """weight * mean of u * D(p' || q) over the samples, where D(p' || q) is that of `ttm` and u = sum_k p_k^power.

    p is the teacher's softmax at T = 1. With a power below 1, u lies between 1 for a certain teacher and
    C^(1 - power) for one that knows nothing. There is no factor T^2.

    Args:
        weight: weight of the term (4 at power 0.2 in the one published command, where CRD stands beside it).
        power: the exponent, above 0; below 1 it softens the teacher.

    Raises ConfigError for a power that is not above 0.
    """

    name = "wttm"

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `wttm`: a scalar."""
        transformed = self.power * batch.teacher.logits.detach().log_softmax(dim=-1)
        sample_weights = transformed.logsumexp(dim=-1).exp()
        each = self.divergence(batch.student.logits, transformed, temperature=1.0, reduction="none")
        return {"wttm": self.weight * (sample_weights * each).mean()}
