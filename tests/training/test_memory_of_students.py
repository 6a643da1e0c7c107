"""How many bytes a student is reckoned to take, against sums by hand and against what torch really holds."""

from __future__ import annotations

import os

import pytest
import torch
from toys import CPU, TinyNetwork, random_batch, recipe, toy_learner, toy_method

from vkd.training.assembly import Setting
from vkd.training.memory import available_bytes, learner_bytes, step_bytes

# Of TinyNetwork: a convolution of 3 to 6 channels by 3x3 with bias, a BatchNorm of 6, a classifier of 6 to 4.
PARAMETERS = (6 * 3 * 9 + 6) + (6 + 6) + (6 * 4 + 4)
BUFFERS = 4 * (6 + 6) + 8  # running mean and variance in float32, a count in int64


def test_a_student_holds_weights_buffers_gradients_and_two_numbers_a_weight_of_the_optimizer():
    assert learner_bytes(toy_learner(recipe())) == 4 * 4 * PARAMETERS + BUFFERS


def test_a_moving_average_holds_every_weight_and_buffer_once_more():
    assert learner_bytes(toy_learner(recipe(ema_decay=0.9))) == 5 * 4 * PARAMETERS + 2 * BUFFERS


def test_the_weights_of_a_method_count_like_the_students_and_its_buffers_once(drawn):
    learner = toy_learner(recipe(), method=toy_method(drawn))
    own = 4 * 3 + 3  # a linear layer of 4 to 3, beside a buffer of one number
    assert learner_bytes(learner) == 4 * 4 * (PARAMETERS + own) + BUFFERS + 4


def test_what_adam_really_holds_after_a_step_is_what_was_reckoned():
    learner = toy_learner(recipe(optimizer="adamw", learning_rate=0.01))
    expected = learner_bytes(learner)
    learner.step(*random_batch(1))
    held = [*learner.student.parameters(), *learner.student.buffers()]
    held += [entry.grad for entry in learner.student.parameters()]
    held += [entry for state in learner.optimizer.state.values() for entry in state.values() if torch.is_tensor(entry)]
    counters = 4 * len(learner.optimizer.state)  # of steps, one number for each tensor of weights
    assert sum(entry.untyped_storage().nbytes() for entry in held) - counters == expected


@pytest.mark.parametrize("batch_size", [8, 20])
def test_a_step_is_reckoned_to_take_twice_what_the_backward_pass_needs(data, batch_size):
    learner = toy_learner(recipe(), student=TinyNetwork(3, dropout=0.0))
    # Images [3, 6, 6] for the convolution; its output, and what ReLU makes of the normalised one [6, 6, 6]; the means.
    image = 4 * (3 * 36 + 6 * 36 + 6 * 36 + 6)
    found = step_bytes(learner, Setting(data, CPU), recipe(batch_size=batch_size))
    assert found == pytest.approx(2 * batch_size * image, rel=0.03)


def test_reckoning_leaves_the_student_and_all_random_numbers_as_they_are(data):
    learner = toy_learner(recipe())
    learner.student.eval()
    before, state = {name: value.clone() for name, value in learner.student.state_dict().items()}, torch.get_rng_state()
    step_bytes(learner, Setting(data, CPU), recipe())
    assert not learner.student.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in learner.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(entry.grad is None for entry in learner.student.parameters())


def test_no_more_than_eight_tenths_of_the_memory_are_given_to_students():
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(CPU) <= 0.8 * everything


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_gets_what_its_limit_leaves_and_files_kept_just_in_case_do_not_count(
    tmp_path, monkeypatch, folder, limit, used, cached
):
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text("10000\n")
    (group / used).write_text("7000\n")
    (group / "memory.stat").write_text(f"anon 4000\n{cached} 2500\n")
    monkeypatch.setattr("vkd.training.memory.CONTROL_GROUP", tmp_path)
    assert available_bytes(CPU) == pytest.approx(0.8 * (10000 - (7000 - 2500)))
    (group / limit).write_text("max\n")
    assert available_bytes(CPU) > 10000
