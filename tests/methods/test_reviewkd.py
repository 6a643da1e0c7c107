"""Knowledge review: the order of the fusion, the pyramid loss, pairs of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vkd.errors import ConfigError
from vkd.methods import METHODS, Batch, MethodContext, Output, Progress
from vkd.methods.reviewkd import hierarchical_context_loss
from vkd.models import FeatureShapes, Intermediates, create_model

KEYS = {"weight": 2.0, "warmup_epochs": 20, "max_mid_channels": 512}
# More stages than the teacher, other sizes and channels everywhere, one map that is no square.
STUDENT = FeatureShapes(((2, 9, 9), (3, 8, 8), (4, 4, 6), (5, 2, 2)), 6)
TEACHER = FeatureShapes(((7, 12, 12), (8, 6, 4), (9, 1, 1)), 10)


def context(student: FeatureShapes = STUDENT, teacher: FeatureShapes = TEACHER) -> MethodContext:
    return MethodContext(
        divergence=None,
        num_classes=5,
        train_size=100,
        epochs=40,
        steps_per_epoch=3,
        student=nn.Identity(),
        teacher=nn.Identity(),
        image_shape=(3, 32, 32),
        generator=torch.Generator().manual_seed(0),
        student_features=student,
        teacher_features=teacher,
    )


def reviewkd(**changes) -> nn.Module:
    """The method in float64, with batch normalisation that is not the identity."""
    torch.manual_seed(0)
    method = METHODS["reviewkd"](context(), **{**KEYS, **changes}).double()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return method


def batch(size: int = 3, epoch: int = 40) -> Batch:
    random = torch.Generator().manual_seed(1)

    def output(shapes: FeatureShapes) -> Output:
        maps = [torch.randn(size, *shape, generator=random, dtype=torch.float64) for shape in shapes.maps]
        vector = torch.randn(size, shapes.embedding, generator=random, dtype=torch.float64)
        return Output(torch.zeros(size, 5), maps, vector)

    answers = output(STUDENT), output(TEACHER)
    for entry in [*answers[0].features, answers[0].embedding]:
        entry.requires_grad_()
    return Batch(*answers, torch.zeros(size, dtype=torch.int64), torch.arange(size), Progress(epoch, 40, 1, 120))


# The slow implementation: plain Python on nested lists [B][c][h][w], one number at a time.


def slow_convolution(maps, weight, bias=None):
    """Side 1 or 3, zeros around, the size stays."""
    reach = len(weight[0][0]) // 2
    height, width = len(maps[0][0]), len(maps[0][0][0])
    out = []
    for image in maps:
        channels = []
        for at, filters in enumerate(weight):
            rows = []
            for i in range(height):
                row = []
                for j in range(width):
                    total = 0.0 if bias is None else bias[at]
                    for channel, kernel in zip(image, filters, strict=True):
                        for di in range(-reach, reach + 1):
                            for dj in range(-reach, reach + 1):
                                if 0 <= i + di < height and 0 <= j + dj < width:
                                    total += channel[i + di][j + dj] * kernel[di + reach][dj + reach]
                    row.append(total)
                rows.append(row)
            channels.append(rows)
        out.append(channels)
    return out


def slow_normalization(maps, weight, bias):
    """In training: by the mean and the variance over images and positions."""
    out = [[None] * len(maps[0]) for _ in maps]
    for channel in range(len(maps[0])):
        values = [value for image in maps for row in image[channel] for value in row]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
        for at, image in enumerate(maps):
            out[at][channel] = [
                [(value - mean) / deviation * weight[channel] + bias[channel] for value in row]
                for row in image[channel]
            ]
    return out


def slow_resize(maps, height, width):
    """The nearest neighbour."""
    old_height, old_width = len(maps[0][0]), len(maps[0][0][0])
    return [
        [
            [[channel[i * old_height // height][j * old_width // width] for j in range(width)] for i in range(height)]
            for channel in image
        ]
        for image in maps
    ]


def slow_layer(maps, layer):
    convolution, normalization = layer
    maps = slow_convolution(maps, convolution.weight.tolist())
    return slow_normalization(maps, normalization.weight.tolist(), normalization.bias.tolist())


def slow_fusion(student, behind, fusion, height, width):
    joint = slow_layer(student, fusion.reduce)
    if behind is not None:
        behind = slow_resize(behind, len(joint[0][0]), len(joint[0][0][0]))
        both = [[*own, *other] for own, other in zip(joint, behind, strict=True)]
        scores = slow_convolution(both, fusion.attention.weight.tolist(), fusion.attention.bias.tolist())
        for own, other, score in zip(joint, behind, scores, strict=True):
            for channel, second in zip(own, other, strict=True):
                for i, row in enumerate(channel):
                    for j, value in enumerate(row):
                        first_weight, second_weight = (1 / (1 + math.exp(-plane[i][j])) for plane in score)
                        row[j] = value * first_weight + second[i][j] * second_weight
    joint = slow_resize(joint, height, width)
    return slow_layer(joint, fusion.expand), joint


def slow_pool(plane, side):
    """Averages over side x side overlapping windows, as adaptive pooling defines them."""
    height, width = len(plane), len(plane[0])
    out = []
    for i in range(side):
        rows = range(i * height // side, -(-(i + 1) * height // side))
        out.append([])
        for j in range(side):
            columns = range(j * width // side, -(-(j + 1) * width // side))
            window = [plane[row][column] for row in rows for column in columns]
            out[-1].append(sum(window) / len(window))
    return out


def slow_context_loss(student, teacher):
    def difference(side):
        squares = []
        for own, other in zip(student, teacher, strict=True):
            for plane, second in zip(own, other, strict=True):
                if side is not None:
                    plane, second = slow_pool(plane, side), slow_pool(second, side)
                for row, other_row in zip(plane, second, strict=True):
                    squares += [(a - b) ** 2 for a, b in zip(row, other_row, strict=True)]
        return sum(squares) / len(squares)

    height, width = len(student[0][0]), len(student[0][0][0])
    sides = [None] + [side for side in (4, 2, 1) if side < height and side < width]
    weights = [0.5**at for at in range(len(sides))]
    return sum(weight * difference(side) for weight, side in zip(weights, sides, strict=True)) / sum(weights)


def slow_reviewkd(method, student_levels, teacher_levels):
    """Unweighted: the levels first to last, without the student's surplus first one."""
    loss, behind = 0.0, None
    for fusion, student, teacher in reversed([*zip(method.fusions, student_levels, teacher_levels, strict=True)]):
        review, behind = slow_fusion(student, behind, fusion, len(teacher[0][0]), len(teacher[0][0][0]))
        loss += slow_context_loss(review, teacher)
    return loss


def levels_of(output: Output, surplus: int) -> list:
    vector = [[[[value]] for value in row] for row in output.embedding.tolist()]
    return [*(entry.tolist() for entry in output.features[surplus:]), vector]


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 5), (4, 4), (3, 6), (2, 2), (1, 1), (2, 9)])
def test_the_context_loss_is_that_of_the_slow_implementation(size):
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, *size, generator=random, dtype=torch.float64)
    student.requires_grad_()
    loss = hierarchical_context_loss(student, teacher)
    assert loss.item() == pytest.approx(slow_context_loss(student.tolist(), teacher.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda entry: hierarchical_context_loss(entry, teacher), student)


def test_the_context_loss_weighs_the_levels_8_to_4_to_2_to_1():
    # A constant difference is the same at every level, one that averages out is there at full size alone.
    assert hierarchical_context_loss(torch.full((2, 3, 8, 8), 3.0), torch.zeros(2, 3, 8, 8)).item() == pytest.approx(9)
    checkered = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    loss = hierarchical_context_loss(checkered.expand(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    assert loss.item() == pytest.approx(8 / 15)


@pytest.mark.parametrize("max_mid_channels", [512, 4])
def test_the_loss_is_that_of_the_slow_implementation(max_mid_channels):
    method, example = reviewkd(max_mid_channels=max_mid_channels), batch()
    terms = method(example)
    assert list(terms) == ["reviewkd"]
    assert terms["reviewkd"].shape == ()
    assert terms["reviewkd"].dtype == torch.float64
    expected = slow_reviewkd(method, levels_of(example.student, 1), levels_of(example.teacher, 0))
    assert terms["reviewkd"].item() == pytest.approx(2.0 * expected, rel=1e-10)
    assert {fusion.reduce[0].out_channels for fusion in method.fusions} == {min(6, max_mid_channels)}


def test_gradients_are_the_slow_implementations_differences():
    method, example = reviewkd(), batch(size=2)
    method(example)["reviewkd"].backward()
    assert example.student.features[0].grad is None
    student, teacher = levels_of(example.student, 1), levels_of(example.teacher, 0)
    tensors = [*example.student.features[1:], example.student.embedding[:, :, None, None]]
    gradients = [entry.grad for entry in example.student.features[1:]]
    gradients.append(example.student.embedding.grad[:, :, None, None])
    for level, tensor in enumerate(tensors):
        for place in [(0, 0, 0, 0), tuple(side - 1 for side in tensor.shape)]:
            image, channel, i, j = place
            row = student[level][image][channel][i]
            kept, values = row[j], []
            for step in (1e-5, -1e-5):
                row[j] = kept + step
                values.append(2.0 * slow_reviewkd(method, student, teacher))
            row[j] = kept
            assert gradients[level][place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_deeper_level_reaches_those_before_it_and_not_the_other_way_round():
    method, example = reviewkd(), batch()
    reviews = []
    for fusion in method.fusions:
        fusion.register_forward_hook(lambda _module, _inputs, outputs: reviews.insert(0, outputs[0]))
    method(example)
    inputs = [*example.student.features[1:], example.student.embedding]
    for level, review in enumerate(reviews):
        # Not the sum, which batch normalisation keeps constant.
        gradients = torch.autograd.grad(review.pow(3).sum(), inputs, retain_graph=True, allow_unused=True)
        assert [entry is not None and bool(entry.abs().sum() > 0) for entry in gradients] == [
            at >= level for at in range(len(inputs))
        ]


@pytest.mark.parametrize(
    ("epoch", "warmup", "share"), [(1, 20, 0.05), (10, 20, 0.5), (20, 20, 1), (33, 20, 1), (1, 0, 1)]
)
def test_the_weight_rises_over_the_first_epochs(epoch, warmup, share):
    whole = reviewkd()(batch())["reviewkd"].item()
    found = reviewkd(warmup_epochs=warmup)(batch(epoch=epoch))["reviewkd"].item()
    assert found == pytest.approx(share * whole)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("cifar_resnet8", "cifar_resnet8x4"), ("cifar_resnet8", "resnet10t"), ("resnet10t", "vit_tiny_patch16_224")],
)
def test_any_pair_of_networks_goes_together_and_the_gradient_reaches_the_student(student, teacher):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    networks = [create_model(arch, num_classes=5, image_size=(32, 32), seed=0).train() for arch in (student, teacher)]
    taps = [
        Intermediates(network, (3, 32, 32), arch=arch)
        for network, arch in zip(networks, (student, teacher), strict=True)
    ]
    method = METHODS["reviewkd"](context(taps[0].shapes, taps[1].shapes), **KEYS)
    answers = [Output(*tap(images)) for tap in taps]
    answers[1].features = [entry.detach() for entry in answers[1].features]
    answers[1].embedding = answers[1].embedding.detach()
    example = Batch(*answers, torch.zeros(2, dtype=torch.int64), torch.arange(2), Progress(5, 40, 1, 120))
    loss = method(example)["reviewkd"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [parameter.grad for parameter in networks[0].parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    assert all(torch.isfinite(gradient).all() for gradient in [*gradients, *(p.grad for p in method.parameters())])
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


@pytest.mark.parametrize("change", [{"warmup_epochs": -1}, {"max_mid_channels": 0}])
def test_values_out_of_their_range_are_refused_by_name(change):
    (key,) = change
    with pytest.raises(ConfigError, match=rf"method\.reviewkd\.{key} = "):
        reviewkd(**change)
