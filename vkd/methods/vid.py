"""Variational information distillation: the student's maps shall tell as much as possible about the teacher's.

Ahn, Hu, Damianou, Lawrence and Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019
(arXiv 1904.05835).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd.errors import ConfigError
from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.stages import pair_stages, to_common_size

SMALLEST_VARIANCE = 1e-5


def predictor(student_channels: int, hidden_channels: int, teacher_channels: int) -> nn.Sequential:
    """Student maps [B, student_channels, h, w] to the teacher's expected ones: three 1x1 convolutions without bias."""
    return nn.Sequential(
        nn.Conv2d(student_channels, hidden_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(hidden_channels, hidden_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(hidden_channels, teacher_channels, 1, bias=False),
    )


def raw_variance(variance: float) -> float:
    """The number that `negative_log_likelihood` takes for `variance`."""
    excess = variance - SMALLEST_VARIANCE
    return excess + math.log(-math.expm1(-excess))


def negative_log_likelihood(prediction: Tensor, teacher_map: Tensor, raw_variances: Tensor) -> Tensor:
    """Mean over all entries of ((prediction - teacher)^2 / v + ln v) / 2: a Gaussian's, less the constant ln(2 pi) / 2.

    prediction, teacher_map: [B, c, h, w].
    raw_variances: [c]; v is softplus of it plus 1e-5.
    """
    variance = (functional.softplus(raw_variances) + SMALLEST_VARIANCE).view(1, -1, 1, 1)
    return 0.5 * ((prediction - teacher_map).square() / variance + variance.log()).mean()


@METHODS.register("vid")
class VariationalInformationDistillation(Method):
    """weight * sum over the stages of the negative log-likelihood of the teacher's map, which may become negative.

    The larger map is average-pooled to the smaller. Each stage has a predictor with as many hidden channels as the
    teacher's map, and one variance a channel; both are learned.

    Args:
        weight: weight of the term (1 beside a cross-entropy of 1 in the literature).
        initial_variance: of every channel, above 1e-5 (5 in the literature).

    Raises ConfigError when the variance is too small.
    """

    needs_features = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float, initial_variance: float) -> None:
        super().__init__()
        if initial_variance <= SMALLEST_VARIANCE:
            raise ConfigError(
                f"method.vid.initial_variance = {initial_variance}",
                expected=f"a number above {SMALLEST_VARIANCE}",
                hint="method.vid.initial_variance=5",
            )
        self.weight = weight
        self.pairs = pair_stages(context)
        channels = [(pair.student_shape[0], pair.teacher_shape[0]) for pair in self.pairs]
        self.predictors = nn.ModuleList(predictor(student, teacher, teacher) for student, teacher in channels)
        self.raw_variances = nn.ParameterList(
            torch.full((teacher,), raw_variance(initial_variance)) for _, teacher in channels
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `vid`: a scalar."""
        loss = 0.0
        for pair, stage_predictor, raw_variances in zip(self.pairs, self.predictors, self.raw_variances, strict=True):
            student, teacher = to_common_size(
                batch.student.features[pair.student], batch.teacher.features[pair.teacher].detach()
            )
            loss = loss + negative_log_likelihood(stage_predictor(student), teacher, raw_variances)
        return {"vid": self.weight * loss}
