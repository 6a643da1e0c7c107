"""Contrastive representation distillation: its loss, its memories, its draws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from vkd.errors import ConfigError
from vkd.methods import METHODS, Batch, MethodContext, Output, Progress, make_method
from vkd.models import FeatureShapes

# Uneven, in no order, and class 3 has no image.
LABELS = [2, 0, 1, 1, 0, 2, 2, 4, 0, 2, 1, 2]
STUDENT_SIZE, TEACHER_SIZE = 5, 6
KEYS = {"weight": 0.8, "embedding_size": 4, "negatives": 5, "temperature": 0.3, "momentum": 0.5}


def context(labels: list[int] | None = LABELS, seed: int = 0) -> MethodContext:
    return MethodContext(
        divergence=None,
        num_classes=5,
        train_size=len(LABELS) if labels is None else len(labels),
        epochs=2,
        steps_per_epoch=4,
        student=nn.Identity(),
        teacher=nn.Identity(),
        image_shape=(3, 8, 8),
        generator=torch.Generator().manual_seed(seed),
        student_features=FeatureShapes(((4, 8, 8),), STUDENT_SIZE),
        teacher_features=FeatureShapes(((8, 4, 4),), TEACHER_SIZE),
        train_targets=None if labels is None else torch.tensor(labels),
    )


def crd(labels: list[int] | None = LABELS, seed: int = 0, **changes) -> nn.Module:
    """The method itself, in float64."""
    torch.manual_seed(seed)
    return METHODS["crd"](context(labels, seed), **{**KEYS, **changes}).double()


def batch(indices: list[int], seed: int = 0, labels: list[int] = LABELS) -> Batch:
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(len(indices), STUDENT_SIZE, generator=random, dtype=torch.float64)
    teacher = torch.randn(len(indices), TEACHER_SIZE, generator=random, dtype=torch.float64)
    logits = torch.zeros(len(indices), 5)
    return Batch(
        Output(logits, [], student.requires_grad_()),
        Output(logits, [], teacher),
        torch.tensor([labels[index] for index in indices]),
        torch.tensor(indices),
        Progress(1, 2, 1, 8),
    )


def next_negatives(method: nn.Module, targets: torch.Tensor) -> list[list[int]]:
    """What the method will draw next; it draws it all the same."""
    before = method.generator.get_state()
    drawn = method.draw_negatives(targets).tolist()
    method.generator.set_state(before)
    return drawn


class Slow:
    """The same in plain Python: one number at a time, probabilities themselves, as the paper writes them."""

    def __init__(self, method: nn.Module) -> None:
        self.layers = [
            (layer.weight.tolist(), layer.bias.tolist())
            for layer in (method.student_embedding, method.teacher_embedding)
        ]
        self.memories = [method.student_memory.tolist(), method.teacher_memory.tolist()]
        self.constants = None

    @staticmethod
    def on_sphere(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(value**2 for value in vector))
        return [value / length for value in vector]

    def embedded(self, network: int, vector: list[float]) -> list[float]:
        weight, bias = self.layers[network]
        linear = [sum(w * x for w, x in zip(row, vector, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        return self.on_sphere(linear)

    def loss(self, vectors: list[list[list[float]]], indices: list[int], negatives: list[list[int]]) -> float:
        exponentials = []
        for network in (0, 1):
            rows = []
            for vector, index, others in zip(vectors[network], indices, negatives, strict=True):
                anchor = self.embedded(network, vector)
                memory = self.memories[1 - network]
                products = [sum(a * b for a, b in zip(anchor, memory[at], strict=True)) for at in [index, *others]]
                rows.append([math.exp(product / KEYS["temperature"]) for product in products])
            exponentials.append(rows)
        if self.constants is None:
            flat = [[value for row in rows for value in row] for rows in exponentials]
            self.constants = [len(LABELS) * sum(values) / len(values) for values in flat]
        total = 0.0
        noise = len(negatives[0]) / len(LABELS)
        for rows, constant in zip(exponentials, self.constants, strict=True):
            for row in rows:
                positive, *rest = (value / constant for value in row)
                total -= math.log(positive / (positive + noise))
                total -= sum(math.log(noise / (value + noise)) for value in rest)
        return KEYS["weight"] * total / len(indices)

    def remember(self, vectors: list[list[list[float]]], indices: list[int]) -> None:
        for network in (0, 1):
            for vector, index in zip(vectors[network], indices, strict=True):
                new, old = self.embedded(network, vector), self.memories[network][index]
                self.memories[network][index] = self.on_sphere(
                    [0.5 * a + 0.5 * b for a, b in zip(old, new, strict=True)]
                )


def vectors_of(example: Batch) -> list[list[list[float]]]:
    return [example.student.embedding.tolist(), example.teacher.embedding.tolist()]


def test_loss_memories_and_constants_are_those_of_the_slow_implementation_step_by_step():
    method = crd()
    slow = Slow(method)
    for step, indices in enumerate([[3, 7, 0], [4, 3, 11, 8], [1, 2], [7, 3, 5]]):
        example = batch(indices, seed=step)
        negatives = next_negatives(method, example.targets)
        terms = method(example)
        assert list(terms) == ["crd"]
        assert terms["crd"].shape == ()
        assert terms["crd"].dtype == torch.float64
        assert terms["crd"].item() == pytest.approx(slow.loss(vectors_of(example), indices, negatives), rel=1e-12)
        slow.remember(vectors_of(example), indices)
        for memory, expected in zip((method.student_memory, method.teacher_memory), slow.memories, strict=True):
            torch.testing.assert_close(memory, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        constants = method.log_normalizers.exp().tolist()
        assert constants == pytest.approx(slow.constants, rel=1e-12)


def test_gradients_are_the_slow_implementations_differences():
    method = crd()
    slow = Slow(method)
    first = batch([3, 7, 0])
    slow.loss(vectors_of(first), [3, 7, 0], next_negatives(method, first.targets))
    slow.remember(vectors_of(first), [3, 7, 0])
    method(first)
    indices = [4, 3, 11]
    example = batch(indices, seed=1)
    negatives = next_negatives(method, example.targets)
    method(example)["crd"].backward()
    vectors = vectors_of(example)

    def slope(numbers: list[float], at: int) -> float:
        kept = numbers[at]
        values = []
        for step in (1e-5, -1e-5):
            numbers[at] = kept + step
            values.append(slow.loss(vectors, indices, negatives))
        numbers[at] = kept
        return (values[0] - values[1]) / 2e-5

    def slopes(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([[slope(row, at) for at in range(len(row))] for row in rows], dtype=torch.float64)

    torch.testing.assert_close(example.student.embedding.grad, slopes(vectors[0]), rtol=1e-6, atol=1e-8)
    for layer, (weight, bias) in zip((method.student_embedding, method.teacher_embedding), slow.layers, strict=True):
        torch.testing.assert_close(layer.weight.grad, slopes(weight), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(layer.bias.grad, slopes([bias])[0], rtol=1e-6, atol=1e-8)


def test_only_the_linear_layers_are_trained_and_memories_have_no_gradient():
    method = crd()
    assert {name for name, _ in method.named_parameters()} == {
        f"{network}_embedding.{part}" for network in ("student", "teacher") for part in ("weight", "bias")
    }
    method(batch([3, 7, 0]))["crd"].backward()
    for buffer in method.buffers():
        assert not buffer.requires_grad
        assert buffer.grad_fn is None


def test_the_memory_changes_at_the_batchs_images_alone_and_stays_on_the_sphere():
    method = crd(momentum=0.25)
    before = method.teacher_memory
    old = before[[4, 9]]
    example = batch([4, 9])
    new = nn.functional.normalize(method.teacher_embedding(example.teacher.embedding), dim=1)
    method(example)
    expected = 0.25 * old + 0.75 * new
    torch.testing.assert_close(method.teacher_memory[[4, 9]], expected / expected.norm(dim=1, keepdim=True))
    others = [index for index in range(len(LABELS)) if index not in (4, 9)]
    assert torch.equal(method.teacher_memory[others], before[others])


def test_negatives_are_uniform_over_all_images_of_other_classes():
    method = crd(negatives=4)
    targets = torch.tensor([0, 1, 2, 4] * 5000)
    drawn = method.draw_negatives(targets)
    assert drawn.shape == (20000, 4)
    for label in (0, 1, 2, 4):
        counts = torch.bincount(drawn[targets == label].flatten(), minlength=len(LABELS)).tolist()
        allowed = [count for count, other in zip(counts, LABELS, strict=True) if other != label]
        assert sum(allowed) == sum(counts) == 20000
        expected = 20000 / len(allowed)
        chi_square = sum((count - expected) ** 2 / expected for count in allowed)
        # For 6 to 10 degrees of freedom values above 36 come up once in ten thousand times at most; the seed is fixed.
        assert chi_square < 36


def test_there_are_no_more_negatives_than_images_outside_the_largest_class():
    assert crd(negatives=16384).negatives == 7
    assert crd(negatives=3).negatives == 3
    method = crd(negatives=16384)
    assert torch.isfinite(method(batch([3, 7, 0]))["crd"])


def test_a_run_repeats_and_another_seed_draws_other_images():
    def drawn_and_losses(seed: int) -> tuple[list[list[int]], list[float]]:
        method = make_method({"crd": KEYS}, context(), seed).double()
        steps = [batch(indices, seed=at) for at, indices in enumerate([[3, 7], [0, 3], [7, 1]])]
        losses = [method(example)["crd"].item() for example in steps]
        return method.methods["crd"].draw_negatives(torch.tensor([0, 1, 2])).tolist(), losses

    torch.manual_seed(5)
    first = drawn_and_losses(1)
    torch.manual_seed(6)
    assert drawn_and_losses(1) == first
    drawn, losses = drawn_and_losses(2)
    assert drawn != first[0]
    assert losses != first[1]


def test_a_resumed_run_goes_on_exactly():
    method = crd()
    method(batch([3, 7, 0]))
    state, draws = copy.deepcopy(method.state_dict()), method.generator.get_state()
    expected = [method(batch(indices, seed=3))["crd"].item() for indices in ([3, 1], [2, 3])]
    resumed = crd(seed=9)
    resumed(batch([5, 6]))
    resumed.load_state_dict(state)
    resumed.generator.set_state(draws)
    assert [resumed(batch(indices, seed=3))["crd"].item() for indices in ([3, 1], [2, 3])] == expected


def test_the_checkpoint_holds_memories_and_constants_but_no_labels():
    assert set(crd().state_dict()) == {
        "student_memory",
        "teacher_memory",
        "log_normalizers",
        *(f"{network}_embedding.{part}" for network in ("student", "teacher") for part in ("weight", "bias")),
    }


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_it_is_finite_in_float32_at_the_published_temperature_and_far_below(scale):
    for temperature in (0.07, 1e-3):
        torch.manual_seed(0)
        method = METHODS["crd"](context(), **{**KEYS, "temperature": temperature})
        for step in range(3):
            example = batch([3, 7, 0], seed=step)
            student = (example.student.embedding.detach() * scale).float().requires_grad_()
            example.student.embedding, example.teacher.embedding = student, example.teacher.embedding.float()
            loss = method(example)["crd"]
            loss.backward()
            assert loss.dtype == torch.float32
            assert torch.isfinite(loss)
            assert torch.isfinite(student.grad).all()


def test_training_brings_an_image_nearer_to_itself_in_the_other_network_than_to_others():
    method = crd(temperature=0.2)

    def margin() -> float:
        products = method.student_memory @ method.teacher_memory.T
        different = torch.tensor(LABELS)[:, None] != torch.tensor(LABELS)
        return (products.diagonal().mean() - products[different].mean()).item()

    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9)
    assert margin() < 0.3
    for _ in range(60):
        optimizer.zero_grad()
        method(batch(list(range(len(LABELS)))))["crd"].backward()
        optimizer.step()
    assert margin() > 0.6


@pytest.mark.parametrize(
    ("labels", "words"), [(None, "the training images have no labels"), ([1, 1, 1], "all training images are of one")]
)
def test_images_without_labels_or_of_one_class_are_refused(labels, words):
    with pytest.raises(ConfigError, match=words):
        crd(labels)


@pytest.mark.parametrize(
    "change", [{"negatives": 0}, {"embedding_size": 0}, {"temperature": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}]
)
def test_values_out_of_their_range_are_refused_by_name(change):
    (key,) = change
    with pytest.raises(ConfigError, match=rf"method\.crd\.{key} = "):
        crd(**change)
