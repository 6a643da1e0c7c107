"""Which stage of the student is compared with which of the teacher, and how their maps are brought to one size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vkd.errors import ConfigError, ModelError
from vkd.methods.contract import MethodContext


@dataclass(frozen=True)
class StagePair:
    """One stage of each network.

    student, teacher: positions in `Output.features`.
    student_shape, teacher_shape: (channels, height, width) of their maps.
    """

    student: int
    teacher: int
    student_shape: tuple[int, int, int]
    teacher_shape: tuple[int, int, int]

    @property
    def common_size(self) -> tuple[int, int]:
        """(height, width) to which `to_common_size` brings both maps."""
        _, height, width = map(min, self.student_shape, self.teacher_shape)
        return height, width


def pair_stages(context: MethodContext) -> list[StagePair]:
    """The stages of both networks pair by pair, the last with the last; where one has more, its first are left out.

    This is the literature's pairing for the networks that it compares. First pair first.
    """
    student, teacher = context.student_features.maps, context.teacher_features.maps
    count = min(len(student), len(teacher))
    return [
        StagePair(len(student) - back, len(teacher) - back, student[-back], teacher[-back])
        for back in range(count, 0, -1)
    ]


def choose_pair(pairs: list[StagePair], stage: int | None, *, key: str) -> StagePair:
    """The pair with number `stage`, counted from 1; the middle one (the second of three or four) where it is None.

    Args:
        key: the config key of `stage`, for the message.

    Raises ConfigError when there is no such pair.
    """
    if stage is None:
        return pairs[(len(pairs) - 1) // 2]
    if not 1 <= stage <= len(pairs):
        raise ConfigError(
            f"{key} = {stage}, but these networks share {len(pairs)} stages",
            expected=f"1 to {len(pairs)}, or null for the middle one",
        )
    return pairs[stage - 1]


def pairs_with_positions(context: MethodContext, *, method: str) -> list[StagePair]:
    """The pairs of stages whose maps have more than one position at their common size, first pair first.

    For a method that compares how a map is spread over its positions, to which a single position says nothing.

    Args:
        method: its name, for the message.

    Raises ModelError when there is no such pair.
    """
    pairs = pair_stages(context)
    found = [pair for pair in pairs if pair.common_size != (1, 1)]
    if not found:
        sizes = [tuple(shape[1:] for shape in (pair.student_shape, pair.teacher_shape)) for pair in pairs]
        raise ModelError(
            f"method {method} compares the positions of feature maps, but these networks' maps have one in common",
            expected=f"a stage with more than one position in both networks; (student, teacher) have {sizes}",
            hint="larger images, or a method that compares vectors, such as method=rkd",
        )
    return found


def to_common_size(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, c, h, w] of one height and width: the larger is average-pooled to the smaller, side by side."""
    height = min(student_map.shape[2], teacher_map.shape[2])
    width = min(student_map.shape[3], teacher_map.shape[3])
    return _pooled(student_map, height, width), _pooled(teacher_map, height, width)


def _pooled(feature_map: Tensor, height: int, width: int) -> Tensor:
    if feature_map.shape[2:] == (height, width):
        return feature_map
    return functional.adaptive_avg_pool2d(feature_map, (height, width))
