"""FitNets: one middle feature map of the student, through a regressor, is drawn to the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta and Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015 (arXiv 1412.6550).
As in the tables of the literature the hint is one term beside the cross-entropy for the whole of training, not a phase
of its own ahead of it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.stages import choose_pair, pair_stages, to_common_size


@METHODS.register("fitnet")
class FitNet(Method):
    """weight * mean squared difference of the regressed student map and the teacher map of one stage.

    The larger map is average-pooled to the smaller; the regressor is a 1x1 convolution, BatchNorm and ReLU. That is the
    published code's regressor where both maps have one size. Where one is twice the other it has a convolution of
    stride 2 or a transposed one instead of the pooling, and a large kernel without padding at other ratios, which
    serves only some pairs.

    Args:
        weight: weight of the term (100 beside a cross-entropy of 1 in the literature).
        stage: which of the stages that the networks share, counted from 1; null for the middle one, which is the second
            of three or four as in the literature.
        relu: end the regressor in a ReLU, as the published code does. It cannot reach negative values then: false suits
            a teacher whose maps have them (ViT, ConvNeXt, blocks with pre-activation).

    Raises ConfigError when the networks share no such stage.
    """

    needs_features = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float, stage: int | None, relu: bool) -> None:
        super().__init__()
        self.weight = weight
        self.pair = choose_pair(pair_stages(context), stage, key="method.fitnet.stage")
        channels = self.pair.teacher_shape[0]
        layers = [nn.Conv2d(self.pair.student_shape[0], channels, 1), nn.BatchNorm2d(channels)]
        self.regressor = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `fitnet`: a scalar."""
        student, teacher = to_common_size(
            batch.student.features[self.pair.student], batch.teacher.features[self.pair.teacher].detach()
        )
        return {"fitnet": self.weight * functional.mse_loss(self.regressor(student), teacher)}
