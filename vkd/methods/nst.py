"""Neuron selectivity transfer: the distribution of channel activations is matched, channels being the samples.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017 (arXiv 1707.01219).
"""

from __future__ import annotations

from torch import Tensor

from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.normalization import unit_vectors
from vkd.methods.stages import pairs_with_positions, to_common_size


def selectivity_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps [B, c, h, w], averaged over the images.

    The channels of an image are vectors [h*w] of length 1 and their kernel is (a . b)^2; the larger map is pooled to
    the smaller. Two forms give one value: the means of the kernel over pairs of channels, or the squared difference of
    the mean outer products [h*w, h*w]. The one with fewer numbers is taken.
    """
    student, teacher = to_common_size(student_map, teacher_map.detach())
    student, teacher = (unit_vectors(entry.flatten(2), dim=2) for entry in (student, teacher))
    (channels, positions), teacher_channels = student.shape[1:], teacher.shape[1]
    if 2 * positions**2 <= channels**2 + channels * teacher_channels + teacher_channels**2:
        difference = student.mT @ student / channels - teacher.mT @ teacher / teacher_channels
        return difference.square().sum(dim=(1, 2)).mean()
    return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    """The mean of (a . b)^2 over images and pairs of channels: [B, c, n] and [B, d, n] to a scalar."""
    return (one @ other.mT).square().mean()


@METHODS.register("nst")
class NeuronSelectivityTransfer(Method):
    """weight * sum over the stages of the squared discrepancy between both networks' channels.

    Stages that have one position in common are left out: all channels of a single position are alike.

    Args:
        weight: weight of the term (50 beside a cross-entropy of 1 in the literature).

    Raises ModelError when no stage has more than one position in common.
    """

    needs_features = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.pairs = pairs_with_positions(context, method="nst")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `nst`: a scalar."""
        losses = [
            selectivity_loss(batch.student.features[pair.student], batch.teacher.features[pair.teacher])
            for pair in self.pairs
        ]
        return {"nst": self.weight * sum(losses)}
