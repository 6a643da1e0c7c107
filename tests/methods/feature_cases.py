"""What the tests of all feature methods share: stored values, contexts and batches of random features."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vkd.config import config_directory
from vkd.methods import Batch, Method, MethodContext, Output, Progress, make_method
from vkd.models import FeatureShapes

Shape = tuple[int, int, int]

OFFICIAL = json.loads((Path(__file__).parents[1] / "reference" / "official_feature_losses.json").read_text())

# Other channels, sizes and numbers of stages; the last stages correspond.
STUDENT_MAPS = [(3, 8, 8), (4, 4, 4), (5, 2, 2)]
TEACHER_MAPS = [(2, 16, 16), (6, 8, 8), (5, 2, 4), (7, 2, 2)]


def official(method: str) -> list[dict[str, Any]]:
    """The stored cases of a method, with `student` and `teacher` as tensors."""
    cases = [case for case in OFFICIAL["cases"] if case["method"] == method]
    assert cases
    return [{**case, "student": stored(case["student"]), "teacher": stored(case["teacher"])} for case in cases]


def stored(name: str) -> Tensor:
    return torch.tensor(OFFICIAL[name], dtype=torch.float64)


def assert_official(case: dict[str, Any], student: Tensor, loss: Tensor) -> None:
    """The loss of `student`, a leaf, and its gradient are the stored ones to 1e-9 relative."""
    gradient = torch.tensor(case["grad"], dtype=torch.float64)
    (found,) = torch.autograd.grad(loss, student)
    assert abs(loss.item() / case["loss"] - 1) < 1e-9
    assert (found - gradient).abs().max() < 1e-9 * gradient.abs().max()


def configured(name: str) -> dict[str, Any]:
    """The parameters of a method in its config file."""
    return yaml.safe_load((config_directory() / "method" / f"{name}.yaml").read_text())


def context(
    student_maps: Iterable[Shape] = STUDENT_MAPS,
    teacher_maps: Iterable[Shape] = TEACHER_MAPS,
    student_embedding: int = 6,
    teacher_embedding: int = 9,
) -> MethodContext:
    return MethodContext(
        divergence=None,
        num_classes=5,
        train_size=100,
        epochs=2,
        steps_per_epoch=3,
        student=nn.Identity(),
        teacher=nn.Identity(),
        image_shape=(3, 32, 32),
        generator=torch.Generator().manual_seed(0),
        student_features=FeatureShapes(tuple(student_maps), student_embedding),
        teacher_features=FeatureShapes(tuple(teacher_maps), teacher_embedding),
    )


def build(name: str, where: MethodContext | None = None, *, dtype: torch.dtype = torch.float64, **changes) -> Method:
    """A method at its configured parameters with `changes`, in training mode."""
    parameters = {**configured(name), **changes}
    return make_method({name: parameters}, where or context(), 1).methods[name].to(dtype)


def make_batch(student: Output, teacher: Output) -> Batch:
    images = len(student.logits)
    targets = torch.zeros(images, dtype=torch.int64)
    return Batch(student, teacher, targets, torch.arange(images), Progress(1, 2, 1, 6))


def output(maps: Sequence[Tensor], embedding: Tensor | None = None) -> Output:
    """An output of these features, all leaves with gradient."""
    embedding = torch.zeros(len(maps[0]), 1, dtype=maps[0].dtype) if embedding is None else embedding
    leaves = [entry.clone().requires_grad_() for entry in (*maps, embedding)]
    return Output(torch.zeros(len(embedding), 5, dtype=embedding.dtype), leaves[:-1], leaves[-1])


def random_output(shapes: FeatureShapes, images: int, seed: int, dtype: torch.dtype = torch.float64) -> Output:
    random = torch.Generator().manual_seed(seed)
    maps = [torch.randn(images, *shape, generator=random, dtype=torch.float64) for shape in shapes.maps]
    embedding = torch.randn(images, shapes.embedding, generator=random, dtype=torch.float64)
    return output([entry.to(dtype) for entry in maps], embedding.to(dtype))


def random_batch(
    where: MethodContext | None = None, images: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    """Random features of both networks. The teacher's want a gradient too, to see that they get none."""
    where = where or context()
    student = random_output(where.student_features, images, 2 * seed, dtype)
    return make_batch(student, random_output(where.teacher_features, images, 2 * seed + 1, dtype))


def total(method: Method, batch: Batch) -> Tensor:
    return sum(method(batch).values())


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q


def pooled_by_loops(feature_map: Tensor, height: int, width: int) -> list:
    """A map [B, c, h, w] as nested lists, each entry the mean of the block of entries that it covers."""
    images, channels, from_height, from_width = feature_map.shape
    values = feature_map.tolist()

    def block(position: int, size: int, parts: int) -> range:
        return range(position * size // parts, -(-(position + 1) * size // parts))

    def mean(image: int, channel: int, row: int, column: int) -> float:
        rows, columns = block(row, from_height, height), block(column, from_width, width)
        return sum(values[image][channel][i][j] for i in rows for j in columns) / (len(rows) * len(columns))

    return [
        [[[mean(b, c, i, j) for j in range(width)] for i in range(height)] for c in range(channels)]
        for b in range(images)
    ]


def to_common_size_by_loops(one: Tensor, other: Tensor) -> tuple[list, list]:
    height, width = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return pooled_by_loops(one, height, width), pooled_by_loops(other, height, width)


def matched(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(student, teacher) maps of the stages that correspond, the last with the last."""
    pairs = zip(reversed(batch.student.features), reversed(batch.teacher.features), strict=False)
    return list(pairs)[::-1]
