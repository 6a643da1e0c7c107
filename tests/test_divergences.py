"""The divergences against published values, 50-digit arithmetic, the laws they obey, and their contract."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import random
import typing
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from vkd import divergences
from vkd.divergences import (
    DIVERGENCES,
    Divergence,
    ab_divergence,
    forward_kl,
    jensen_shannon,
    make_divergence,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from vkd.errors import ConfigError

OFFICIAL = json.loads((Path(__file__).parent / "reference" / "official_losses.json").read_text())

# Every divergence, with parameters that reach each of its branches.
EVERY = [
    ("fkld", {}),
    ("rkld", {}),
    ("abkd", {"alpha": 0.8, "beta": 0.3}),
    ("abkd", {"alpha": 0.2, "beta": 0.1}),
    ("abkd", {"alpha": 0.0, "beta": 0.0}),
    ("abkd", {"alpha": 1.2, "beta": -0.3}),
    ("abkd", {"alpha": -0.4, "beta": 1.3}),
    ("abkd", {"alpha": -0.5, "beta": -0.2}),
    ("abkd", {"alpha": 0.7, "beta": 0.6, "match_kl_scale": True}),
    ("js", {}),
    ("skew_fkld", {}),
    ("skew_fkld", {"skew": 0.7}),
    ("skew_rkld", {}),
    ("skew_rkld", {"skew": 0.7}),
    ("tvd", {}),
]
BOUNDED_BELOW = [(name, parameters) for name, parameters in EVERY if min(parameters.values(), default=0) >= 0]
every = pytest.mark.parametrize(("name", "parameters"), EVERY)


def label(name: str, parameters: dict) -> str:
    return name + "".join(f"-{value}" for value in parameters.values())


def value_and_gradient(function, student_logits: Tensor, teacher_logits: Tensor, **arguments) -> tuple[Tensor, Tensor]:
    student_logits = student_logits.clone().requires_grad_()
    value = function(student_logits, teacher_logits, **arguments)
    (gradient,) = torch.autograd.grad(value.sum(), student_logits)
    return value.detach(), gradient


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2))


# ---------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "case", OFFICIAL["cases"], ids=lambda c: f"{c['method']}-{c.get('alpha')}-{c.get('beta')}-T{c['temperature']:g}"
)
def test_the_official_losses_and_gradients_are_reproduced(case, dtype, tolerance):
    student_logits = torch.tensor(OFFICIAL["student_logits"], dtype=dtype)
    teacher_logits = torch.tensor(OFFICIAL["teacher_logits"], dtype=dtype)
    temperature = case["temperature"]
    if case["method"] == "kd":
        value, gradient = value_and_gradient(forward_kl, student_logits, teacher_logits, temperature=temperature)
    else:
        value, gradient = value_and_gradient(
            ab_divergence,
            student_logits,
            teacher_logits,
            alpha=case["alpha"],
            beta=case["beta"],
            temperature=temperature,
        )
    factor = temperature**2 if case["temperature_squared"] else 1.0
    expected = torch.tensor(case["grad"], dtype=torch.float64)
    assert abs(factor * value.item() - case["loss"]) <= tolerance * case["loss"]
    assert (factor * gradient.double() - expected).norm() <= tolerance * expected.norm()


# ---------------------------------------------------------------------------------------------- many digits


def exact_probabilities(logits: list[float], temperature: float) -> list[mpmath.mpf]:
    exponentials = [mpmath.exp(mpmath.mpf(z) / mpmath.mpf(temperature)) for z in logits]
    total = mpmath.fsum(exponentials)
    return [x / total for x in exponentials]


def exact_ab(student_logits, teacher_logits, alpha: float, beta: float, temperature: float):
    """The three-term definition, or its limit exactly on a singular line, and the gradient for the student's logits."""
    p, q = exact_probabilities(teacher_logits, temperature), exact_probabilities(student_logits, temperature)
    a, b = mpmath.mpf(alpha), mpmath.mpf(beta)
    s = a + b
    log_ratios = [mpmath.log(y / x) for x, y in zip(p, q, strict=True)]
    pairs = list(zip(p, q, log_ratios, strict=True))
    if a == 0 and b == 0:
        value = mpmath.fsum(d**2 for _, _, d in pairs) / 2
    elif b == 0:
        value = mpmath.fsum(-(x**a) * a * d - x**a + y**a for x, y, d in pairs) / a**2
    elif a == 0:
        value = mpmath.fsum(y**b * b * d - y**b + x**b for x, y, d in pairs) / b**2
    elif s == 0:
        value = mpmath.fsum(a * d + (x / y) ** a - 1 for x, y, d in pairs) / a**2
    else:
        value = mpmath.fsum(x**s / (b * s) + y**s / (a * s) - x**a * y**b / (a * b) for x, y, _ in pairs)
    weights = [y**b * ((y**a - x**a) / a if a != 0 else d) for x, y, d in pairs]
    total = mpmath.fsum(weights)
    return value, [(w - y * total) / mpmath.mpf(temperature) for w, y in zip(weights, q, strict=True)]


def random_cases(count: int):
    """Float32 logits of student and teacher, alpha, beta, T: far and near pairs, ordinary and singular exponents."""
    draw = random.Random(1)

    def close() -> float:
        return draw.choice([-1, 1]) * 10 ** draw.uniform(-9, -1)

    exponents = [
        lambda: (draw.uniform(0, 1.5), draw.uniform(0, 1.5)),
        lambda: (draw.uniform(-1.5, 2), draw.uniform(-1.5, 2)),
        lambda: (draw.uniform(1, 4), draw.uniform(1, 4)),
        lambda: (draw.choice([0.0, close()]), draw.uniform(-1, 1.5)),
        lambda: (draw.uniform(-1, 1.5), draw.choice([0.0, close()])),
        lambda: (a := draw.uniform(-1, 1.5), draw.choice([0.0, close()]) - a),
        lambda: (draw.choice([0.0, close()]), draw.choice([0.0, close()])),
        lambda: draw.choice([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.8, 0.3), (0.5, -0.5), (2.0, -1.0)]),
        lambda: (draw.choice([-1, 1]) * 1e-8, draw.choice([-1, 1]) * 1e-8),
    ]
    for index in range(count):
        classes, scale = draw.randint(2, 6), 10 ** draw.uniform(-3, 1.5)
        alpha, beta = exponents[index % len(exponents)]()
        teacher = [draw.gauss(0, scale) for _ in range(classes)]
        if draw.random() < 0.4:
            distance, shift = 10 ** draw.uniform(-6, 0), draw.choice([0.0, 0.0, draw.gauss(0, 1)])
            student = [z + shift + draw.gauss(0, distance) for z in teacher]
        else:
            student = [draw.gauss(0, scale) for _ in range(classes)]
        temperature = torch.tensor(draw.choice([0.5, 1.0, draw.uniform(0.5, 20)])).item()
        yield torch.tensor([student]), torch.tensor([teacher]), alpha, beta, temperature


def test_2250_random_alpha_beta_divergences_agree_with_many_digits():
    wrong = []
    with mpmath.workdps(90):  # 50 digits after what the general formula loses at exponents of 1e-8 and near equality
        for student, teacher, alpha, beta, temperature in random_cases(2250):
            expected, expected_gradient = exact_ab(student[0].tolist(), teacher[0].tolist(), alpha, beta, temperature)
            for dtype, tolerance, floor in ((torch.float32, 1e-5, 1e-2), (torch.float64, 1e-11, 1e-10)):
                most = torch.finfo(dtype).max
                value, gradient = value_and_gradient(
                    ab_divergence, student.to(dtype), teacher.to(dtype), alpha=alpha, beta=beta, temperature=temperature
                )
                capped = min(expected, mpmath.mpf(most))
                error = abs(mpmath.mpf(value.item()) - capped) / (capped + floor)
                capped = [max(min(g, mpmath.mpf(most)), -mpmath.mpf(most)) for g in expected_gradient]
                differences = [mpmath.mpf(g) - e for g, e in zip(gradient[0].tolist(), capped, strict=True)]
                gradient_error = mpmath.norm(differences) / (mpmath.norm(capped) + floor)
                if not (error <= tolerance and gradient_error <= tolerance):
                    wrong.append(
                        (dtype, alpha, beta, temperature, float(error), float(gradient_error), student, teacher)
                    )
    assert not wrong, f"{len(wrong)} cases, the worst: {max(wrong, key=lambda case: max(case[4:6]) * case[0].itemsize)}"


def exact_other(name: str, student_logits, teacher_logits, skew: float, temperature: float) -> mpmath.mpf:
    p, q = exact_probabilities(teacher_logits, temperature), exact_probabilities(student_logits, temperature)

    def kl(x, y):
        return mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(x, y, strict=True))

    def mix(share, x, y):
        return [share * a + (1 - share) * b for a, b in zip(x, y, strict=True)]

    half = mpmath.mpf(1) / 2
    return {
        "js": lambda: (kl(p, mix(half, p, q)) + kl(q, mix(half, p, q))) / 2,
        "skew_fkld": lambda: kl(p, mix(mpmath.mpf(skew), p, q)),
        "skew_rkld": lambda: kl(q, mix(mpmath.mpf(skew), q, p)),
        "tvd": lambda: mpmath.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    }[name]()


@pytest.mark.parametrize("name", ["js", "skew_fkld", "skew_rkld", "tvd"])
def test_the_other_divergences_agree_with_many_digits(name):
    draw = random.Random(2)
    with mpmath.workdps(50):
        for student, teacher, _, _, temperature in random_cases(120):
            skew = draw.choice([0.0, 1e-6, 0.1, 0.5, 0.9, draw.random()])
            parameters = {"skew": skew} if name.startswith("skew") else {}
            expected = exact_other(name, student[0].tolist(), teacher[0].tolist(), skew, temperature)
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
                value = DIVERGENCES[name](student.to(dtype), teacher.to(dtype), temperature=temperature, **parameters)
                floor = 1e-2 if dtype == torch.float32 else 1e-4
                assert abs(mpmath.mpf(value.item()) - expected) <= tolerance * (expected + floor)


@every
def test_the_gradient_is_the_slope_of_the_value(name, parameters):
    student, teacher = random_logits(5, 7, dtype=torch.float64)
    divergence = make_divergence(name, temperature=1.7, **parameters)
    _, gradient = value_and_gradient(divergence, student, teacher, reduction="sum")
    step = 1e-5
    steps = step * torch.eye(35, dtype=torch.float64).reshape(35, 5, 7)
    rise = [
        divergence(student + h, teacher, reduction="sum") - divergence(student - h, teacher, reduction="sum")
        for h in steps
    ]
    numeric = torch.stack(rise).reshape(5, 7) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------------- laws

exponent = st.floats(-1.5, 2.0)
logits = st.lists(st.floats(-8, 8), min_size=3, max_size=3)
law = settings(max_examples=60, deadline=None, derandomize=True)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@law
@given(logits, logits, exponent, exponent)
def test_a_divergence_is_never_negative_and_zero_only_at_equality(student, teacher, alpha, beta):
    student, teacher = double(student), double(teacher)
    value = ab_divergence(student, teacher, alpha=alpha, beta=beta)
    apart = (student.log_softmax(-1) - teacher.log_softmax(-1)).abs().max() > 1e-9
    assert value > 0 if apart else value >= 0
    assert ab_divergence(student, student, alpha=alpha, beta=beta) == 0
    assert ab_divergence(student.float(), teacher.float(), alpha=alpha, beta=beta) >= 0


@every
def test_equal_logits_give_exactly_zero_and_no_gradient(name, parameters):
    student, _ = random_logits(50, 9, scale=10)
    value, gradient = value_and_gradient(make_divergence(name, **parameters), student, student)
    assert value == 0
    assert not gradient.any()


@every
def test_float32_values_are_never_negative_near_equality(name, parameters):
    student, noise = random_logits(400, 5, scale=1)
    teacher = student + noise * torch.logspace(-9, 0, 400).unsqueeze(-1)
    assert (make_divergence(name, **parameters)(student, teacher, reduction="none") >= 0).all()


@law
@given(logits, logits, exponent, exponent)
def test_swapping_the_roles_swaps_alpha_and_beta(student, teacher, alpha, beta):
    student, teacher = double(student), double(teacher)
    value = ab_divergence(student, teacher, alpha=alpha, beta=beta)
    dual = ab_divergence(teacher, student, alpha=beta, beta=alpha)
    torch.testing.assert_close(value, dual, rtol=1e-10, atol=1e-14)


@law
@given(logits, logits, st.sampled_from(range(len(EVERY))), st.floats(-100, 100), st.floats(-100, 100))
def test_adding_a_constant_to_the_logits_changes_nothing(student, teacher, index, one, other):
    name, parameters = EVERY[index]
    divergence = make_divergence(name, **parameters)
    student, teacher = double(student), double(teacher)
    value, gradient = value_and_gradient(divergence, student, teacher)
    shifted, shifted_gradient = value_and_gradient(divergence, student + one, teacher + other)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-12)
    if name != "tvd":  # its gradient jumps where p = q
        torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-9, atol=1e-11)


@law
@given(
    logits, logits, st.floats(-1, 1.5), st.sampled_from([1e-3, 1e-6, 1e-10, 1e-30]), st.sampled_from(["a", "b", "s"])
)
def test_the_divergence_is_continuous_across_the_singular_lines(student, teacher, other, step, line):
    student, teacher = double(student), double(teacher)

    def at(distance: float) -> tuple[Tensor, Tensor]:
        alpha, beta = {"a": (distance, other), "b": (other, distance), "s": (other, distance - other)}[line]
        return value_and_gradient(ab_divergence, student, teacher, alpha=alpha, beta=beta)

    value, gradient = at(0.0)
    for distance in (step, -step):
        value_near, gradient_near = at(distance)
        assert abs(value_near - value) <= 60 * step * value + 1e-13
        assert (gradient_near - gradient).norm() <= 60 * step * value.clamp(min=1) * (1 + gradient.norm()) + 1e-12


P = double([0.7, 0.2, 0.1])
Q = double([0.1, 0.3, 0.6])


def test_the_kullback_leibler_divergences_have_the_right_direction():
    forward = 0.7 * math.log(7) + 0.2 * math.log(2 / 3) + 0.1 * math.log(1 / 6)
    reverse = 0.1 * math.log(1 / 7) + 0.3 * math.log(1.5) + 0.6 * math.log(6)
    assert forward_kl(Q.log(), P.log()).item() == pytest.approx(forward, rel=1e-14)
    assert reverse_kl(Q.log(), P.log()).item() == pytest.approx(reverse, rel=1e-14)
    assert forward_kl(Q.log(), P.log()).item() == pytest.approx(functional.kl_div(Q.log(), P, reduction="sum").item())
    assert reverse_kl(Q.log(), P.log()).item() == pytest.approx(functional.kl_div(P.log(), Q, reduction="sum").item())


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 0.0, (P * (P / Q).log()).sum()),
        (0.0, 1.0, (Q * (Q / P).log()).sum()),
        (0.5, 0.5, 4 * (1 - (P * Q).sqrt().sum())),
        (1.0, 1.0, 0.5 * (P - Q).square().sum()),
        (0.0, 0.0, 0.5 * (P.log() - Q.log()).square().sum()),
        (2.0, -1.0, 0.5 * ((P - Q).square() / Q).sum()),
        (-1.0, 2.0, 0.5 * ((P - Q).square() / P).sum()),
        (1.0, -1.0, (P / Q - 1 - (P / Q).log()).sum()),
        (0.3, 0.7, ((P**0.3 * Q**0.7).sum() - 1) / (0.3 * (0.3 - 1))),
        (1.6, -0.6, ((P**1.6 * Q**-0.6).sum() - 1) / (1.6 * (1.6 - 1))),
        (1.0, 0.5, (P**1.5 / 0.75 + Q**1.5 / 1.5 - P * Q**0.5 / 0.5).sum()),
    ],
    ids=lambda x: f"{x:g}" if isinstance(x, float) else "",
)
def test_the_named_members_of_the_family_are_what_they_are_called(alpha, beta, expected):
    torch.testing.assert_close(ab_divergence(Q.log(), P.log(), alpha=alpha, beta=beta), expected, rtol=1e-13, atol=0)


def test_the_kullback_leibler_divergences_are_members_of_the_alpha_beta_family():
    student, teacher = random_logits(6, 10)
    for function, alpha, beta in ((forward_kl, 1, 0), (reverse_kl, 0, 1)):
        for near in (0.0, 1e-7):
            expected = value_and_gradient(function, student, teacher, temperature=2.0)
            found = value_and_gradient(
                ab_divergence, student, teacher, alpha=alpha + near, beta=beta - near, temperature=2.0
            )
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def test_skewed_divergences_mix_as_in_distillm():
    mixed_for_p, mixed_for_q = 0.1 * P + 0.9 * Q, 0.1 * Q + 0.9 * P
    forward, reverse = (P * (P / mixed_for_p).log()).sum(), (Q * (Q / mixed_for_q).log()).sum()
    torch.testing.assert_close(skewed_forward_kl(Q.log(), P.log()), forward)
    torch.testing.assert_close(skewed_reverse_kl(Q.log(), P.log()), reverse)
    torch.testing.assert_close(skewed_forward_kl(Q.log(), P.log(), skew=0.0), forward_kl(Q.log(), P.log()))
    torch.testing.assert_close(skewed_reverse_kl(Q.log(), P.log(), skew=0.0), reverse_kl(Q.log(), P.log()))


def test_jensen_shannon_and_total_variation_reach_their_largest_values():
    student, teacher = torch.tensor([1e6, 0.0, -1e6]), torch.tensor([-1e6, 0.0, 1e6])
    assert jensen_shannon(student, teacher).item() == pytest.approx(math.log(2))
    assert total_variation(student, teacher).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_confident_distributions_keep_their_relative_accuracy(dtype):
    student, teacher = torch.tensor([0.0, -40.0], dtype=dtype), torch.tensor([0.0, -41.0], dtype=dtype)
    q, p = math.exp(-40) / (1 + math.exp(-40)), math.exp(-41) / (1 + math.exp(-41))
    tolerance = 40 * torch.finfo(dtype).eps
    assert total_variation(student, teacher).item() == pytest.approx(q - p, rel=tolerance, abs=0)
    _, gradient = value_and_gradient(forward_kl, student, teacher)
    assert gradient.tolist() == pytest.approx([p - q, q - p], rel=tolerance, abs=0)


def test_match_kl_scale_gives_flat_distributions_the_strength_of_kl():
    student, noise = random_logits(16, 100, scale=1, dtype=torch.float64)
    student, teacher = 1e-3 * student, 1e-3 * (student + noise)
    kl = forward_kl(student, teacher)
    for alpha, beta in ((0.8, 0.5), (0.2, 0.2), (1.0, 1.0), (0.6, -0.4), (30.0, 30.0)):
        matched = ab_divergence(student, teacher, alpha=alpha, beta=beta, match_kl_scale=True)
        plain = ab_divergence(student, teacher, alpha=alpha, beta=beta)
        assert matched.item() == pytest.approx(kl.item(), rel=0.1)
        assert matched.item() == pytest.approx(plain.item() * 100 ** (alpha + beta - 1), rel=1e-9)


# ---------------------------------------------------------------------------------------------- contract


@every
def test_reductions_and_masks_agree_with_each_other(name, parameters):
    student, teacher = random_logits(4, 6, 5)
    mask = torch.arange(24).reshape(4, 6) % 3 != 0
    divergence = make_divergence(name, temperature=3.0, **parameters)
    each = divergence(student, teacher, reduction="none")
    assert each.shape == (4, 6)
    torch.testing.assert_close(divergence(student, teacher), each.mean())
    torch.testing.assert_close(divergence(student, teacher, reduction="sum"), each.sum())
    kept = divergence(student, teacher, reduction="none", mask=mask)
    assert torch.equal(kept, each * mask)
    torch.testing.assert_close(divergence(student, teacher, mask=mask), each[mask].mean())
    torch.testing.assert_close(divergence(student, teacher, mask=mask.float(), reduction="sum"), each[mask].sum())
    single = divergence(student[1, 2], teacher[1, 2])
    torch.testing.assert_close(single, each[1, 2])


@every
def test_masked_nan_and_infinity_reach_neither_value_nor_gradient(name, parameters):
    student, teacher = random_logits(3, 4, 5)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = mask[2, 3] = False
    divergence = make_divergence(name, **parameters)
    expected = value_and_gradient(divergence, student, teacher, mask=mask)
    student[0, 1], student[1, 2, 3], teacher[1, 2], teacher[2, 3, 0] = math.nan, math.inf, -math.inf, math.nan
    found = value_and_gradient(divergence, student, teacher, mask=mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[1][~mask].any()


@every
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_mask_gives_zero_with_zero_gradient(name, parameters, reduction):
    student, teacher = torch.full((2, 3, 4), math.nan), torch.full((2, 3, 4), math.inf)
    value, gradient = value_and_gradient(
        make_divergence(name, **parameters), student, teacher, mask=torch.zeros(2, 3), reduction=reduction
    )
    assert value == 0
    assert not gradient.any()


@every
def test_no_positions_give_zero(name, parameters):
    value, gradient = value_and_gradient(make_divergence(name, **parameters), torch.zeros(0, 4), torch.zeros(0, 4))
    assert value == 0
    assert gradient.shape == (0, 4)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_finite_float32(name, parameters, dtype):
    student, teacher = random_logits(8, 20, scale=15, dtype=dtype)
    divergence = make_divergence(name, temperature=4.0, **parameters)
    expected, expected_gradient = value_and_gradient(divergence, student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(divergence, student, teacher)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert torch.equal(value, expected)
    assert value.isfinite()
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=0, atol=0)


@every
def test_one_float64_input_makes_the_result_float64(name, parameters):
    student, teacher = random_logits(4, 5)
    divergence = make_divergence(name, **parameters)
    value, gradient = value_and_gradient(divergence, student, teacher.double())
    assert (value.dtype, gradient.dtype) == (torch.float64, torch.float32)
    assert divergence(student.double(), teacher).dtype == torch.float64
    assert divergence(student, teacher).dtype == torch.float32


@pytest.mark.parametrize(("name", "parameters"), BOUNDED_BELOW)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_logits_of_a_million_give_finite_values_and_gradients(name, parameters, temperature):
    student, teacher = random_logits(64, 6, scale=1)
    student, teacher = 1e6 * student.clamp(-1, 1), 1e6 * teacher.clamp(-1, 1)
    for size in (student, teacher.abs(), -student):
        value, gradient = value_and_gradient(
            make_divergence(name, **parameters), size, teacher, reduction="none", temperature=temperature
        )
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.2, -0.3), (-0.4, 1.3), (-1.0, -1.0), (0.5, -0.5), (-1e300, 3.0), (1e300, -1.7e308)]
)
def test_negative_exponents_saturate_and_are_never_nan(alpha, beta, dtype):
    most = torch.finfo(dtype).max
    student, teacher = random_logits(64, 6, scale=1, dtype=dtype)
    for scale in (1.0, 1e2, 1e3, 1e6):
        for reduction in ("none", "mean", "sum"):
            value, gradient = value_and_gradient(
                ab_divergence, scale * student, scale * teacher, alpha=alpha, beta=beta, reduction=reduction
            )
            assert value.isfinite().all()
            assert gradient.isfinite().all()
            same, no_gradient = value_and_gradient(
                ab_divergence, scale * student, scale * student, alpha=alpha, beta=beta, reduction=reduction
            )
            assert not same.any()
            assert not no_gradient.any()
    student, teacher = torch.tensor([0.0, -1e6], dtype=dtype), torch.tensor([-1e6, 0.0], dtype=dtype)
    value, gradient = value_and_gradient(ab_divergence, student, teacher, alpha=0.5, beta=-0.5)
    assert value == most
    assert gradient.tolist() == [most, -most]


def test_a_value_near_the_top_of_float32_is_still_exact():
    student, teacher = torch.tensor([[0.0, -87.0]]).repeat(40, 1), torch.tensor([[-87.0, 0.0]]).repeat(40, 1)
    each = ab_divergence(student, teacher, alpha=1.0, beta=-1.0, reduction="none")
    assert each[0].item() == pytest.approx(math.exp(87.0) - 2, rel=1e-6)
    assert ab_divergence(student, teacher, alpha=1.0, beta=-1.0).item() == pytest.approx(each[0].item(), rel=1e-6)
    assert (
        ab_divergence(student, teacher, alpha=1.0, beta=-1.0, reduction="sum").item() == torch.finfo(torch.float32).max
    )


@every
def test_the_teacher_gets_no_gradient(name, parameters):
    student, teacher = random_logits(4, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    make_divergence(name, **parameters)(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not make_divergence(name, **parameters)(student.detach(), teacher).requires_grad


@pytest.mark.parametrize(
    ("name", "parameters"), [case for case in BOUNDED_BELOW if sum(case[1].values()) > 0.4 or not case[1]]
)
def test_padding_classes_change_nothing(name, parameters):
    parameters = {**parameters, "match_kl_scale": False} if name == "abkd" else parameters
    student, teacher = random_logits(8, 10)
    padding = torch.full((8, 3), -1e4)
    divergence = make_divergence(name, temperature=4.0, **parameters)
    value, gradient = value_and_gradient(divergence, student, teacher)
    padded, padded_gradient = value_and_gradient(
        divergence, torch.cat([padding, student], -1), torch.cat([padding, teacher], -1)
    )
    torch.testing.assert_close(padded, value)
    torch.testing.assert_close(padded_gradient[:, 3:], gradient)
    assert not padded_gradient[:, :3].any()


@every
def test_the_temperature_divides_the_logits(name, parameters):
    student, teacher = random_logits(6, 7, dtype=torch.float64)
    divergence = make_divergence(name, temperature=4.0, **parameters)
    torch.testing.assert_close(divergence(student, teacher), divergence(student / 4, teacher / 4, temperature=1.0))


@every
def test_blocks_of_positions_give_what_one_piece_gives(name, parameters, monkeypatch):
    student, teacher = random_logits(3, 7, 5)
    divergence, mask = make_divergence(name, temperature=2.0, **parameters), torch.rand(3, 7) < 0.7
    whole = value_and_gradient(divergence, student, teacher, mask=mask, reduction="none")
    monkeypatch.setattr(divergences, "_BLOCK_CPU", 1)
    parts = value_and_gradient(divergence, student, teacher, mask=mask, reduction="none")
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@every
def test_strided_and_broadcast_logits_are_taken_as_they_are(name, parameters):
    student, teacher = random_logits(6, 5)
    divergence = make_divergence(name, **parameters)
    expected = value_and_gradient(divergence, student[:1].repeat(6, 1), teacher)
    found = value_and_gradient(lambda s, t: divergence(s.expand(6, 5), t), student[:1], teacher.t().contiguous().t())
    torch.testing.assert_close(found, (expected[0], expected[1].sum(0, keepdim=True)), rtol=1e-5, atol=1e-7)


@every
def test_functional_transforms_agree_with_a_loop(name, parameters):
    student, teacher = random_logits(3, 4, 5)
    divergence = make_divergence(name, temperature=2.0, **parameters)
    value = torch.stack([divergence(s, teacher[0]) for s in student])
    gradient = torch.stack([value_and_gradient(divergence, s, teacher[0])[1] for s in student])
    torch.testing.assert_close(torch.vmap(divergence, in_dims=(0, None))(student, teacher[0]), value)
    torch.testing.assert_close(
        torch.vmap(torch.func.grad(divergence), in_dims=(0, None))(student, teacher[0]), gradient
    )
    summed = torch.func.grad(lambda s: torch.vmap(divergence, in_dims=(0, None))(s, teacher[0]).sum())(student)
    torch.testing.assert_close(summed, gradient)


def peak_memory(step, folder: Path) -> int:
    """The most bytes that `step` has allocated at once, beyond what was there before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    assert events
    return max(itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [100, 1000])
def test_the_memory_is_that_of_kl_div_and_at_most_one_more_tensor_of_logits(classes, temperature, tmp_path):
    student, teacher = random_logits(256, classes)
    student.requires_grad_()

    def kl_div() -> None:
        log_q, p = functional.log_softmax(student / temperature, -1), functional.softmax(teacher / temperature, -1)
        functional.kl_div(log_q, p, reduction="batchmean").backward()
        student.grad = None

    allowed = peak_memory(kl_div, tmp_path) + student.numel() * student.element_size()
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.3), (0.6, 0.4), (1.0, 1.0), (0.3, 0.2), (1.0, 0.5)):

        def step(alpha: float = alpha, beta: float = beta) -> None:
            ab_divergence(student, teacher, alpha=alpha, beta=beta, temperature=temperature).backward()
            student.grad = None

        assert peak_memory(step, tmp_path) <= allowed, (alpha, beta)


@every
def test_what_all_logits_have_in_common_costs_no_digits_in_float32(name, parameters):
    student, teacher = ((64 * logits).round() / 64 for logits in random_logits(50, 20))  # so that adding 1000 is exact
    divergence = make_divergence(name, temperature=3.0, **parameters)
    expected = value_and_gradient(divergence, student, teacher)
    found = value_and_gradient(divergence, student + 1000.0, teacher - 1000.0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-8)


def test_a_call_without_gradients_leaves_nothing_behind_that_a_gradient_stumbles_over():
    student, teacher = random_logits(3, 4)
    with torch.inference_mode():
        value = ab_divergence(student, teacher, alpha=0.77, beta=0.33, temperature=1.23)
    found, gradient = value_and_gradient(ab_divergence, student, teacher, alpha=0.77, beta=0.33, temperature=1.23)
    assert found == value
    assert gradient.any()
    divergence = make_divergence("abkd", alpha=0.77, beta=0.33, temperature=1.23)
    torch.testing.assert_close(torch.func.grad(divergence)(student, teacher), gradient)


def test_a_second_derivative_is_refused():
    student, teacher = random_logits(2, 3)
    (gradient,) = torch.autograd.grad(forward_kl(student.requires_grad_(), teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()
    weight = torch.ones((), requires_grad=True)  # by which the gradient could be differentiated, but not it alone
    (gradient,) = torch.autograd.grad(weight * forward_kl(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice_gives_the_same_gradient():
    student, teacher = random_logits(2, 3)
    value = forward_kl(student.requires_grad_(), teacher)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every
def test_one_class_has_no_divergence(name, parameters):
    value, gradient = value_and_gradient(make_divergence(name, **parameters), torch.ones(2, 1), torch.zeros(2, 1))
    assert value == 0
    assert not gradient.any()


LOGITS = torch.zeros(4, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_logits": torch.zeros(4, 7)}, r"\[4, 10\].*\[4, 7\].*10 and 7 classes"),
        ({"teacher_logits": torch.zeros(10)}, r"\[4, 10\].*\[10\].*10 and 10 classes"),
        ({"mask": torch.ones(4, 10)}, r"mask \[4, 10\].*\[4, 10\] \(10 classes\).*\[4\]"),
        ({"mask": torch.ones(3)}, r"mask \[3\]"),
        ({"temperature": 0.0}, r"temperature.*0\.0"),
        ({"temperature": -1.0}, r"temperature.*-1\.0"),
        ({"temperature": math.inf}, "temperature.*inf"),
        ({"temperature": math.nan}, "temperature.*nan"),
        ({"reduction": "batchmean"}, "batchmean.*mean, sum, none"),
        ({"student_logits": LOGITS.long(), "teacher_logits": LOGITS}, "floating point.*int64 and torch.float32"),
        ({"student_logits": torch.zeros(4, 0), "teacher_logits": torch.zeros(4, 0)}, "at least one class"),
        ({"student_logits": torch.tensor(1.0), "teacher_logits": torch.tensor(1.0)}, "at least one class"),
    ],
)
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_wrong_input_is_refused_with_the_reason(name, arguments, message):
    parameters = {"alpha": 0.8, "beta": 0.3} if name == "abkd" else {}
    with pytest.raises(ValueError, match=message):
        DIVERGENCES[name](**{"student_logits": LOGITS, "teacher_logits": LOGITS, **parameters, **arguments})


def test_parameters_out_of_range_are_refused_with_their_value():
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"alpha.*{wrong}"):
            ab_divergence(LOGITS, LOGITS, alpha=wrong, beta=0.5)
        with pytest.raises(ValueError, match=f"beta.*{wrong}"):
            ab_divergence(LOGITS, LOGITS, alpha=0.5, beta=wrong)
    for wrong in (-0.1, 1.0, math.nan):
        for function in (skewed_forward_kl, skewed_reverse_kl):
            with pytest.raises(ValueError, match=f"skew.*{wrong}"):
                function(LOGITS, LOGITS, skew=wrong)


# ---------------------------------------------------------------------------------------------- make_divergence


def test_the_registry_holds_every_config_name_with_typed_parameters():
    assert list(DIVERGENCES) == ["abkd", "fkld", "js", "rkld", "skew_fkld", "skew_rkld", "tvd"]
    hints = typing.get_type_hints(DIVERGENCES["abkd"])
    assert (hints["alpha"], hints["beta"], hints["match_kl_scale"]) == (float, float, bool)
    assert typing.get_type_hints(DIVERGENCES["skew_fkld"])["skew"] is float


def test_a_divergence_remembers_its_name_parameters_and_temperature():
    student, teacher = random_logits(3, 4)
    divergence = make_divergence("abkd", temperature=4.0, alpha=0.8, beta=0.3)
    assert (divergence.name, divergence.temperature) == ("abkd", 4.0)
    assert divergence.parameters == {"alpha": 0.8, "beta": 0.3}
    expected = ab_divergence(student, teacher, alpha=0.8, beta=0.3, temperature=4.0)
    assert divergence(student, teacher) == expected
    assert pickle.loads(pickle.dumps(divergence))(student, teacher) == expected
    assert divergence(student, teacher, temperature=1.0) == ab_divergence(student, teacher, alpha=0.8, beta=0.3)
    assert {divergence: 1}[Divergence("abkd", 4.0, {"alpha": 0.8, "beta": 0.3})] == 1
    with pytest.raises(AttributeError):
        divergence.temperature = 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("abkl", {}, "no divergence 'abkl'"),
        ("fkld", {"alpha": 1.0}, "'fkld' has no parameter 'alpha'"),
        ("abkd", {"alpha": 1.0, "beta": 0.0, "betta": 0.0}, "no parameter 'betta'"),
        ("abkd", {"alpha": 1.0, "beta": 0.0, "mask": None}, "no parameter 'mask'"),
        ("abkd", {"alpha": 1.0}, "needs beta"),
        ("abkd", {"alpha": math.nan, "beta": 0.0}, "alpha must be a finite number, got nan"),
        ("abkd", {"alpha": "much", "beta": 0.0}, "alpha must be a finite number, got 'much'"),
        ("skew_rkld", {"skew": 1.0}, "skew must be in"),
        ("fkld", {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_a_wrong_divergence_is_a_config_error(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_divergence(name, **arguments)
