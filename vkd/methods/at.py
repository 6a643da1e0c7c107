"""Attention transfer: where a network looks, stage by stage, is drawn to where the teacher looks.

Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017 (arXiv 1612.03928).
"""

from __future__ import annotations

from torch import Tensor

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.normalization import unit_vectors
from vkd.methods.stages import pairs_with_positions, to_common_size


def attention(feature_map: Tensor, power: float) -> Tensor:
    """A map [B, c, h, w] to [B, h*w]: at each position the mean of |channel|^power, then to length 1 an image."""
    return unit_vectors(feature_map.abs().pow(power).mean(dim=1).flatten(1), dim=1)


def attention_loss(student_map: Tensor, teacher_map: Tensor, power: float) -> Tensor:
    """Mean squared difference of the attentions of two maps [B, c, h, w]; the larger is pooled to the smaller."""
    student, teacher = to_common_size(student_map, teacher_map.detach())
    return (attention(student, power) - attention(teacher, power)).square().mean()


@METHODS.register("at")
class AttentionTransfer(Method):
    """weight * sum over the stages of the mean squared difference of both networks' attention.

    Stages that have one position in common are left out: the attention of a single position is always 1.

    Args:
        weight: weight of the term (1000 beside a cross-entropy of 1 in the literature).
        power: exponent of the channels' absolute values, at least 1 (2 in the literature).

    Raises ConfigError for a smaller power, ModelError when no stage has more than one position in common.
    """

    needs_features = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float, power: float) -> None:
        super().__init__()
        if power < 1:
            raise ConfigError(
                f"method.at.power = {power}, whose gradient is infinite where a feature is 0",
                expected="1 or more",
                hint="method.at.power=2",
            )
        self.weight = weight
        self.power = power
        self.pairs = pairs_with_positions(context, method="at")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `at`: a scalar."""
        losses = [
            attention_loss(batch.student.features[pair.student], batch.teacher.features[pair.teacher], self.power)
            for pair in self.pairs
        ]
        return {"at": self.weight * sum(losses)}
