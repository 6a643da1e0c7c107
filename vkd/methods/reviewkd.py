"""Knowledge review: each of the student's stages, joined with the deeper ones, is compared with the teacher's.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv 2104.09044).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd.errors import require
from vkd.methods.contract import METHODS, Batch, Method, MethodContext
from vkd.methods.stages import pair_stages


@METHODS.register("reviewkd")
class KnowledgeReview(Method):
    """weight * min(epoch / warmup_epochs, 1) * sum over the levels of the hierarchical context loss.

    The levels are the stages of both networks pair by pair (`pair_stages`) and, as the last one, the vectors ahead of
    their classifiers, taken as maps of 1x1. From the last level to the first, attention-based fusion joins the
    student's map with what came out at the level behind, and a convolution makes a map of the teacher's shape from it,
    which the hierarchical context loss compares with the teacher's. The fusion's layers are trained and then dropped.

    As in the published code, the fusion works in as many channels as the student's vector has, `max_mid_channels` at
    most, and what goes on to the level before has the height and width of the teacher's map. Otherwise than there, the
    teacher's maps are those after the activation that ends a stage, not ahead of it. Of the two published codes, the
    authors' counts epochs from 0 and has no such loss in the first one; here, as in mdistiller, they count from 1.

    Args:
        weight: weight of the term; 0.6 to 8 in the authors' scripts, by pair.
        warmup_epochs: epochs over which the weight rises; 0 for none.
        max_mid_channels: the most channels in which maps are fused.

    Raises ConfigError for a value out of its range.
    """

    needs_features = True
    capturable = True
    per_image = True

    def __init__(self, context: MethodContext, *, weight: float, warmup_epochs: int, max_mid_channels: int) -> None:
        super().__init__()
        require(warmup_epochs >= 0, f"method.reviewkd.warmup_epochs = {warmup_epochs}", "a whole number from 0")
        require(
            max_mid_channels >= 1, f"method.reviewkd.max_mid_channels = {max_mid_channels}", "a whole number from 1"
        )
        self.weight, self.warmup_epochs = weight, warmup_epochs
        self.pairs = pair_stages(context)
        sizes = context.student_features.embedding, context.teacher_features.embedding
        channels = [(pair.student_shape[0], pair.teacher_shape[0]) for pair in self.pairs] + [sizes]
        mid_channels = min(max_mid_channels, sizes[0])
        self.fusions = nn.ModuleList(
            AttentionBasedFusion(student, mid_channels, teacher, last=level == len(self.pairs))
            for level, (student, teacher) in enumerate(channels)
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term `reviewkd`: a scalar."""
        levels = [(batch.student.features[pair.student], batch.teacher.features[pair.teacher]) for pair in self.pairs]
        levels.append((batch.student.embedding[:, :, None, None], batch.teacher.embedding[:, :, None, None]))
        losses, fused = [], None
        for fusion, (student_map, teacher_map) in zip(reversed(self.fusions), reversed(levels), strict=True):
            review, fused = fusion(student_map, fused, teacher_map.shape[2:])
            losses.append(hierarchical_context_loss(review, teacher_map))
        warmup = min(batch.progress.epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        return {"reviewkd": self.weight * warmup * sum(losses)}


class AttentionBasedFusion(nn.Module):
    """One level of the review.

    A 1x1 convolution takes the student's map to `mid_channels`; the map of the level behind is brought to its size by
    the nearest neighbour; a sigmoid of another 1x1 convolution of both gives each a weight at every position, by which
    they are added. The sum, brought to the teacher's size likewise, goes through a 3x3 convolution to its channels.

    Args:
        student_channels, mid_channels, teacher_channels: channels that come in, in between and that come out.
        last: there is no level behind this one.
    """

    def __init__(self, student_channels: int, mid_channels: int, teacher_channels: int, *, last: bool) -> None:
        super().__init__()
        self.reduce = _convolution(student_channels, mid_channels, 1)
        self.attention = None if last else nn.Conv2d(2 * mid_channels, 2, 1)
        self.expand = _convolution(mid_channels, teacher_channels, 3)

    def forward(self, student_map: Tensor, fused: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map to compare [B, teacher_channels, H, W] and what goes on to the level before [B, mid_channels, H, W].

        Args:
            student_map: [B, student_channels, h, w].
            fused: what came on from the level behind [B, mid_channels, any, any]; None at the last level.
            size: (H, W) of the teacher's map.
        """
        joint = self.reduce(student_map)
        if self.attention is not None:
            fused = _resized(fused, joint.shape[2:])
            weights = self.attention(torch.cat([joint, fused], dim=1)).sigmoid()
            joint = joint * weights[:, :1] + fused * weights[:, 1:]
        joint = _resized(joint, size)
        return self.expand(joint), joint


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The mean squared difference of two maps [B, c, h, w], and of them pooled to 4x4, 2x2 and 1x1; a scalar.

    Sizes that are not smaller than the map's are left out. Full size weighs 1 and each further one half of that before;
    the weights are divided by their sum.
    """
    loss, weight, total = functional.mse_loss(student_map, teacher_map), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(student_map.shape[2:]):
            weight /= 2
            total += weight
            pooled = (functional.adaptive_avg_pool2d(entry, side) for entry in (student_map, teacher_map))
            loss = loss + weight * functional.mse_loss(*pooled)
    return loss / total


def _convolution(in_channels: int, out_channels: int, side: int) -> nn.Sequential:
    """A convolution that keeps the size, and batch normalisation; initialised as in the published code."""
    convolution = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _resized(feature_map: Tensor, size: torch.Size) -> Tensor:
    return feature_map if feature_map.shape[2:] == size else functional.interpolate(feature_map, size, mode="nearest")
