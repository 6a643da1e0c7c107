"""Optimizers and schedules, by timm's names."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from vkd.config import RecipeConfig
from vkd.errors import ConfigError

_SECOND_ORDER = ("adahessian",)
"""Optimizers that want gradients of gradients, which a step does not compute."""

_FACTORY_OPTIONS = set(inspect.signature(create_optimizer_v2).parameters) - {"kwargs", "foreach"}
"""What timm's factory takes for itself: as an option of the optimizer it would be ignored in silence."""


def optimizer_names() -> list[str]:
    """The names that `recipe.optimizer` may take."""
    return list_optimizers(exclude_filters=list(_SECOND_ORDER))


def scheduler_names() -> list[str]:
    """The names that `recipe.scheduler` may take."""
    return ["none", "cosine", "tanh", "step", "multistep", "plateau", "poly"]


def make_optimizer(
    recipe: RecipeConfig,
    student: nn.Module,
    extra_parameters: Iterable[nn.Parameter] = (),
    *,
    fused: bool = False,
    capturable: bool = False,
    where: str = "recipe",
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the student's parameters and those of its methods.

    Weight decay reaches every parameter, as in the CIFAR literature, unless `decay_norm_and_bias` is false; then it
    spares biases and one-dimensional weights, those of the methods too.

    Args:
        recipe: optimizer, rate, weight decay and options.
        student: the network.
        extra_parameters: those of its methods.
        fused: take the optimizer's fused implementation, where it has one and the recipe's options do not choose.
        capturable: let it count its steps on the device, as a CUDA graph wants it, under the same condition.
        where: the config path of the recipe, for the message.

    Raises ConfigError when the optimizer refuses its options.
    """
    if recipe.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": [entry for entry in student.parameters() if entry.requires_grad]}]
    else:
        groups = param_groups_weight_decay(student, recipe.weight_decay)
    extra = [entry for entry in extra_parameters if entry.requires_grad]
    spared = [] if recipe.decay_norm_and_bias else [entry for entry in extra if entry.ndim <= 1]
    decayed = extra if recipe.decay_norm_and_bias else [entry for entry in extra if entry.ndim > 1]
    groups += [{"params": decayed}] * bool(decayed) + [{"params": spared, "weight_decay": 0.0}] * bool(spared)
    try:
        ignored = sorted(_FACTORY_OPTIONS & set(recipe.optimizer_options))
        if ignored:
            raise TypeError(f"{', '.join(ignored)} is not an option of its own")
        wanted = {"fused": fused, "capturable": capturable}
        implementation = {name: True for name, value in wanted.items() if value and _has(recipe, name)}
        return create_optimizer_v2(
            groups,
            opt=recipe.optimizer,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=False,
            **implementation,
            **recipe.optimizer_options,
        )
    except (TypeError, ValueError, AssertionError, ImportError, LookupError, RuntimeError) as error:
        raise ConfigError(
            f"{where}.optimizer={recipe.optimizer} refuses its settings: {error}",
            expected="options that this optimizer takes",
            hint=f"{where}.optimizer_options={{}}",
        ) from error


def _has(recipe: RecipeConfig, implementation: str) -> bool:
    """Whether the optimizer has such an implementation and its options do not name one themselves."""
    options = inspect.signature(get_optimizer_class(recipe.optimizer, bind_defaults=False)).parameters
    chosen = {"fused", "foreach", "differentiable", "capturable"} & set(recipe.optimizer_options)
    return implementation in options and not chosen


class Schedule:
    """The learning rate of every epoch: a timm scheduler, asked once an epoch.

    timm's multi-step schedule lowers the rate one epoch before its milestone is complete (it compares with t + 1), so
    milestones are shifted: after epoch 150 means that epoch 151 is the first one with the lower rate.

    There is no state to save: telling a new schedule about the epochs that are done brings it to the same place.

    Raises ConfigError when the scheduler refuses its options.
    """

    def __init__(self, recipe: RecipeConfig, optimizer: torch.optim.Optimizer, *, where: str = "recipe") -> None:
        self.recipe = recipe
        self.optimizer = optimizer
        self.watches_metric = recipe.scheduler == "plateau"
        self.scheduler = None
        if recipe.scheduler == "none":
            return
        try:
            _rehearse(recipe)
            self.scheduler = _make_scheduler(recipe, optimizer)
        except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
            raise ConfigError(
                f"{where}.scheduler={recipe.scheduler} refuses its settings: {error}",
                expected="keyword arguments of timm.scheduler.create_scheduler_v2",
                hint=f"{where}.scheduler_options={{}}",
            ) from error

    def epoch_done(self, epoch: int, metric: float | None) -> None:
        """Set the rate of the epoch after `epoch` (counted from 1).

        Args:
            epoch: the epoch that is complete.
            metric: validation accuracy after it, which `plateau` watches; None in epochs without an evaluation.
        """
        if self.scheduler is None:
            return
        # The warm-up of `plateau` goes by epochs, what comes after it by evaluations.
        if self.watches_metric and metric is None and epoch > self.recipe.warmup_epochs:
            return
        self.scheduler.step(epoch, metric)

    @property
    def learning_rate(self) -> float:
        """The rate in force, of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])


def _make_scheduler(recipe: RecipeConfig, optimizer: torch.optim.Optimizer) -> Any:
    with warnings.catch_warnings():
        # timm warns that plateau's state is not saved; it is rebuilt from the run's history here.
        warnings.simplefilter("ignore", FutureWarning)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.scheduler,
            num_epochs=recipe.epochs,
            decay_milestones=[epoch + 1 for epoch in recipe.milestones],
            decay_rate=recipe.decay_rate,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=_first_rate(recipe),
            min_lr=recipe.min_learning_rate,
            **{"cooldown_epochs": 0, "plateau_mode": "max", **recipe.scheduler_options},
        )
    return scheduler


def _first_rate(recipe: RecipeConfig) -> float:
    """The rate of the first epoch of a warm-up; from 0 that epoch would be lost."""
    if recipe.warmup_learning_rate is not None:
        return recipe.warmup_learning_rate
    return recipe.learning_rate / max(1, recipe.warmup_epochs)


def _rehearse(recipe: RecipeConfig) -> None:
    """Go through the whole schedule on an optimizer of no importance, so that it fails here and not in epoch 90."""
    if not recipe.scheduler_options.get("step_on_epochs", True):
        raise ValueError("step_on_epochs=False, but the rate is set once an epoch")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
    scheduler = _make_scheduler(recipe, optimizer)
    for epoch in range(1, recipe.epochs + 1):
        rate = optimizer.param_groups[0]["lr"]
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"it gives epoch {epoch} the learning rate {rate}")
        scheduler.step(epoch, 0.0)
