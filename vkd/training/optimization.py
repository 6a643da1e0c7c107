"""Optimizers and schedules, by timm's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from vkd.config import RecipeConfig
from vkd.errors import ConfigError


def optimizer_names() -> list[str]:
    """The names that `recipe.optimizer` may take."""
    return list_optimizers()


def scheduler_names() -> list[str]:
    """The names that `recipe.scheduler` may take."""
    return ["none", "cosine", "tanh", "step", "multistep", "plateau", "poly"]


def make_optimizer(
    recipe: RecipeConfig, student: nn.Module, extra_parameters: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the student's parameters and those of its methods.

    Weight decay reaches every parameter, as in the CIFAR literature, unless `decay_norm_and_bias` is false; then it
    spares biases and one-dimensional weights.

    Raises ConfigError when the optimizer refuses its options.
    """
    if recipe.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": [entry for entry in student.parameters() if entry.requires_grad]}]
    else:
        groups = param_groups_weight_decay(student, recipe.weight_decay)
    extra = [entry for entry in extra_parameters if entry.requires_grad]
    if extra:
        groups.append({"params": extra})
    try:
        return create_optimizer_v2(
            groups,
            opt=recipe.optimizer,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=False,
            **recipe.optimizer_options,
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"recipe.optimizer={recipe.optimizer} refuses its settings: {error}",
            expected="options that this optimizer takes",
            hint="recipe.optimizer_options={}",
        ) from error


class Schedule:
    """The learning rate of every epoch: a timm scheduler, asked once an epoch.

    timm's multi-step schedule lowers the rate one epoch before its milestone is complete (it compares with t + 1), so
    milestones are shifted: after epoch 150 means that epoch 151 is the first one with the lower rate.

    There is no state to save: telling a new schedule about the epochs that are done brings it to the same place.

    Raises ConfigError when the scheduler refuses its options.
    """

    def __init__(self, recipe: RecipeConfig, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.watches_metric = recipe.scheduler == "plateau"
        self.scheduler = None
        if recipe.scheduler == "none":
            return
        try:
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=recipe.scheduler,
                num_epochs=recipe.epochs,
                decay_milestones=[epoch + 1 for epoch in recipe.milestones],
                decay_rate=recipe.decay_rate,
                warmup_epochs=recipe.warmup_epochs,
                warmup_lr=recipe.warmup_learning_rate,
                min_lr=recipe.min_learning_rate,
                **{"cooldown_epochs": 0, "plateau_mode": "max", **recipe.scheduler_options},
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"recipe.scheduler={recipe.scheduler} refuses its settings: {error}",
                expected="keyword arguments of timm.scheduler.create_scheduler_v2",
                hint="recipe.scheduler_options={}",
            ) from error

    def epoch_done(self, epoch: int, metric: float | None) -> None:
        """Set the rate of the epoch after `epoch` (counted from 1).

        Args:
            epoch: the epoch that is complete.
            metric: validation accuracy after it, which `plateau` watches; None in epochs without an evaluation.
        """
        if self.scheduler is None or (self.watches_metric and metric is None):
            return
        self.scheduler.step(epoch, metric)

    @property
    def learning_rate(self) -> float:
        """The rate in force, of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])
