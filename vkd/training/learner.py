"""One student in training: its weights, optimizer, schedule, running sums, and how they are saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from vkd.training.distribution import ONE, GradientSum, Processes
from vkd.training.forward import forward
from vkd.training.graphs import (
    BACKWARD_TOLERANCE,
    FORWARD_TOLERANCE,
    Capture,
    Graphed,
    NotCapturable,
    Watched,
    Written,
    step_obstacle,
)
from vkd.training.optimization import Schedule, make_optimizer
from vkd.training.precision import Precision
from vkd.training.random_states import get_states, seeded_states, set_states
from vkd.training.whole_batch import WholeBatch

_IMPLEMENTATIONS = ("fused", "foreach", "capturable")
"""Options of optimizers that say how they compute, and not what."""


@dataclass
class _Inputs:
    """What a step is given; see `Learner.step`."""

    images: Tensor
    teacher: Output | None
    targets: Tensor
    indices: Tensor
    progress: Progress
    views: Sequence[tuple[Tensor, Output | None]]
    whole: int

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        found = [self.images, self.targets, self.indices, *(images for images, _ in self.views)]
        outputs = [self.teacher, *(output for _, output in self.views)]
        return found + [entry for output in outputs if output is not None for entry in output.tensors]


class Learner:
    """A student and everything of its own. It knows no data and no teacher: the trainer hands it batches.

    Of several processes each has a share of every batch, and its sums over an epoch are summands of those of all.

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
        capturable_optimizer: take the implementation that CUDA graphs want.
        processes: those that train the student together.
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
        capturable_optimizer: bool = False,
        processes: Processes = ONE,
    ) -> None:
        self.processes = processes
        self.student = student
        self.intermediates = intermediates
        self.method = method
        self.recipe = recipe
        self.precision = precision
        self.cross_entropy_weight = cross_entropy_weight
        self.device = device
        self.optimizer = make_optimizer(
            recipe, student, method.parameters(), fused=fused_optimizer, capturable=capturable_optimizer
        )
        self.parameters = [entry for group in self.optimizer.param_groups for entry in group["params"]]
        self.schedule = Schedule(recipe, self.optimizer)
        self.average = None if recipe.ema_decay is None else ModelEmaV3(student, decay=recipe.ema_decay)
        if compile:
            (student if intermediates is None else intermediates).compile()
        self._add_up_gradients = GradientSum(self.parameters, processes) if processes.several else None
        # Dropout must not cut the same units from every share.
        stream = ("dropout",) if processes.is_first else ("dropout", processes.rank)
        self._random_states = seeded_states(derive_seed(seed, *stream), device)
        # All that a step adds to stays where it is, so that a captured step finds it.
        self._term_sums: dict[str, Tensor] = {}
        self._first_not_finite: dict[str, Tensor] = {}
        self._terms_of_epoch: dict[str, None] = {}
        self._terms_of_step: tuple[str, ...] = ()
        self._step_number = torch.zeros((), dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self._progress_read: set[str] = set()
        self._graphed: Graphed | None = None
        self.start_epoch_sums()

    @property
    def evaluated_model(self) -> nn.Module:
        """What is measured and saved: the student, or the moving average of its weights."""
        return self.student if self.average is None else self.average.module

    @property
    def term_sums(self) -> dict[str, Tensor]:
        """The sum of each loss term over the images of the epoch so far, scalars; of several processes a summand."""
        return {name: self._term_sums[name] for name in self._terms_of_epoch}

    @property
    def first_not_finite(self) -> dict[str, Tensor]:
        """The first step of the epoch at which each loss term was not finite; -1 where it always was."""
        return {name: self._first_not_finite[name] for name in self._terms_of_epoch}

    def start_epoch_sums(self) -> None:
        """Forget the running sums of the epoch before."""
        for total in (*self._term_sums.values(), self.correct):
            total.zero_()
        for first in self._first_not_finite.values():
            first.fill_(-1)
        self._terms_of_epoch = {}
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
        capture: Capture | None = None,
        whole: int | None = None,
    ) -> None:
        """Learn from one batch. Nothing in here waits for the device, except when a step is captured.

        Args:
            images: normalised for the student, [B, channels, height, width].
            teacher: the teacher's output on the same view; None in plain training.
            targets, indices: labels and positions in the training split, [B].
            progress: epoch and step.
            views: images and the teacher's output on each further view that the method wants.
            capture: captures the step, so that it is replayed from then on; the tensors are then the same ones, filled
                anew, at each call that has it. None: the step runs eagerly.
            whole: how many images the batch has, of which several processes have B each or so; None: these are all.
        """
        whole = len(targets) if whole is None else whole
        inputs = _Inputs(images, teacher, targets, indices, progress, views[: self.method.views - 1], whole)
        self._step_number.fill_(progress.step)
        with self._own_randomness():
            if capture is None:
                self._learn(inputs)
            else:
                self._captured_by(capture)(inputs)
        self._terms_of_epoch.update(dict.fromkeys(self._terms_of_step))
        self.images += whole
        self.steps += 1

    def _learn(self, inputs: _Inputs) -> None:
        """All of a step that the device does."""
        self.student.train()
        self.method.train()
        with self.precision.autocast():
            student = forward(self.student, self.intermediates, inputs.images)
            others = [(forward(self.student, self.intermediates, view), output) for view, output in inputs.views]
        batch = Batch(student, inputs.teacher, inputs.targets, inputs.indices, inputs.progress, others)
        terms = self._terms(batch, inputs.whole)
        loss = sum(terms.values())
        self.precision.update(loss, self.optimizer, self.parameters, self.recipe.clip_grad_norm, self._add_up_gradients)
        if self.average is not None:
            self.average.update(self.student)
        self._add_up(terms, student.logits, inputs)

    def _terms(self, batch: Batch, whole: int) -> dict[str, Tensor]:
        """The terms of the loss, or this process's summands of them."""
        fraction = len(batch.targets) / whole
        if batch.teacher is None:
            terms = {}
        elif self.processes.several:
            everything = WholeBatch(batch, self.processes, self.processes.sizes(whole))
            terms = self.method.summands(batch, fraction, everything, self.processes.world_size)
        else:
            terms = self.method(batch)
        if self.cross_entropy_weight > 0:
            cross_entropy = functional.cross_entropy(
                batch.student.logits, batch.targets, label_smoothing=self.recipe.label_smoothing
            )
            terms = {"cross_entropy": fraction * self.cross_entropy_weight * cross_entropy, **terms}
        if not terms:
            raise TrainingError(
                "there is nothing to learn from: the method has no term and cross_entropy_weight is 0",
                expected="a weight above 0",
            )
        return terms

    @torch.no_grad()
    def _add_up(self, terms: dict[str, Tensor], logits: Tensor, inputs: _Inputs) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self._make_sums(name)
            self._term_sums[name] += value * inputs.whole
            first = self._first_not_finite[name]
            newly = ~value.isfinite() & (first < 0)
            first.copy_(torch.where(newly, self._step_number, first))
        self.correct += (logits.detach().argmax(dim=-1) == inputs.targets).sum()
        self._terms_of_step = tuple(terms)

    def _make_sums(self, name: str) -> None:
        """Let there be running sums of a term."""
        if name not in self._term_sums:
            self._term_sums[name] = torch.zeros((), device=self.device)
            self._first_not_finite[name] = torch.full((), -1, dtype=torch.int64, device=self.device)

    def graph_obstacle(self) -> str | None:
        """Why its steps can be in no CUDA graph; None where nothing is known that speaks against it."""
        if _generators(self.method):
            return "its method draws random numbers on the host"
        return step_obstacle(self.method, self.optimizer, self.precision, self.device)

    def release_graph(self) -> None:
        """Let go of the captured step and its memory; the next step that is to be captured begins anew."""
        self._graphed = None

    def _captured_by(self, capture: Capture) -> Graphed:
        if self._graphed is None or self._graphed.capture is not capture:
            self._graphed = Graphed(
                "the student's step",
                self._learn_watched,
                written=self._written,
                baked=self._baked,
                capture=capture,
                device=self.device,
                obstacle=self.graph_obstacle(),
            )
        return self._graphed

    def _learn_watched(self, inputs: _Inputs) -> None:
        self._learn(replace(inputs, progress=Watched(inputs.progress, self._progress_read)))
        # A graph's gradients lie in its own memory, which the next one may have.
        self.optimizer.zero_grad(set_to_none=True)

    def _baked(self, inputs: _Inputs) -> Any:
        """What a captured step takes from the host. Raises NotCapturable where that is another thing at each step."""
        if "step" in self._progress_read:
            raise NotCapturable("its method looks at the number of the step")
        return (
            [
                {name: value for name, value in group.items() if name != "params"}
                for group in self.optimizer.param_groups
            ],
            {name: getattr(inputs.progress, name) for name in self._progress_read},
            [(entry.data_ptr(), entry.shape, entry.stride()) for entry in inputs.tensors()],
        )

    def _written(self) -> list[Written]:
        """All tensors that a step changes."""
        networks = [self.student, self.method]
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        average = [] if self.average is None else list(self.average.module.state_dict().values())
        sums = [
            Written(f"the loss term {name}", [total, self._first_not_finite[name]], FORWARD_TOLERANCE)
            for name, total in self._term_sums.items()
        ]
        return [
            *sums,
            Written("the count of hits", [self.correct], FORWARD_TOLERANCE),
            Written("buffers", [entry for network in networks for entry in network.buffers()], FORWARD_TOLERANCE),
            Written("weights", [entry for network in networks for entry in network.parameters()], BACKWARD_TOLERANCE),
            Written(
                "the optimizer's state", [entry for entry in states if isinstance(entry, Tensor)], BACKWARD_TOLERANCE
            ),
            Written("the moving average", average, BACKWARD_TOLERANCE),
        ]

    def check_finite(self) -> None:
        """Raise TrainingError, naming the term and the step, when a loss of this epoch was not finite.

        On several processes wherever it was so, and on all of them, which must call it together.
        """
        steps = {name: int(step) for name, step in self.first_not_finite.items()}
        bad = [(step, name) for name, step in steps.items() if step >= 0]
        if bad := [entry for found in self.processes.gather(bad) for entry in found]:
            step, name = min(bad, key=lambda entry: entry[0])
            raise TrainingError(
                f"the loss is not finite: term {name!r} at step {step}",
                expected="finite loss terms",
                hint="a smaller recipe.learning_rate, recipe.clip_grad_norm=5, or precision=fp32 or bf16",
            )

    def epoch_figures(self) -> dict[str, float]:
        """Means over the epoch so far: every term, their sum `loss`, and `top1` in percent on the training batches.

        Several processes must ask for them together, and get the same.
        """
        sums = dict(self.term_sums)
        correct = self.correct
        if self.processes.several:
            *totals, correct = (entry.clone() for entry in (*sums.values(), correct.float()))
            self.processes.sum_([*totals, correct])
            sums = dict(zip(sums, totals, strict=True))
        return self._means({name: total.item() for name, total in sums.items()}, correct.item())

    def running_figures(self) -> dict[str, float]:
        """The same to be looked at while the epoch lasts: of several processes, of the share of this one alone."""
        scale = self.processes.world_size
        sums = {name: scale * total.item() for name, total in self.term_sums.items()}
        return self._means(sums, scale * self.correct.item())

    def _means(self, sums: dict[str, float], correct: float) -> dict[str, float]:
        terms = {name: total / self.images for name, total in sums.items()}
        return {"loss": sum(terms.values()), **terms, "top1": 100.0 * correct / self.images}

    def align(self) -> None:
        """Let all processes have the first one's running statistics of BatchNorm, those of the moving average too.

        They are the same anyway unless each process normalises by its own share (`sync_batch_norm=false`). Several
        processes do this together, before they measure the student.
        """
        if self.processes.several:
            networks = [self.student] + ([] if self.average is None else [self.average.module])
            self.processes.broadcast_([entry for network in networks for entry in network.buffers()])

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on exactly needs.

        Of several processes too, which must call it together; weights, buffers and optimizer are the first one's.
        """
        first, *others = self.processes.gather(self._own_state())
        return {
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "method_random_states": {
                name: generator.get_state() for name, generator in _generators(self.method).items()
            },
            **first,
            "others": others,
        }

    def _own_state(self) -> dict[str, Any]:
        """What is not the same on all processes."""

        def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: entry.cpu() for name, entry in tensors.items()}

        return {
            "random_states": self._random_states,
            "sums": {
                "terms": on_host(self.term_sums),
                "first_not_finite": on_host(self.first_not_finite),
                "correct": self.correct.cpu(),
                "images": self.images,
                "steps": self.steps,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.release_graph()
        self.student.load_state_dict(state["student"])
        self.method.load_state_dict(state["method"])
        self._load_optimizer(state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        own = state if self.processes.is_first else state["others"][self.processes.rank - 1]
        self._random_states = own["random_states"]
        for name, generator in _generators(self.method).items():
            generator.set_state(state["method_random_states"][name])
        sums = own["sums"]
        self.start_epoch_sums()
        for name, total in sums["terms"].items():
            self._make_sums(name)
            self._term_sums[name].copy_(total)
            self._first_not_finite[name].copy_(sums["first_not_finite"][name])
        self._terms_of_epoch = dict.fromkeys(sums["terms"])
        self.correct.copy_(sums["correct"])
        self.images, self.steps = sums["images"], sums["steps"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load an optimizer's state, but go on computing as this one was made to, whatever the one before did."""
        groups = [
            {**saved, **{name: own[name] for name in _IMPLEMENTATIONS if name in own}}
            for saved, own in zip(state["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # A fused step walks through memory as it lies, and the checkpoint may have it in another layout.
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Let dropout draw from this student's stream, and leave torch's global one as it was."""
        outside = get_states(self.device)
        set_states(self._random_states, self.device)
        try:
            yield
        finally:
            self._random_states = get_states(self.device)
            set_states(outside, self.device)


def _generators(method: nn.Module) -> dict[str, torch.Generator]:
    """The generators that methods keep as attributes, by their path."""
    return {
        f"{path}.{name}": value
        for path, module in method.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Generator)
    }
