"""One student in training: its moving average, its random numbers, its sums, its state."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from toys import TinyNetwork, differences, random_batch, recipe, toy_learner, toy_method

from vkd.errors import TrainingError
from vkd.methods import Combination, Output, Progress


def through_a_file(state):
    """What a checkpoint keeps of a state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_the_moving_average_equals_averages_by_hand():
    learner = toy_learner(recipe(ema_decay=0.7))
    expected = {name: value.clone() for name, value in learner.student.state_dict().items()}
    for step in range(1, 6):
        learner.step(*random_batch(step))
        for name, value in learner.student.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.7 * expected[name] + 0.3 * value
            else:
                expected[name] = value.clone()
    averaged = learner.evaluated_model.state_dict()
    assert learner.evaluated_model is not learner.student
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-5, atol=1e-7)


def test_without_a_moving_average_the_student_itself_is_evaluated():
    learner = toy_learner()
    assert learner.evaluated_model is learner.student


def test_two_learners_that_take_turns_equal_each_alone(drawn):
    def build(seed):
        return toy_learner(method=toy_method("kd", drawn, seed=seed), seed=seed)

    alone = []
    for seed in (1, 2):
        learner = build(seed)
        for step in range(1, 7):
            learner.step(*random_batch(step))
        alone.append(learner.state_dict())
    together = [build(1), build(2)]
    for step in range(1, 7):
        for learner in together:
            learner.step(*random_batch(step))
            torch.rand(step)
    assert differences(alone, [learner.state_dict() for learner in together]) == []


def test_dropout_follows_the_run_seed_and_not_the_global_generator():
    def masks(seed, outside):
        torch.manual_seed(outside)
        learner = toy_learner(method=Combination({}), seed=seed, student=TinyNetwork(3, dropout=0.5))
        learner.step(*random_batch(1))
        return learner.student.fc.weight.detach().clone()

    assert torch.equal(masks(1, 5), masks(1, 6))
    assert not torch.equal(masks(1, 5), masks(2, 5))


def test_building_and_stepping_leave_the_global_generator_alone(drawn):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    learner = toy_learner(recipe(ema_decay=0.9), method=toy_method(drawn))
    learner.step(*random_batch(1))
    assert torch.equal(before, torch.get_rng_state())


def test_figures_equal_a_plain_recomputation_with_a_short_last_batch():
    student = TinyNetwork(3, dropout=0.0)
    learner = toy_learner(recipe(label_smoothing=0.1), student=student)
    sums, correct, images = {"cross_entropy": 0.0, "kd": 0.0}, 0, 0
    for step, count in enumerate((8, 8, 3), start=1):
        batch = random_batch(step, count=count)
        with torch.no_grad():
            logits = copy.deepcopy(student).train()(batch[0]).double()
        targets = batch[2]
        log_q = logits.log_softmax(-1)
        smooth = 0.9 * log_q[torch.arange(count), targets] + 0.1 * log_q.mean(-1)
        p = (batch[1].logits.double() / 4).softmax(-1)
        kl = (p * (p.log() - (logits / 4).log_softmax(-1))).sum(-1)
        sums["cross_entropy"] += (0.1 * -smooth).sum().item()
        sums["kd"] += (0.9 * 16 * kl).sum().item()
        correct += (logits.argmax(-1) == targets).sum().item()
        images += count
        learner.step(*batch)
    figures = learner.epoch_figures()
    means = {name: total / images for name, total in sums.items()}
    assert list(figures) == ["loss", "cross_entropy", "kd", "top1"]
    assert figures == pytest.approx({"loss": sum(means.values()), **means, "top1": 100 * correct / images}, rel=1e-5)


def test_an_epoch_starts_with_empty_sums():
    learner = toy_learner()
    learner.step(*random_batch(1))
    learner.start_epoch_sums()
    learner.step(*random_batch(2))
    other = toy_learner()
    other.load_state_dict(through_a_file(learner.state_dict()))
    assert (learner.images, learner.steps) == (8, 1)
    assert other.epoch_figures() == learner.epoch_figures()


def test_a_weight_of_zero_leaves_cross_entropy_out():
    learner = toy_learner(cross_entropy_weight=0.0)
    learner.step(*random_batch(1))
    assert list(learner.epoch_figures()) == ["loss", "kd", "top1"]


class Explosive(nn.Module):
    """Terms that are NaN at a step of their own."""

    needs_features, views = False, 1

    def __init__(self, **at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, batch):
        zero = 0 * batch.student.logits.sum()
        return {name: zero + (float("nan") if batch.progress.step == step else 1.0) for name, step in self.at.items()}


def test_a_loss_that_is_not_finite_is_named_with_its_first_step():
    learner = toy_learner(method=Combination({"one": Explosive(fine=99, late=5, early=3, later=4)}))
    for step in range(1, 7):
        learner.step(*random_batch(step))
        if step < 3:
            learner.check_finite()
    with pytest.raises(TrainingError, match=r"'one/early' at step 3") as caught:
        learner.check_finite()
    assert "learning_rate" in str(caught.value)


def test_infinite_cross_entropy_is_found_too():
    learner = toy_learner()
    images, teacher, targets, indices, progress = random_batch(1)
    learner.step(images, teacher, targets, indices, progress)
    with torch.no_grad():
        learner.student.fc.weight.fill_(float("inf"))
    learner.step(images, teacher, targets, indices, Progress(1, 3, 2, 12))
    with pytest.raises(TrainingError, match=r"'cross_entropy' at step 2"):
        learner.check_finite()


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({}, "fp32"),
        ({"optimizer": "adamw", "learning_rate": 0.01}, "fp32"),
        ({"optimizer": "adamw", "learning_rate": 0.01, "clip_grad_norm": 0.5}, "fp16"),
        ({"ema_decay": 0.8}, "bf16"),
        ({"optimizer": "lion", "learning_rate": 0.001, "ema_decay": 0.8, "decay_norm_and_bias": False}, "fp32"),
    ],
)
def test_a_learner_restored_from_a_file_goes_on_bit_for_bit(drawn, fields, precision):
    def build(init):
        method = toy_method("kd", drawn, seed=init)
        return toy_learner(recipe(**fields), method=method, precision=precision, init=init)

    learner, other = build(3), build(4)
    if precision == "fp16":
        # It grows within the test, so both its size and its counter must survive.
        learner.precision.scaler.set_growth_interval(3)
    for step in range(1, 5):
        learner.step(*random_batch(step))
    other.load_state_dict(through_a_file(learner.state_dict()))
    assert differences(learner.state_dict(), other.state_dict()) == []
    for step in range(5, 10):
        learner.step(*random_batch(step))
        other.step(*random_batch(step))
    assert differences(learner.state_dict(), other.state_dict()) == []
    assert learner.method.methods[drawn].seen.item() == 9


def test_the_state_of_a_student_has_its_own_names_alone(drawn):
    learner = toy_learner(recipe(ema_decay=0.9), method=toy_method("kd", drawn))
    learner.step(*random_batch(1))
    assert list(learner.student.state_dict()) == list(TinyNetwork().state_dict())
    assert list(learner.evaluated_model.state_dict()) == list(TinyNetwork().state_dict())


def test_the_student_learns_in_training_mode_whatever_mode_it_was_left_in():
    learner = toy_learner()
    learner.student.eval()
    learner.method.eval()
    learner.step(*random_batch(1))
    assert learner.student.norm.num_batches_tracked == 1
    assert learner.method.training


def test_plain_training_equals_a_loop_written_by_hand():
    learner = toy_learner(method=Combination({}), student=TinyNetwork(3, dropout=0.0), cross_entropy_weight=1.0)
    by_hand = TinyNetwork(3, dropout=0.0)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(1, 6):
        images, _, targets, indices, progress = random_batch(step)
        learner.step(images, None, targets, indices, progress)
        optimizer.zero_grad()
        functional.cross_entropy(by_hand(images), targets).backward()
        optimizer.step()
    assert differences(dict(by_hand.state_dict()), dict(learner.student.state_dict())) == []


def test_the_teacher_gets_no_gradient():
    learner = toy_learner()
    images, _, targets, indices, progress = random_batch(1)
    logits = torch.randn(8, 4, requires_grad=True)
    learner.step(images, Output(logits), targets, indices, progress)
    assert logits.grad is None


def test_compile_compiles_the_student_once_and_not_its_moving_average(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    learner = toy_learner(recipe(ema_decay=0.9), compile=True)
    assert [module is learner.student for module in compiled] == [True]
    compiled.clear()
    toy_learner(compile=False)
    assert compiled == []


def test_a_student_with_nothing_to_learn_from_is_refused():
    learner = toy_learner(method=Combination({}), cross_entropy_weight=0.0)
    with pytest.raises(TrainingError, match="nothing to learn from"):
        learner.step(*random_batch(1))
