"""Half precision: scaled where needed, clipped in true units, never in the loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from toys import CPU, TinyNetwork, random_batch, recipe, toy_learner, toy_method

from vkd.methods import Combination
from vkd.training.precision import Precision

PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_scaler_exists_with_fp16_alone(name):
    precision = Precision(name, CPU)
    assert (precision.scaler is not None) == (name == "fp16")
    with precision.autocast():
        assert torch.is_autocast_enabled("cpu") == (name != "fp32")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.dtype


def one_update(name: str, clip: float | None, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights after one SGD step whose gradient is computed in float32 whatever the precision is."""
    network = TinyNetwork(dropout=0.0)
    precision = Precision(name, CPU)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = scale * functional.cross_entropy(network(random_batch(1)[0]), random_batch(1)[2])
    precision.update(loss, optimizer, list(network.parameters()), clip)
    return network.state_dict()


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_fp16_takes_the_same_step_as_fp32_with_and_without_clipping(clip):
    reference = one_update("fp32", clip)
    for name, value in one_update("fp16", clip).items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRECISIONS)
def test_clipping_bounds_the_length_of_a_step(name):
    before, after = TinyNetwork(dropout=0.0).state_dict(), one_update(name, 0.05, scale=100.0)
    steps = [(after[key] - before[key]).flatten() for key in before if "running" not in key and "num" not in key]
    assert torch.cat(steps).norm().item() == pytest.approx(0.1 * 0.05, rel=1e-3)


def test_a_gradient_below_the_clipping_norm_is_left_alone():
    assert all(torch.equal(value, one_update("fp32", None)[name]) for name, value in one_update("fp32", 1e6).items())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_losses_are_computed_in_float32_from_the_half_precision_logits(name):
    seen = {}

    class Probe(torch.nn.Module):
        needs_features, views = False, 1

        def forward(self, batch):
            seen["autocast"] = torch.is_autocast_enabled("cpu")
            seen["logits"] = batch.student.logits
            return {"product": (batch.student.logits @ batch.teacher.logits.T).mean()}

    learner = toy_learner(method=Combination({"probe": Probe()}), precision=name)
    images, teacher, targets, indices, progress = random_batch(1)
    learner.step(images, teacher, targets, indices, progress)
    logits = seen["logits"].detach()
    assert logits.dtype == torch.float32
    assert not seen["autocast"]
    # The network did run in half precision: its logits have no more digits than that.
    assert torch.equal(logits, logits.to(learner.precision.dtype).float())
    product = (logits.double() @ teacher.logits.double().T).mean().item()
    entropy = functional.cross_entropy(logits.double(), targets).item()
    figures = learner.epoch_figures()
    assert figures["probe/product"] == pytest.approx(product, rel=1e-5)
    assert figures["cross_entropy"] == pytest.approx(0.1 * entropy, rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_few_steps_in_every_precision_move_every_parameter_and_stay_finite(precision):
    learner = toy_learner(recipe(clip_grad_norm=1.0), method=toy_method("kd"), precision=precision)
    before = [entry.clone() for entry in learner.parameters]
    for step in range(1, 5):
        learner.step(*random_batch(step))
    learner.check_finite()
    assert all(entry.isfinite().all() for entry in learner.parameters)
    assert all(not torch.equal(one, other) for one, other in zip(before, learner.parameters, strict=True))


def test_a_step_that_overflows_in_fp16_is_left_out_and_the_scale_is_lowered():
    learner = toy_learner(method=Combination({}), precision="fp16", cross_entropy_weight=1e3)
    before = {name: value.clone() for name, value in learner.student.named_parameters()}
    learner.precision.scaler.load_state_dict({**learner.precision.scaler.state_dict(), "scale": 2.0**120})
    images, _, targets, indices, progress = random_batch(1)
    learner.step(images, None, targets, indices, progress)
    assert all(torch.equal(value, before[name]) for name, value in learner.student.named_parameters())
    assert learner.precision.scaler.get_scale() == 2.0**119
