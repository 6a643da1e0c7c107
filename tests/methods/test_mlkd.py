"""Multi-level distillation: a slow second implementation, what the masks choose, which view is compared when."""

from __future__ import annotations

import math

import pytest
import torch
from logit_cases import DIVERGENCES, batch, divergence, method, plain_divergence, random_logits

from vkd.errors import ConfigError
from vkd.methods import Output

TEMPERATURES = [2.0, 3.0, 4.0, 5.0, 6.0]


def softened(rows: list[list[float]], temperature: float) -> list[list[float]]:
    exponentials = [[math.exp(value / temperature) for value in row] for row in rows]
    return [[value / sum(row) for value in row] for row in exponentials]


def quantile(values: list[float], share: float) -> float:
    """The linearly interpolated quantile."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def slow(name, views, temperatures, share):
    """The three sums, one number after the other; views are (student, teacher) logits, the weak one first."""
    teacher = softened(views[0][1].tolist(), 1.0)
    size, classes = len(teacher), len(teacher[0])
    confidences = [max(row) for row in teacher]
    presences = [sum(row[k] for row in teacher) for k in range(classes)]
    samples = [i for i in range(size) if confidences[i] <= quantile(confidences, share)]
    chosen = [k for k in range(classes) if presences[k] <= quantile(presences, share)]
    sums = {"prediction": 0.0, "batch": 0.0, "class": 0.0}
    for student_logits, teacher_logits in views:
        for temperature in temperatures:
            q, p = (softened(logits.tolist(), temperature) for logits in (student_logits, teacher_logits))
            for i in samples:
                pair = (torch.tensor(row[i], dtype=torch.float64) for row in (q, p))
                sums["prediction"] += temperature**2 * plain_divergence(name, *pair).item() / size
                for j in range(size):
                    relations = [sum(x[i][k] * x[j][k] for k in range(classes)) for x in (p, q)]
                    sums["batch"] += (relations[0] - relations[1]) ** 2 / size
            for k in chosen:
                for m in range(classes):
                    relations = [sum(x[i][k] * x[i][m] for i in range(size)) for x in (p, q)]
                    sums["class"] += (relations[0] - relations[1]) ** 2 / classes
    return sums, samples, chosen


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("size", "classes", "share"), [(7, 5, 0.5), (6, 8, 0.3), (5, 4, 1.0)])
def test_the_terms_are_those_of_a_slow_second_implementation(name, size, classes, share):
    logits = random_logits(4, size, classes, seed=size)
    views = [(logits[0], logits[1]), (logits[2], logits[3])]
    expected, samples, chosen = slow(name, views, TEMPERATURES, share)
    assert share == 1.0 or (0 < len(samples) < size and 0 < len(chosen) < classes)
    weights = {"prediction": 0.9, "batch": 2.0, "class": 3.0}
    subject = method(
        "mlkd", divergence(name, 7.0), quantile=share, **{f"{term}_weight": value for term, value in weights.items()}
    )
    terms = subject(batch(*views[0], further=views[1:]))
    assert list(terms) == ["prediction", "batch", "class"]
    for term, value in terms.items():
        assert value.item() == pytest.approx(weights[term] * expected[term], rel=1e-9)


def gradients(views, **changed) -> dict[str, list[torch.Tensor]]:
    """For each term its gradients by the weak and the strong student logits."""
    students = [student.clone().requires_grad_() for student, _ in views]
    pairs = list(zip(students, (teacher for _, teacher in views), strict=True))
    terms = method("mlkd", divergence("fkld"), **changed)(batch(*pairs[0], further=pairs[1:]))
    return {name: list(torch.autograd.grad(value, students, retain_graph=True)) for name, value in terms.items()}


def test_the_prediction_level_leaves_out_the_samples_that_the_teacher_is_sure_of_on_the_weak_view():
    logits = random_logits(4, 6, 10)
    sure = torch.tensor([0, 3, 4])
    logits[1][sure] = 0.0
    logits[1][sure, sure] = 50.0
    views = [(logits[0], logits[1]), (logits[2], logits[3])]
    for gradient in gradients(views)["prediction"]:
        assert gradient.any(dim=-1).tolist() == [False, True, True, False, False, True]
    for gradient in gradients(views, quantile=1.0)["prediction"]:
        assert gradient.any(dim=-1).all()


def test_every_level_learns_from_both_views_at_every_temperature():
    logits = random_logits(4, 6, 10)
    views = [(logits[0], logits[1]), (logits[2], logits[3])]
    single = [gradients(views, temperatures=[temperature]) for temperature in TEMPERATURES]
    for term, both in gradients(views).items():
        for view in (0, 1):
            assert all(part[term][view].any() for part in single)
            torch.testing.assert_close(both[view], sum(part[term][view] for part in single), rtol=1e-9, atol=1e-14)


def test_a_view_is_compared_with_the_teacher_on_the_same_view():
    weak_teacher, strong_teacher = random_logits(2, 6, 10)
    views = [(weak_teacher, weak_teacher), (strong_teacher, strong_teacher)]
    terms = method("mlkd")(batch(*views[0], further=views[1:]))
    assert all(value == 0 for value in terms.values())
    crossed = method("mlkd")(batch(weak_teacher, weak_teacher, further=[(weak_teacher, strong_teacher)]))
    assert all(value > 0 for value in crossed.values())


def test_views_that_another_method_asked_for_change_nothing():
    logits = random_logits(6, 6, 10)
    told = batch(*logits[:2], further=[tuple(logits[2:4])])
    expected = method("mlkd")(told)
    told.views.append((Output(logits[4]), Output(logits[5])))
    assert method("mlkd").views == 2
    assert method("mlkd")(told) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperatures": []}, r"method\.mlkd\.temperatures=\[\]"),
        ({"temperatures": [2.0, 0.0]}, r"temperatures=\[2\.0, 0\.0\]"),
        ({"temperatures": [2.0, math.inf]}, "temperatures=.*inf"),
        ({"temperatures": [math.nan]}, "temperatures=.*nan"),
        ({"quantile": 1.5}, r"method\.mlkd\.quantile=1\.5"),
        ({"quantile": -0.1}, r"method\.mlkd\.quantile=-0\.1"),
    ],
)
def test_values_out_of_range_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        method("mlkd", **changed)
