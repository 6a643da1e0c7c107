"""The table of what divergences cost: all of them, beside a `kl_div` that computes what forward KL does."""

import pytest
import torch

from vkd.divergences import DIVERGENCES, forward_kl
from vkd.errors import ConfigError
from vkd.speed import divergence_costs
from vkd.speed.divergence_costs import REFERENCE, fitting, kl_div, measure, parse_shape
from vkd.speed.report import configured_divergences

CPU = torch.device("cpu")
SHAPES = [[4, 10], [2, 3, 5]]


@pytest.fixture(scope="module")
def costs():
    return list(measure(configured_divergences(), SHAPES, device=CPU, repetitions=2))


def test_every_divergence_is_measured_at_every_shape_beside_kl_div(costs):
    assert [(cost.name, cost.shape) for cost in costs] == [
        (name, shape) for shape in SHAPES for name in [REFERENCE, *DIVERGENCES]
    ]


def test_each_cost_has_a_figure_a_repetition_and_what_the_gradient_alone_takes_at_least(costs):
    for cost in costs:
        assert len(cost.seconds) == len(cost.forward_seconds) == 2
        assert all(value > 0 for value in [*cost.seconds, *cost.forward_seconds])
        assert cost.peak_bytes >= 4 * torch.Size(cost.shape).numel()


def test_divergences_have_the_parameters_of_their_files(costs):
    found = {cost.name: cost.parameters for cost in costs}
    assert found["abkd"] == {"alpha": 0.8, "beta": 0.3, "match_kl_scale": False}
    assert found["skew_fkld"] == {"skew": 0.1}
    assert found["fkld"] == found[REFERENCE] == {}


@pytest.mark.parametrize("shape", [(6, 10), (3, 4, 7)])
def test_the_reference_computes_forward_kl_and_its_gradient(shape):
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    found, expected = kl_div(student, teacher), forward_kl(student, teacher, temperature=4.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-12
    )


def test_the_memory_of_kl_div_is_what_its_tensors_add_up_to(costs):
    # The student's log-softmax and the teacher's softmax, the scaled logits or the pointwise terms, and the gradient.
    (cost,) = measure({}, [[64, 100]], device=CPU, repetitions=1)
    tensor = 4 * 64 * 100
    assert 3 * tensor <= cost.peak_bytes <= 6 * tensor


def test_shapes_are_read_as_numbers():
    assert parse_shape("8x512x50257") == [8, 512, 50257]


@pytest.mark.parametrize("text", ["64", "64x", "0x3", "axb", "-4x3", "4 x 3", ""])
def test_what_is_no_shape_is_refused_with_a_word_that_would_do(text):
    with pytest.raises(ConfigError, match=r"shapes=\[64x100,"):
        parse_shape(text)


def test_the_first_dimension_gives_way_to_memory_and_the_others_never(monkeypatch):
    row = 1000 * 4 * divergence_costs.PLAUSIBLE_COPIES
    monkeypatch.setattr(divergence_costs, "available_bytes", lambda device: 5.5 * row)
    assert fitting([8, 10, 100], CPU) == [5, 10, 100]
    assert fitting([3, 10, 100], CPU) == [3, 10, 100]
    assert fitting([8, 100, 100], CPU) == [1, 100, 100]


def test_a_cpu_gets_no_more_logits_than_it_can_do_in_seconds(monkeypatch):
    monkeypatch.setattr(divergence_costs, "available_bytes", lambda device: 1e15)
    assert fitting([8, 512, 50257], CPU) == [1, 512, 50257]
    assert fitting([8, 512, 50257], torch.device("cuda")) == [8, 512, 50257]
