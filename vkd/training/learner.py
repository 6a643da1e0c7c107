"""One student in training: its weights, optimizer, schedule, running sums, and how they are saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from vkd.config import RecipeConfig
from vkd.errors import TrainingError
from vkd.methods import Batch, Combination, Output, Progress
from vkd.models import Intermediates
from vkd.randomness import derive_seed
from vkd.training.forward import forward
from vkd.training.optimization import Schedule, make_optimizer
from vkd.training.precision import Precision


class Learner:
    """A student and everything of its own. It knows no data and no teacher: the trainer hands it batches.

    Args:
        student: the network, already on its device.
        method: how it is taught; an empty combination for plain training.
        recipe: epochs, optimizer, schedule, clipping, moving average.
        precision: fp32, bf16 or fp16.
        cross_entropy_weight: weight of the cross-entropy with the labels.
        seed: of the run; dropout gets a stream of its own from it.
        device: where it trains.
        intermediates: runs the student where the method asks for its features.
        compile: compile the student's forward pass.
        fused_optimizer: take the optimizer's fused implementation.
    """

    def __init__(
        self,
        student: nn.Module,
        method: Combination,
        recipe: RecipeConfig,
        *,
        precision: Precision,
        cross_entropy_weight: float,
        seed: int,
        device: torch.device,
        intermediates: Intermediates | None = None,
        compile: bool = False,
        fused_optimizer: bool = False,
    ) -> None:
        self.student = student
        self.intermediates = intermediates
        self.method = method
        self.recipe = recipe
        self.precision = precision
        self.cross_entropy_weight = cross_entropy_weight
        self.device = device
        self.optimizer = make_optimizer(recipe, student, method.parameters(), fused=fused_optimizer)
        self.parameters = [entry for group in self.optimizer.param_groups for entry in group["params"]]
        self.schedule = Schedule(recipe, self.optimizer)
        self.average = None if recipe.ema_decay is None else ModelEmaV3(student, decay=recipe.ema_decay)
        if compile:
            (student if intermediates is None else intermediates).compile()
        self._random_states = _seeded_states(derive_seed(seed, "dropout"), device)
        self.start_epoch_sums()

    @property
    def evaluated_model(self) -> nn.Module:
        """What is measured and saved: the student, or the moving average of its weights."""
        return self.student if self.average is None else self.average.module

    def start_epoch_sums(self) -> None:
        """Forget the running sums of the epoch before."""
        self.term_sums: dict[str, Tensor] = {}
        self.first_not_finite: dict[str, Tensor] = {}
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.images = 0
        self.steps = 0

    def step(
        self,
        images: Tensor,
        teacher: Output | None,
        targets: Tensor,
        indices: Tensor,
        progress: Progress,
        views: Sequence[tuple[Tensor, Output | None]] = (),
    ) -> None:
        """Learn from one batch. Nothing in here waits for the device.

        Args:
            images: normalised for the student, [B, channels, height, width].
            teacher: the teacher's output on the same view; None in plain training.
            targets, indices: labels and positions in the training split, [B].
            progress: epoch and step.
            views: images and the teacher's output on each further view that the method wants.
        """
        self.student.train()
        self.method.train()
        with self._own_randomness():
            with self.precision.autocast():
                student = forward(self.student, self.intermediates, images)
                others = [
                    (forward(self.student, self.intermediates, view), output)
                    for view, output in views[: self.method.views - 1]
                ]
            terms = self._terms(Batch(student, teacher, targets, indices, progress, others))
            loss = sum(terms.values())
            self.precision.update(loss, self.optimizer, self.parameters, self.recipe.clip_grad_norm)
        if self.average is not None:
            self.average.update(self.student)
        self._add_up(terms, student.logits, targets, progress.step)

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        terms = {} if batch.teacher is None else self.method(batch)
        if self.cross_entropy_weight > 0:
            cross_entropy = functional.cross_entropy(
                batch.student.logits, batch.targets, label_smoothing=self.recipe.label_smoothing
            )
            terms = {"cross_entropy": self.cross_entropy_weight * cross_entropy, **terms}
        if not terms:
            raise TrainingError(
                "there is nothing to learn from: the method has no term and cross_entropy_weight is 0",
                expected="a weight above 0",
            )
        return terms

    def _add_up(self, terms: dict[str, Tensor], logits: Tensor, targets: Tensor, step: int) -> None:
        with torch.no_grad():
            for name, value in terms.items():
                value = value.detach().float()
                self.term_sums[name] = self.term_sums.get(name, torch.zeros_like(value)) + value * len(targets)
                first = self.first_not_finite.get(name, torch.full_like(value, -1, dtype=torch.int64))
                newly = ~value.isfinite() & (first < 0)
                self.first_not_finite[name] = torch.where(newly, torch.full_like(first, step), first)
            self.correct += (logits.detach().argmax(dim=-1) == targets).sum()
        self.images += len(targets)
        self.steps += 1

    def check_finite(self) -> None:
        """Raise TrainingError, naming the term and the step, when a loss of this epoch was not finite."""
        steps = {name: int(step) for name, step in self.first_not_finite.items()}
        bad = {name: step for name, step in steps.items() if step >= 0}
        if bad:
            name, step = min(bad.items(), key=lambda entry: entry[1])
            raise TrainingError(
                f"the loss is not finite: term {name!r} at step {step}",
                expected="finite loss terms",
                hint="a smaller recipe.learning_rate, recipe.clip_grad_norm=5, or precision=fp32 or bf16",
            )

    def epoch_figures(self) -> dict[str, float]:
        """Means over the epoch so far: every term, their sum `loss`, and `top1` in percent on the training batches."""
        terms = {name: total.item() / self.images for name, total in self.term_sums.items()}
        return {"loss": sum(terms.values()), **terms, "top1": 100.0 * self.correct.item() / self.images}

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on exactly needs."""
        return {
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "random_states": self._random_states,
            "method_random_states": {
                name: generator.get_state() for name, generator in _generators(self.method).items()
            },
            "sums": {
                "terms": self.term_sums,
                "first_not_finite": self.first_not_finite,
                "correct": self.correct,
                "images": self.images,
                "steps": self.steps,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.student.load_state_dict(state["student"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self._random_states = state["random_states"]
        for name, generator in _generators(self.method).items():
            generator.set_state(state["method_random_states"][name])
        sums = state["sums"]
        self.term_sums = {name: value.to(self.device) for name, value in sums["terms"].items()}
        self.first_not_finite = {name: value.to(self.device) for name, value in sums["first_not_finite"].items()}
        self.correct = sums["correct"].to(self.device)
        self.images, self.steps = sums["images"], sums["steps"]

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Let dropout draw from this student's stream, and leave torch's global one as it was."""
        outside = _get_states(self.device)
        _set_states(self._random_states, self.device)
        try:
            yield
        finally:
            self._random_states = _get_states(self.device)
            _set_states(outside, self.device)


def _generators(method: nn.Module) -> dict[str, torch.Generator]:
    """The generators that methods keep as attributes, by their path."""
    return {
        f"{path}.{name}": value
        for path, module in method.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }


def _seeded_states(seed: int, device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()
    return states


def _get_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
