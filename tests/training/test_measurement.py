"""Every figure against numbers worked out in float64 without torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import CPU, TinyNetwork, toy_data

from vkd.data import Normalization
from vkd.training.measurement import FIGURES, Evaluator, Measurement, evaluation_mode, split_logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def by_hand(logits: np.ndarray, targets: np.ndarray, teacher: np.ndarray | None) -> dict[str, float | None]:
    """The figures of logits [N, C], one image after the other."""
    log_q = log_softmax(logits.astype(np.float64))
    count, classes = logits.shape
    confidence, predicted = np.exp(log_q.max(axis=1)), logits.argmax(axis=1)
    ece = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            accuracy = (predicted == targets)[inside].mean()
            ece += inside.mean() * abs(accuracy - confidence[inside].mean())
    ranks = [int((row > row[target]).sum()) for row, target in zip(logits, targets, strict=True)]
    figures = {
        "top1": 100 * np.mean(predicted == targets),
        "top5": 100 * np.mean([rank < 5 for rank in ranks]) if classes > 5 else None,
        "nll": -np.mean([log_q[row, targets[row]] for row in range(count)]),
        "ece": ece,
        "entropy": -np.mean((np.exp(log_q) * log_q).sum(axis=1)),
        "agreement": None,
        "teacher_kl": None,
    }
    if teacher is not None:
        log_p = log_softmax(teacher.astype(np.float64))
        figures["agreement"] = 100 * np.mean(predicted == teacher.argmax(axis=1))
        figures["teacher_kl"] = np.mean((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    return figures


def measured(logits, targets, teacher=None, *, batch_size: int = 1000) -> dict[str, float | None]:
    logits, targets = torch.as_tensor(logits), torch.as_tensor(targets)
    measurement = Measurement(logits.shape[1], with_teacher=teacher is not None, device=CPU)
    for start in range(0, len(targets), batch_size):
        part = slice(start, start + batch_size)
        measurement.add(logits[part], targets[part], None if teacher is None else torch.as_tensor(teacher)[part])
    return measurement.result()


def assert_figures(figures, expected, *, rel: float) -> None:
    """Equal within `rel`, and null in the same places."""
    assert list(figures) == list(expected)
    assert {name for name in figures if figures[name] is None} == {name for name in figures if expected[name] is None}
    numbers = {name: value for name, value in expected.items() if value is not None}
    assert {name: figures[name] for name in numbers} == pytest.approx(numbers, rel=rel, abs=1e-6)


def random_case(classes: int, count: int = 203, scale: float = 3.0, seed: int = 0):
    random = np.random.RandomState(seed)
    logits = (scale * random.randn(count, classes)).astype(np.float32)
    teacher = (logits + 2 * random.randn(count, classes)).astype(np.float32)
    return logits, random.randint(0, classes, count), teacher


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (5, 3.0), (6, 3.0), (10, 0.1), (100, 8.0), (10, 40.0)])
def test_every_figure_equals_the_one_worked_out_by_hand(classes, scale, with_teacher):
    logits, targets, teacher = random_case(classes, scale=scale)
    teacher = teacher if with_teacher else None
    assert tuple(measured(logits, targets, teacher)) == FIGURES
    assert_figures(measured(logits, targets, teacher), by_hand(logits, targets, teacher), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 202])
def test_the_batch_size_changes_nothing(batch_size):
    case = random_case(10)
    assert measured(*case, batch_size=batch_size) == pytest.approx(measured(*case), rel=1e-9)


def test_half_precision_logits_are_measured_in_float32():
    logits, targets, teacher = random_case(10)
    half = torch.from_numpy(logits).half()
    assert_figures(measured(half, targets, teacher), by_hand(half.float().numpy(), targets, teacher), rel=1e-5)


@pytest.mark.parametrize(("classes", "there"), [(2, False), (5, False), (6, True)])
def test_top5_is_null_where_five_guesses_are_all_of_them(classes, there):
    assert (measured(*random_case(classes))["top5"] is not None) == there


def test_without_a_teacher_its_figures_are_null():
    result = measured(*random_case(6)[:2])
    assert result["agreement"] is None
    assert result["teacher_kl"] is None


def test_a_network_agrees_with_itself_even_where_its_choice_hangs_on_the_last_digit():
    low = np.float32(0.1)
    logits = np.tile(np.array([low, np.nextafter(low, np.float32(1)), 0.0], dtype=np.float32), (4, 1))
    result = measured(logits, np.ones(4, dtype=np.int64), logits)
    assert result["agreement"] == 100
    assert result["top1"] == 100
    assert result["teacher_kl"] == 0


def two_way(confidence: float, count: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of three classes with one confidence, `right` of which are right."""
    rest = (1 - confidence) / 2
    logits = np.log(np.tile(np.array([confidence, rest, rest]), (count, 1)))
    return logits.astype(np.float32), np.array([0] * right + [1] * (count - right))


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    # 2/3 is the edge of (9/15, 10/15] and (10/15, 11/15]. All right at 2/3 and all wrong at 0.62 compensate each other
    # in one bin; in two they would not.
    edge, low = two_way(2 / 3, 3, 3), two_way(0.62, 3, 0)
    logits, targets = np.concatenate([edge[0], low[0]]), np.concatenate([edge[1], low[1]])
    assert measured(logits, targets)["ece"] == pytest.approx(abs(0.5 - (2 / 3 + 0.62) / 2), abs=1e-6)
    high = two_way(0.7, 3, 0)
    logits, targets = np.concatenate([edge[0], high[0]]), np.concatenate([edge[1], high[1]])
    assert measured(logits, targets)["ece"] == pytest.approx((abs(1 - 2 / 3) + 0.7) / 2, abs=1e-6)


def test_equal_logits_of_three_classes_lie_in_the_bin_that_ends_at_a_third():
    flat = np.zeros((3, 3), dtype=np.float32), np.zeros(3, dtype=np.int64)
    assert measured(*flat)["ece"] == pytest.approx(2 / 3, abs=1e-6)
    assert measured(*flat)["entropy"] == pytest.approx(math.log(3), abs=1e-6)


def test_full_confidence_is_counted_in_the_last_bin():
    logits = np.array([[200.0, 0.0], [200.0, 0.0], [200.0, 0.0], [200.0, 0.0]], dtype=np.float32)
    result = measured(logits, np.array([0, 0, 0, 1]))
    assert result["ece"] == pytest.approx(0.25, abs=1e-6)
    assert result["nll"] == pytest.approx(50.0, abs=1e-4)


def test_perfect_calibration_has_no_error():
    parts = [two_way(0.75, 4, 3), two_way(0.4, 5, 2)]
    logits, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert measured(logits, targets)["ece"] == pytest.approx(0.0, abs=1e-6)


def test_evaluation_gives_every_module_its_own_mode_back_and_leaves_batch_norm_alone(data):
    model = TinyNetwork(dropout=0.5)
    model.train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluator = Evaluator(data, Normalization(0.5, 0.5, 3), teacher_logits={}, batch_size=4, device=CPU)
    first = evaluator(model)
    assert [module.training for module in (model, model.conv, model.norm, model.dropout)] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Dropout was off.
    assert evaluator(model) == first


def test_modes_come_back_when_measuring_fails():
    model = TinyNetwork().train()

    def measure():
        with evaluation_mode(model):
            assert not model.norm.training
            assert not torch.is_grad_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        measure()
    assert model.norm.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_evaluator_measures_the_images_of_each_split(data, batch_size):
    model, other = TinyNetwork(1).eval(), TinyNetwork(2).eval()
    normalization = Normalization(data.mean, data.std, 3)
    teacher = {split: split_logits(other, data, split, normalization, batch_size=3)[0] for split in ("val", "test")}
    evaluator = Evaluator(data, normalization, teacher_logits=teacher, batch_size=batch_size, device=CPU)
    mean = np.array(data.mean).reshape(3, 1, 1)
    std = np.array(data.std).reshape(3, 1, 1)
    expected = {}
    for split in ("val", "test"):
        pixels = (data.images(split).numpy() / 255 - mean) / std
        with torch.no_grad():
            logits, teachers = (net(torch.from_numpy(pixels).float()).numpy() for net in (model, other))
        figures = by_hand(logits, data.targets(split).numpy(), teachers)
        expected.update({f"{split}/{name}": value for name, value in figures.items()})
    assert_figures(evaluator(model), expected, rel=1e-4)


def test_a_split_that_is_not_there_has_null_figures(tmp_path):
    data = toy_data(tmp_path, val_fraction=0)
    evaluator = Evaluator(data, Normalization(0.5, 0.5, 3), teacher_logits={}, batch_size=4, device=CPU)
    figures = evaluator(TinyNetwork())
    assert {figures[f"val/{name}"] for name in FIGURES} == {None}
    assert figures["test/top1"] is not None
