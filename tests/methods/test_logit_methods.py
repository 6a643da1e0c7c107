"""What all methods that compare logits promise: finite, exact in float64, no gradient for the teacher, one state."""

from __future__ import annotations

import pytest
import torch
from logit_cases import DIVERGENCES, OFFICIAL, batch, divergence, method, random_logits, value_and_gradient

from vkd.methods import METHODS

NAMES = ["ctkd", "dist", "dkd", "lsd", "mlkd", "ttm", "wttm"]
VARIANTS = [(name, {}) for name in NAMES] + [("ctkd", {"scope": "instance"}), ("dkd", {"target_divergence": "same"})]
every_variant = pytest.mark.parametrize(("name", "changed"), VARIANTS)


def example(seed: int = 0, dtype=torch.float64, scale: float = 2.0):
    student, teacher, strong_student, strong_teacher = random_logits(4, 6, 10, seed=seed, scale=scale)
    pairs = [tensor.to(dtype) for tensor in (student, teacher, strong_student, strong_teacher)]
    return batch(pairs[0], pairs[1], further=[tuple(pairs[2:])])


def test_every_published_case_of_a_method_has_a_test():
    assert {case["method"] for case in OFFICIAL["method_cases"]} == {"dist", "dkd", "lsd", "ttm", "wttm"}
    assert len(OFFICIAL["method_cases"]) == 27


@every_variant
@pytest.mark.parametrize("compared_by", DIVERGENCES)
def test_a_method_takes_every_divergence_and_gives_scalars_with_a_finite_gradient(name, changed, compared_by):
    subject = method(name, divergence(compared_by, 4.0), **changed)
    terms = subject(example())
    assert all(value.shape == () and value.isfinite() and value > 0 for value in terms.values())
    _, gradient = value_and_gradient(subject, example())
    assert gradient.isfinite().all()
    assert gradient.any(dim=-1).all()
    if METHODS[name].uses_divergence:
        plain, _ = value_and_gradient(method(name, divergence("fkld", 4.0), **changed), example())
        value, _ = value_and_gradient(subject, example())
        assert compared_by == "fkld" or value != plain


@every_variant
@pytest.mark.parametrize("compared_by", ["fkld", "abkd"])
def test_float32_agrees_with_float64(name, changed, compared_by):
    subject = method(name, divergence(compared_by, 4.0), **changed)
    (exact, exact_gradient), (value, gradient) = (
        value_and_gradient(subject, example(dtype=dtype)) for dtype in (torch.float64, torch.float32)
    )
    assert (exact.dtype, exact_gradient.dtype) == (torch.float64, torch.float64)
    assert (value.dtype, gradient.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    assert (gradient - exact_gradient).norm() <= 1e-4 * exact_gradient.norm()


@every_variant
@pytest.mark.parametrize("compared_by", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_and_gaps_give_a_finite_loss_and_gradient(name, changed, compared_by, dtype):
    subject = method(name, divergence(compared_by, 4.0), **changed)
    gap = torch.zeros(6, 10, dtype=dtype)
    gap[:, 3] = 450 * 4.0
    shifted = gap.roll(2, dims=-1)
    huge = [tensor.clamp(-1, 1).to(dtype) * 1e4 for tensor in random_logits(2, 6, 10)]
    targets = torch.tensor([3, 3, 5, 5, 0, 1])  # the classes with the gap, and others
    for student, teacher in ((gap, shifted), (shifted, gap), (-gap, gap), (gap, gap), tuple(huge)):
        value, gradient = value_and_gradient(subject, batch(student, teacher, targets, further=[(teacher, student)]))
        assert value.isfinite()
        assert gradient.isfinite().all()


@every_variant
def test_constant_logits_give_a_bounded_gradient(name, changed):
    # The published code of lsd and dist has gradients around 1e6 and 1e7 here.
    for constant in (0.0, -7.0):
        (teacher,) = random_logits(1, 6, 10)
        flat = torch.full((6, 10), constant, dtype=torch.float64)
        for student, told in ((flat, teacher), (teacher, flat), (flat, flat)):
            value, gradient = value_and_gradient(
                method(name, divergence("fkld", 4.0), **changed), batch(student, told, further=[(student, told)])
            )
            assert value.isfinite()
            assert gradient.abs().max() < 2e3


@every_variant
def test_no_gradient_reaches_the_teacher(name, changed):
    told = example()
    outputs = [told.student, told.teacher, *told.views[0]]
    for output in outputs:
        output.logits.requires_grad_()
    sum(method(name, divergence("fkld", 4.0), **changed)(told).values()).backward()
    assert told.student.logits.grad.any()
    assert told.teacher.logits.grad is None
    assert told.views[0][1].logits.grad is None


@every_variant
def test_a_saved_state_gives_the_same_method_again(name, changed):
    subject = method(name, divergence("fkld", 4.0), **changed)
    with torch.no_grad():
        for parameter in subject.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    again = method(name, divergence("fkld", 4.0), **changed)
    again.load_state_dict(subject.state_dict())
    assert value_and_gradient(again, example())[0] == value_and_gradient(subject, example())[0]
    assert len(list(subject.parameters())) == {"ctkd": 4 if changed else 1}.get(name, 0)


@pytest.mark.parametrize("name", ["ctkd", "mlkd", "ttm", "wttm"])
def test_a_method_with_temperatures_of_its_own_ignores_that_of_the_divergence(name):
    assert not METHODS[name].uses_temperature
    values = [value_and_gradient(method(name, divergence("fkld", t)), example())[0] for t in (1.0, 4.0)]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["dkd", "lsd"])
def test_a_method_at_the_temperature_of_the_divergence_follows_it(name):
    assert METHODS[name].uses_temperature
    values = [value_and_gradient(method(name, divergence("fkld", t)), example())[0] for t in (1.0, 4.0)]
    assert values[0] != values[1]


@pytest.mark.parametrize("name", ["ctkd", "dkd", "lsd"])
def test_without_its_square_the_temperature_is_no_factor(name):
    compared_by = divergence("fkld", 3.0)
    squared, plain = (
        value_and_gradient(method(name, compared_by, temperature_squared=flag), example())[0] for flag in (True, False)
    )
    temperature = 1 + 20 * torch.ones((), dtype=torch.float64).sigmoid() if name == "ctkd" else 3.0
    torch.testing.assert_close(squared, plain * temperature**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("ctkd", ["weight"]),
        ("dist", ["inter_weight", "intra_weight"]),
        ("dkd", ["target_weight", "nontarget_weight"]),
        ("lsd", ["weight"]),
        ("mlkd", ["prediction_weight", "batch_weight", "class_weight"]),
        ("ttm", ["weight"]),
        ("wttm", ["weight"]),
    ],
)
def test_a_term_is_proportional_to_its_weight_and_to_no_other(name, weights):
    one = method(name, **dict.fromkeys(weights, 1.0))(example())
    for chosen, term in zip(weights, one, strict=True):
        changed = method(name, **{weight: 3.0 if weight == chosen else 1.0 for weight in weights})(example())
        for other, value in changed.items():
            torch.testing.assert_close(value, one[other] * (3.0 if other == term else 1.0))


@pytest.mark.parametrize("name", ["dist", "mlkd"])
def test_without_temperature_squared_a_term_is_smaller_by_the_square_of_its_temperature(name):
    logits = random_logits(4, 6, 5)
    told = batch(*logits[:2], further=[(logits[2], logits[3])]) if name == "mlkd" else batch(*logits[:2])
    own = {"temperatures": [3.0]} if name == "mlkd" else {"temperature": 3.0}
    with_it, without = (method(name, temperature_squared=switch, **own)(told) for switch in (True, False))
    for term in with_it:
        scale = 1 if term in ("batch", "class") else 9
        assert with_it[term].item() == pytest.approx(scale * without[term].item(), rel=1e-5)
