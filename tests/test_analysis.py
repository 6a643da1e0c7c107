"""The analysis of a step against 50-digit arithmetic, plain loops, and the propositions of the paper."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd.analysis import (
    FORWARD_KL,
    REVERSE_KL,
    STATISTICS,
    AlphaBeta,
    as_alpha_beta,
    class_groups,
    confidence,
    confidence_preference,
    divergence_gradient,
    effective_classes,
    gradient_shares,
    hardness,
    image_statistics,
    log_mass_ratio,
    log_softmax,
    logit_gradient,
    mass_ratio_bound,
)
from vkd.divergences import make_divergence

ORDINARY = [(0.8, 0.3), (0.5, 0.5), (1.0, 1.0), (1.2, -0.3), (-0.4, 1.3), (-0.5, -0.2), (0.3, 2.0)]
SINGULAR = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.7, 0.0), (0.0, 0.6), (0.5, -0.5), (-1.0, 1.0), (1e-9, 0.4)]
points = pytest.mark.parametrize(("alpha", "beta"), ORDINARY + SINGULAR)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_logits(count, classes, scale=3.0, seed=0):
    """Student's and teacher's logits [count, classes] and labels [count]."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(count, classes, generator=random, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, classes, (count,), generator=random)


def exact_softmax(logits, temperature):
    """Softmax in mpmath."""
    powers = [mpmath.exp(mpmath.mpf(z) / mpmath.mpf(temperature)) for z in logits]
    total = mpmath.fsum(powers)
    return [power / total for power in powers]


def exact_divergence(logits, teacher_logits, alpha, beta, temperature):
    """The alpha-beta divergence by its definition, and by its limits where that has none, in mpmath."""
    p, q = exact_softmax(teacher_logits, temperature), exact_softmax(logits, temperature)
    a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
    pairs = list(zip(p, q, strict=True))
    if a == 0 and b == 0:
        return mpmath.fsum((mpmath.log(x) - mpmath.log(y)) ** 2 for x, y in pairs) / 2
    if b == 0:
        return mpmath.fsum(x**a * mpmath.log(x**a / y**a) - x**a + y**a for x, y in pairs) / a**2
    if a == 0:
        return mpmath.fsum(y**b * mpmath.log(y**b / x**b) - y**b + x**b for x, y in pairs) / b**2
    if a + b == 0:
        return mpmath.fsum(mpmath.log(y**a / x**a) + (x / y) ** a - 1 for x, y in pairs) / a**2
    s = a + b
    return -mpmath.fsum(x**a * y**b - a / s * x**s - b / s * y**s for x, y in pairs) / (a * b)


def exact_gradient(logits, teacher_logits, alpha, beta, temperature):
    """Its derivatives by each logit: differences of the definition in 80 digits."""
    step = mpmath.mpf(10) ** -25
    with mpmath.workdps(80):
        found = []
        for place in range(len(logits)):
            ends = []
            for sign in (1, -1):
                moved = [mpmath.mpf(z) for z in logits]
                moved[place] += sign * step
                ends.append(exact_divergence(moved, teacher_logits, alpha, beta, temperature))
            found.append(float((ends[0] - ends[1]) / (2 * step)))
        return found


# The gradient


@points
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_closed_gradient_is_that_of_autograd(alpha, beta, temperature):
    student, teacher, _ = random_logits(20, 30)
    leaf = student.clone().requires_grad_()
    divergence = make_divergence("abkd", alpha=alpha, beta=beta, temperature=temperature, match_kl_scale=True)
    (expected,) = torch.autograd.grad(divergence(leaf, teacher, reduction="sum"), leaf)
    member = as_alpha_beta(divergence, 30)
    assert member.factor == pytest.approx(30 ** (alpha + beta - 1))
    found = logit_gradient(student, teacher, member, temperature=temperature)
    assert ((found - expected).abs() / expected.abs().amax(dim=-1, keepdim=True)).max() < 1e-12


@points
def test_the_closed_gradient_is_the_derivative_of_the_definition_in_many_digits(alpha, beta):
    student, teacher = [1.5, -2.0, 0.25, 3.0, -0.5], [0.5, 2.5, -3.0, 1.0, 0.0]
    found = logit_gradient(tensor([student]), tensor([teacher]), AlphaBeta(alpha, beta), temperature=2.5)[0]
    expected = exact_gradient(student, teacher, alpha, beta, 2.5)
    assert found.tolist() == pytest.approx(expected, rel=1e-11, abs=1e-13 * max(map(abs, expected)))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.8, 0.3), (0.0, 0.0), (0.2, 0.1)])
def test_probabilities_of_a_hundredth_of_a_googol_keep_their_digits(alpha, beta):
    student, teacher = [0.0, -230.0, -5.0, -231.0], [-229.0, 0.0, -4.0, -300.0]
    found = logit_gradient(tensor([student]), tensor([teacher]), AlphaBeta(alpha, beta))[0]
    expected = exact_gradient(student, teacher, alpha, beta, 1.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_a_divergence_beyond_the_family_has_the_gradient_of_small_differences():
    student, teacher, _ = random_logits(4, 6)
    for name, parameters in [("js", {}), ("skew_fkld", {"skew": 0.2}), ("tvd", {})]:
        divergence = make_divergence(name, temperature=3.0, **parameters)
        assert as_alpha_beta(divergence, 6) is None
        found = divergence_gradient(divergence, student, teacher)
        for place in range(6):
            moved = torch.zeros_like(student)
            moved[:, place] = 1e-5
            ends = [divergence(student + sign * moved, teacher, reduction="none") for sign in (1, -1)]
            assert torch.allclose(found[:, place], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_the_size_of_the_weight_is_hardness_times_confidence():
    student, teacher, _ = random_logits(10, 12)
    p, q = (torch.softmax(logits / 2.0, dim=-1).tolist() for logits in (teacher, student))
    for alpha, beta in [(0.8, 0.3), (0.0, 0.5), (-0.5, 0.2), (1.0, 0.0)]:
        hard = hardness(student, teacher, alpha=alpha, temperature=2.0)
        sure = confidence(student, beta=beta, temperature=2.0)
        weights = []
        for row in range(10):
            for k in range(12):
                a, b = p[row][k], q[row][k]
                size = abs(a**alpha - b**alpha) / abs(alpha) if alpha else abs(math.log(a) - math.log(b))
                assert float(hard[row, k]) == pytest.approx(size, rel=1e-9)
                assert float(sure[row, k]) == pytest.approx(b**beta, rel=1e-12)
                weights.append(math.copysign(size * b**beta, b - a))
        weight = tensor(weights).reshape(10, 12)
        expected = (weight - tensor(q) * weight.sum(dim=-1, keepdim=True)) / 2.0
        found = logit_gradient(student, teacher, AlphaBeta(alpha, beta), temperature=2.0)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


# One step


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ORDINARY + SINGULAR), st.floats(0.5, 8), st.floats(1e-6, 30))
def test_the_log_mass_ratio_is_what_the_step_does_to_the_softmax(seed, point, temperature, rate):
    student, teacher, _ = random_logits(3, 7, seed=seed)
    gradient = logit_gradient(student, teacher, AlphaBeta(*point), temperature=temperature)
    ratio = log_mass_ratio(student, gradient, rate=rate, temperature=temperature)
    after = torch.log_softmax((student - rate * gradient) / temperature, dim=-1)
    expected = after - torch.log_softmax(student / temperature, dim=-1)
    assert torch.allclose(ratio.total, expected, rtol=1e-9, atol=1e-11 * float(1 + (rate * gradient).abs().max()))
    assert torch.allclose(ratio.own, -rate * gradient / temperature, rtol=1e-15)
    assert ratio.shared.shape == (3, 1)
    naive = ratio.total.abs() - ratio.shared.abs()
    assert torch.allclose(ratio.excess, naive, rtol=1e-9, atol=1e-12 * float(1 + ratio.own.abs().max()))


def test_a_step_of_no_gradient_moves_nothing():
    student, _, _ = random_logits(4, 5)
    ratio = log_mass_ratio(student, logit_gradient(student, student, REVERSE_KL), rate=1.0)
    assert ratio.shared.abs().max() == 0
    assert ratio.total.abs().max() == 0


def test_the_excess_keeps_the_digits_that_the_shared_part_takes():
    ratio = log_mass_ratio(tensor([[0.0, -60.0, 0.5]]), tensor([[1.0, 1e-25, -1.0]]), rate=0.5)
    assert ratio.shared.abs().max() > 0.01
    assert abs(float(ratio.excess[0, 1])) == pytest.approx(0.5e-25, rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.one_of(st.sampled_from(ORDINARY + SINGULAR), st.tuples(st.floats(-1.5, 2), st.floats(-1.5, 2))),
    st.sampled_from([1.0, 2.0, 4.0, 0.5]),
    st.floats(1e-3, 10),
    st.sampled_from([0.01, 1.0, 5.0, 30.0]),
)
def test_no_class_moves_further_than_the_propositions_allow(seed, point, temperature, rate, scale):
    student, teacher, _ = random_logits(4, 6, scale=scale, seed=seed)
    member = AlphaBeta(*point, factor=0.7)
    gradient = logit_gradient(student, teacher, member, temperature=temperature)
    excess = log_mass_ratio(student, gradient, rate=rate, temperature=temperature).excess
    bound = mass_ratio_bound(student, teacher, member, rate=rate, temperature=temperature)
    assert (excess <= bound * (1 + 1e-9)).all()


def test_the_bounds_are_those_of_the_paper_with_the_rate_over_the_square_of_the_temperature():
    student, teacher, _ = random_logits(5, 8)
    temperature, rate = 4.0, 0.3
    p, q = (torch.softmax(logits / temperature, dim=-1).tolist() for logits in (teacher, student))
    eta = rate / temperature**2

    def bound(member):
        return mass_ratio_bound(student, teacher, member, rate=rate, temperature=temperature)

    forward, reverse, alpha_beta = bound(FORWARD_KL), bound(REVERSE_KL), bound(AlphaBeta(0.8, 0.3))
    for a, b, *found in zip(p, q, forward, reverse, alpha_beta, strict=True):
        logs = [abs(math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True)]
        powers = [abs((x**0.8 - y**0.8) / 0.8) * y**0.3 for x, y in zip(a, b, strict=True)]
        mean_log = sum(y * size for y, size in zip(b, logs, strict=True))
        expected = [
            [eta * abs(x - y) for x, y in zip(a, b, strict=True)],
            [eta * y * (size + mean_log) for y, size in zip(b, logs, strict=True)],
            [eta * (size + y * sum(powers)) for y, size in zip(b, powers, strict=True)],
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.tolist() == pytest.approx(theirs, rel=1e-10)


def test_a_factor_scales_gradient_and_bound_alike():
    student, teacher, _ = random_logits(5, 8)
    for point in [(1.0, 0.0), (0.8, 0.3), (0.0, 0.0)]:
        plain, scaled = AlphaBeta(*point), AlphaBeta(*point, factor=0.7)
        for function in (logit_gradient, lambda *pair: mass_ratio_bound(*pair, rate=0.1)):
            assert torch.allclose(function(student, teacher, scaled), 0.7 * function(student, teacher, plain))


def test_forward_kl_moves_each_class_by_all_that_its_bound_allows_at_any_temperature():
    student, teacher, _ = random_logits(6, 9)
    for temperature in (1.0, 4.0):
        gradient = logit_gradient(student, teacher, FORWARD_KL, temperature=temperature)
        ratio = log_mass_ratio(student, gradient, rate=0.2, temperature=temperature)
        bound = mass_ratio_bound(student, teacher, FORWARD_KL, rate=0.2, temperature=temperature)
        assert torch.allclose((ratio.total - ratio.shared).abs(), bound, rtol=1e-9)


@pytest.mark.parametrize("member", [REVERSE_KL, AlphaBeta(0.8, 0.3), AlphaBeta(0.5, 0.0)])
def test_the_bound_is_reached_by_a_class_without_mass_that_alone_is_under_estimated(member):
    student, teacher = tensor([[-40.0, 1.0, 1.0, 1.0]]), tensor([[1.0, 0.0, 0.0, 0.0]])
    gradient = logit_gradient(student, teacher, member, temperature=2.0)
    excess = log_mass_ratio(student, gradient, rate=0.1, temperature=2.0)
    bound = mass_ratio_bound(student, teacher, member, rate=0.1, temperature=2.0)
    assert float(excess.own.abs()[0, 0] / bound[0, 0]) == pytest.approx(1.0, abs=1e-6)


def test_a_loss_times_the_square_of_the_temperature_steps_as_at_temperature_1():
    student, teacher, _ = random_logits(5, 8)
    for member in (FORWARD_KL, REVERSE_KL, AlphaBeta(0.8, 0.3)):
        plain = log_mass_ratio(student, logit_gradient(student, teacher, member), rate=0.2)
        hot = logit_gradient(4 * student, 4 * teacher, member, temperature=4.0)
        softened = log_mass_ratio(4 * student, hot, rate=0.2 * 16, temperature=4.0)
        assert torch.allclose(plain.total, softened.total, rtol=1e-10)


# Theorem 3.2

_Q = [0.02, 0.05, 0.10, 0.13, 0.08, 0.12, 0.20, 0.30]
_WRONG = 0.015
"""How much too little the first four classes have, and the last four too much."""


def of_equally_wrong_classes(member):
    """Gradient, p - q and q of one image."""
    q = tensor([_Q])
    difference = tensor([[_WRONG] * 4 + [-_WRONG] * 4])
    return logit_gradient(q.log(), (q + difference).log(), member), difference, q


def test_forward_kl_treats_equally_wrong_classes_alike():
    gradient, difference, q = of_equally_wrong_classes(FORWARD_KL)
    ratio = log_mass_ratio(q.log(), gradient, rate=0.1).total[0].tolist()
    assert ratio[:4] == pytest.approx([ratio[0]] * 4, rel=1e-12)
    assert ratio[4:] == pytest.approx([ratio[4]] * 4, rel=1e-12)
    assert ratio[0] > 0 > ratio[4]
    for members in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4):
        assert confidence_preference(gradient, difference, q, torch.tensor([members])).tolist() == [0.0]


def test_reverse_kl_raises_the_surer_and_lowers_the_less_sure_of_equally_wrong_classes():
    gradient, difference, q = of_equally_wrong_classes(REVERSE_KL)
    ratio = log_mass_ratio(q.log(), gradient, rate=0.1).total[0].tolist()
    assert ratio[:4] == sorted(ratio[:4])
    assert ratio[0] < ratio[3]
    assert ratio[4:] == sorted(ratio[4:])
    assert ratio[4] < ratio[7] < 0
    for members in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4):
        assert confidence_preference(gradient, difference, q, torch.tensor([members])).item() > 0.8


def test_on_random_pairs_the_preference_is_0_for_forward_and_positive_for_reverse_kl():
    student, teacher, targets = random_logits(100, 40)
    for name, sign in (("fkld", 0), ("rkld", 1)):
        found = image_statistics(make_divergence(name, temperature=4.0), student, teacher, targets, rate=0.1)
        for group in ("under", "over"):
            values = found[f"preference/{group}"]
            assert values.abs().max() < 1e-6 if sign == 0 else (values > 0).double().mean() > 0.9


def test_the_preference_is_the_correlation_of_what_least_squares_leaves():
    student, teacher, targets = random_logits(12, 20, seed=3)
    gradient = logit_gradient(student, teacher, AlphaBeta(0.6, 0.5))
    p, q = torch.softmax(teacher, dim=-1), torch.softmax(student, dim=-1)
    under = class_groups(student, teacher, targets).under
    found = confidence_preference(gradient, p - q, q, under)
    for row in range(12):
        chosen = under[row].numpy()
        factors = np.stack([np.ones(chosen.sum()), (p - q)[row].numpy()[chosen]], axis=1)
        left = []
        for values in (-gradient[row].numpy()[chosen], q[row].numpy()[chosen]):
            fit, *_ = np.linalg.lstsq(factors, values, rcond=None)
            left.append(values - factors @ fit)
        if chosen.sum() < 4:
            assert math.isnan(found[row])
        else:
            assert float(found[row]) == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-6)


def test_no_preference_is_stated_where_there_is_nothing_to_compare():
    gradient, difference, q = of_equally_wrong_classes(REVERSE_KL)
    few = torch.tensor([[True] * 3 + [False] * 5])
    every = torch.ones(1, 8, dtype=torch.bool)
    assert confidence_preference(gradient, difference, q, few).isnan().all()
    assert confidence_preference(gradient, difference, torch.full_like(q, 0.125), every).isnan().all()
    assert confidence_preference(torch.zeros_like(q), difference, q, every).isnan().all()
    assert confidence_preference(gradient, -q, q, every).isnan().all()


# Where a gradient goes


def test_the_groups_are_every_class_once_and_shares_add_up_to_1():
    student, teacher, targets = random_logits(30, 11)
    groups = class_groups(student, teacher, targets, temperature=3.0)
    p, q = torch.softmax(teacher / 3.0, dim=-1), torch.softmax(student / 3.0, dim=-1)
    for row in range(30):
        for k in range(11):
            held = [name for name, members in groups.items() if members[row, k]]
            expected = "target" if k == targets[row] else "under" if q[row, k] < p[row, k] else "over"
            assert held == [expected]
    found = image_statistics(make_divergence("rkld", temperature=3.0), student, teacher, targets, rate=0.1)
    total = sum(found[f"share/{name}"] for name in ("target", "under", "over"))
    assert torch.allclose(total, torch.ones(30, dtype=torch.float64), rtol=1e-12)


def test_effective_classes_count_the_classes_that_share_equally():
    sizes = tensor([[0.0, -3.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0]])
    assert effective_classes(gradient_shares(sizes)).tolist() == pytest.approx([1.0, 2.0, 4.0])
    assert gradient_shares(torch.zeros(1, 4)).isnan().all()


@pytest.mark.parametrize("point", [(0.8, 0.3), (1.0, 0.0), (0.0, 0.0)])
def test_the_statistics_of_an_image_are_those_of_plain_loops(point):
    student, teacher, targets = random_logits(6, 9, seed=5)
    temperature, rate = 2.0, 0.1
    divergence = make_divergence("abkd", alpha=point[0], beta=point[1], temperature=temperature)
    found = image_statistics(divergence, student, teacher, targets, rate=rate)
    assert tuple(found) == STATISTICS
    for row in range(6):
        with mpmath.workdps(40):
            p = [float(x) for x in exact_softmax(teacher[row].tolist(), temperature)]
            q = [float(x) for x in exact_softmax(student[row].tolist(), temperature)]
            value = float(exact_divergence(student[row].tolist(), teacher[row].tolist(), *point, temperature))
        alpha, beta = point
        hard = [abs(x**alpha - y**alpha) / alpha if alpha else abs(math.log(x / y)) for x, y in zip(p, q, strict=True)]
        sure = [y**beta for y in q]
        weight = [math.copysign(h * s, y - x) for h, s, x, y in zip(hard, sure, p, q, strict=True)]
        gradient = [(w - y * sum(weight)) / temperature for w, y in zip(weight, q, strict=True)]
        size = sum(map(abs, gradient))
        target = int(targets[row])
        groups = {
            "target": [target],
            "under": [k for k in range(9) if k != target and q[k] < p[k]],
            "over": [k for k in range(9) if k != target and q[k] >= p[k]],
        }
        shares = [abs(g) / size for g in gradient]
        expected = {
            "divergence": value,
            "effective_classes": math.exp(-sum(share * math.log(share) for share in shares)),
        }
        for name, members in groups.items():
            expected[f"share/{name}"] = sum(shares[k] for k in members)
            expected[f"hardness/{name}"] = sum(hard[k] for k in members) / len(members)
            expected[f"confidence/{name}"] = sum(sure[k] for k in members) / len(members)
        moved = [z - rate * temperature**2 * g for z, g in zip(student[row].tolist(), gradient, strict=True)]
        after = [float(x) for x in exact_softmax(moved, temperature)]
        own = [-rate * temperature * g for g in gradient]
        shared = math.log(after[0] / q[0]) - own[0]
        plain = [rate * (abs(w) + y * sum(map(abs, weight))) for w, y in zip(weight, q, strict=True)]
        bounds = [rate * abs(x - y) for x, y in zip(p, q, strict=True)] if point == (1.0, 0.0) else plain
        ratios = [(abs(math.log(a / y)) - abs(shared)) / bound for a, y, bound in zip(after, q, bounds, strict=True)]
        expected["bound"] = max(0.0, *ratios)
        for name, number in expected.items():
            assert float(found[name][row]) == pytest.approx(number, rel=1e-8), name


def test_beyond_the_family_hardness_confidence_and_bound_are_left_out():
    student, teacher, targets = random_logits(5, 6)
    found = image_statistics(make_divergence("js"), student, teacher, targets, rate=0.1)
    assert set(STATISTICS) - set(found) == {
        "bound",
        *(f"{factor}/{group}" for factor in ("hardness", "confidence") for group in ("target", "under", "over")),
    }


@pytest.mark.parametrize("point", [(1.0, 0.0), (0.0, 1.0), (0.8, 0.3), (0.0, 0.0), (-1.0, 0.5), (-2.0, -3.0)])
@pytest.mark.parametrize("size", [1e-9, 200.0, 1e4])
def test_logits_of_any_size_give_finite_gradients_and_shares(point, size):
    student, teacher, targets = random_logits(8, 5, scale=size)
    divergence = make_divergence("abkd", alpha=point[0], beta=point[1])
    gradient = divergence_gradient(divergence, student, teacher)
    assert gradient.isfinite().all()
    found = image_statistics(divergence, student, teacher, targets, rate=0.1)
    total = sum(found[f"share/{name}"] for name in ("target", "under", "over"))
    # Of a student that is all but certain, reverse KL has a gradient below any float.
    assert torch.allclose(total[gradient.any(dim=-1)], tensor(1.0))
    assert (found["bound"] <= 1 + 1e-9).all()


def test_a_student_that_is_its_teacher_has_no_shares_and_no_preference():
    student, _, targets = random_logits(3, 6)
    found = image_statistics(make_divergence("rkld"), student, student.clone(), targets, rate=0.1)
    assert found["divergence"].tolist() == [0.0] * 3
    assert found["bound"].tolist() == [0.0] * 3
    for name in ("share/target", "share/over", "preference/over", "effective_classes"):
        assert found[name].isnan().all()


def test_the_log_softmax_keeps_its_digits_beside_1():
    found = log_softmax(tensor([[80.0, 0.0]]), 2.0)[0].tolist()
    with mpmath.workdps(50):
        expected = [float(mpmath.log(x)) for x in exact_softmax([80.0, 0.0], 2.0)]
    assert found == pytest.approx(expected, rel=1e-13)
