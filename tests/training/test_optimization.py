"""Learning rates by the books, optimizers by their names."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from torch import nn
from toys import TinyNetwork, recipe, toy_learner, toy_method

from vkd.config import RecipeConfig, config_directory
from vkd.errors import ConfigError
from vkd.training.optimization import Schedule, make_optimizer, optimizer_names, scheduler_names


def rates(how: RecipeConfig, metrics=None) -> list[float]:
    """The rate of every epoch."""
    schedule = Schedule(how, make_optimizer(how, TinyNetwork()))
    found = []
    for epoch in range(1, how.epochs + 1):
        found.append(schedule.learning_rate)
        schedule.epoch_done(epoch, None if metrics is None else metrics[epoch - 1])
    return found


def train(optimizer: torch.optim.Optimizer, network: nn.Module, steps: int) -> None:
    for step in range(steps):
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()


def test_cifar240_has_the_learning_rates_of_the_literature_in_every_epoch():
    how = RecipeConfig(**yaml.safe_load((config_directory() / "recipe" / "cifar240.yaml").read_text()))
    # helper/util.py of ABKD: steps = sum(epoch > milestones), with epochs from 1.
    expected = [0.05 * 0.1 ** sum(epoch > after for after in (150, 180, 210)) for epoch in range(1, 241)]
    assert how.epochs == 240
    assert rates(how) == pytest.approx(expected, rel=1e-12)


def test_cosine_follows_its_closed_formula():
    how = recipe(epochs=20, scheduler="cosine", min_learning_rate=0.002)
    expected = [0.002 + 0.5 * (0.05 - 0.002) * (1 + math.cos(math.pi * done / 20)) for done in range(20)]
    assert rates(how) == pytest.approx(expected, rel=1e-12)


def test_warm_up_rises_linearly_and_then_joins_the_schedule():
    how = recipe(epochs=20, scheduler="cosine", warmup_epochs=4, warmup_learning_rate=0.01)
    expected = [0.01 + (0.05 - 0.01) * done / 4 for done in range(4)]
    expected += [0.5 * 0.05 * (1 + math.cos(math.pi * done / 20)) for done in range(4, 20)]
    assert rates(how) == pytest.approx(expected, rel=1e-12)


def test_without_a_scheduler_the_rate_never_changes():
    assert rates(recipe(epochs=50)) == [0.05] * 50


def test_plateau_lowers_the_rate_after_epochs_without_progress():
    how = recipe(epochs=8, scheduler="plateau", scheduler_options={"patience_epochs": 1})
    assert rates(how, [10, 20, 30, 30, 30, 30, 40, 50]) == pytest.approx([0.05] * 5 + [0.005] * 3)


def test_the_warm_up_of_plateau_does_not_wait_for_evaluations():
    how = recipe(epochs=6, scheduler="plateau", warmup_epochs=4, warmup_learning_rate=0.01)
    assert rates(how, [None, 10, None, 20, None, 30]) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.05])


@pytest.mark.filterwarnings("error")
def test_plateau_says_nothing_about_a_state_that_is_not_lost():
    rates(recipe(scheduler="plateau"), [10, 20, 30])


@pytest.mark.parametrize("name", scheduler_names())
def test_a_new_schedule_that_is_told_the_past_continues_like_the_old_one(name):
    how = recipe(
        epochs=12,
        scheduler=name,
        milestones=[3, 7],
        warmup_epochs=2,
        scheduler_options={"decay_epochs": 3, "patience_epochs": 1},
    )
    metrics = [50.0, None, 60.0, None, 55.0, None, 58.0, None, 59.0, None, 61.0, 60.0]
    whole = rates(how, metrics)
    for done in range(12):
        schedule = Schedule(how, make_optimizer(how, TinyNetwork()))
        for epoch in range(1, done + 1):
            schedule.epoch_done(epoch, metrics[epoch - 1])
        assert schedule.learning_rate == whole[done]


@pytest.mark.parametrize("name", scheduler_names())
def test_every_schedule_gives_usable_rates(name):
    how = recipe(epochs=12, scheduler=name, milestones=[4])
    found = rates(how, [10.0] * 12)
    assert found[0] == 0.05
    assert all(0 <= rate <= 0.05 for rate in found)


@pytest.mark.parametrize(
    "name", ["momentum", "sgd", "adam", "adamw", "lamb", "lion", "rmsprop", "adan", "muon", "madgrad", "nadamw"]
)
def test_an_optimizer_is_built_by_its_name_and_moves_every_parameter(name):
    how = recipe(optimizer=name, learning_rate=0.01)
    network = TinyNetwork()
    before = [entry.clone() for entry in network.parameters()]
    train(make_optimizer(how, network), network, 3)
    assert all(not torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
    assert all(entry.isfinite().all() for entry in network.parameters())


def test_an_optimizer_that_a_step_cannot_serve_is_not_offered():
    assert "adahessian" not in optimizer_names()
    assert {"momentum", "sgd", "adamw"} <= set(optimizer_names())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_is_torch_sgd_without_nesterov_bit_for_bit(decay):
    ours, theirs = TinyNetwork(5), TinyNetwork(5)
    ours.eval(), theirs.eval()
    train(make_optimizer(recipe(weight_decay=decay, momentum=0.8), ours), ours, 10)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.8, weight_decay=decay, nesterov=False)
    train(reference, theirs, 10)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


class Bystanders(nn.Module):
    """A student, and beside it the parameters of a method."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNetwork(dropout=0.0)
        self.method = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("everything", [True, False])
def test_weight_decay_reaches_or_spares_biases_and_normalisation_as_configured(everything):
    both = Bystanders()
    how = recipe(weight_decay=0.1, learning_rate=0.5, decay_norm_and_bias=everything)
    with torch.no_grad():
        for entry in both.parameters():
            entry.fill_(1.0)
    optimizer = make_optimizer(how, both.network, both.method.parameters())
    for entry in both.parameters():
        entry.grad = torch.zeros_like(entry)
    optimizer.step()
    for name, entry in both.named_parameters():
        decayed = everything or entry.ndim > 1
        assert torch.allclose(entry, torch.full_like(entry, 1 - 0.5 * 0.1 if decayed else 1.0)), name


def test_parameters_of_methods_are_optimised_once_and_frozen_ones_are_left_alone(drawn):
    method = toy_method("kd", drawn)
    student = TinyNetwork()
    student.conv.weight.requires_grad_(False)
    learner = toy_learner(method=method, student=student)
    wanted = {id(entry) for entry in [*student.parameters(), *method.parameters()]} - {id(student.conv.weight)}
    assert sorted(id(entry) for entry in learner.parameters) == sorted(wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("momentum", {"no_such_option": 1}),
        ("momentum", {"lr": 1.0}),
        ("momentum", {"layer_decay": 0.5}),
        ("adamw", {"betas": [0.9]}),
        ("adamw", {"betas": 0.9}),
        ("adamw", {"betas": [2.0, 0.9]}),
        ("adamw", {"eps": "small"}),
    ],
)
def test_an_option_that_the_optimizer_cannot_use_is_a_config_error(name, options):
    with pytest.raises(ConfigError, match=rf"recipe\.optimizer={name}"):
        make_optimizer(recipe(optimizer=name, optimizer_options=options), TinyNetwork())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {"no_such_option": 1}),
        ("cosine", {"num_epochs": 3}),
        ("cosine", {"cycle_mul": "twice"}),
        ("cosine", {"noise": "some"}),
        ("cosine", {"step_on_epochs": False, "updates_per_epoch": 1}),
        ("step", {"decay_epochs": 0}),
        ("step", {"decay_epochs": "often"}),
        ("plateau", {"plateau_mode": "sideways"}),
        ("plateau", {"patience_epochs": "long"}),
    ],
)
def test_an_option_that_the_scheduler_cannot_use_is_a_config_error_before_training(name, options):
    how = recipe(epochs=40, scheduler=name, scheduler_options=options)
    with pytest.raises(ConfigError, match=rf"recipe\.scheduler={name}"):
        Schedule(how, make_optimizer(how, TinyNetwork()))


def test_a_warm_up_without_a_first_rate_rises_evenly_and_loses_no_epoch():
    how = recipe(epochs=8, scheduler="cosine", learning_rate=0.2, warmup_epochs=4)
    assert rates(how)[:4] == pytest.approx([0.05, 0.0875, 0.125, 0.1625])
