"""DIST: the student's outputs need correlate with the teacher's only, sample by sample and class by class.

Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022 (arXiv 2205.10536).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext

_SMALLEST_VARIATION = 1e-3
"""Rows of probabilities that vary less, relative to their size, count as if they varied by this. They are almost
constant, and the correlation of what is left would be that of rounding errors, with a gradient without bounds."""


@METHODS.register("dist")
class StrongerTeacher(Method):
    """T^2 * (inter_weight * inter + intra_weight * intra), both 1 - the mean of Pearson's correlation.

    p and q are the teacher's and student's softmax at temperature T [B, C]. `inter` correlates them over the classes
    of each sample, `intra` over the samples of each class. 1e-8 is added to the product of the norms, as published. A
    constant row has correlation 0. The norm of a centred row counts as at least 1e-3 of the row's own, which is not
    published and bounds the gradient where a row is almost constant.

    Args:
        inter_weight, intra_weight: weights of the two terms (in public code 1 and 1 by default, beside a cross-entropy
            of 1).
        temperature: T, above 0.
        temperature_squared: multiply by T^2, as published.

    Raises ConfigError for a temperature that is not above 0.
    """

    capturable = True

    def __init__(
        self,
        context: MethodContext,
        *,
        inter_weight: float,
        intra_weight: float,
        temperature: float,
        temperature_squared: bool,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"method.dist.temperature={temperature} is not above 0", expected="a number above 0")
        self.temperature = temperature
        scale = temperature**2 if temperature_squared else 1.0
        self.inter_weight, self.intra_weight = scale * inter_weight, scale * intra_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The terms `inter` and `intra`: scalars."""
        q = (batch.student.logits / self.temperature).softmax(dim=-1)
        p = (batch.teacher.logits.detach() / self.temperature).softmax(dim=-1)
        return {
            "inter": self.inter_weight * (1.0 - _correlation(q, p).mean()),
            "intra": self.intra_weight * (1.0 - _correlation(q.t(), p.t()).mean()),
        }


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of each row of x [N, M] with that of y: [N]."""
    (x, x_norm), (y, y_norm) = _centred(x), _centred(y)
    return (x * y).sum(dim=-1) / (x_norm * y_norm + 1e-8)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, M] less their means, and their norms [N], bounded from below."""
    smallest = _SMALLEST_VARIATION * torch.linalg.vector_norm(x.detach(), dim=-1)
    x = x - x.mean(dim=-1, keepdim=True)
    return x, torch.maximum(torch.linalg.vector_norm(x, dim=-1), smallest)
