"""The bound: what the networks, the loss and the optimizer cost by themselves on this machine.

Teacher, student, method and optimizer are those of a run, with the same switches, and learn from one batch that lies on
the device all the time. There is no data pipeline, no progress, no metric, no random state to keep apart and no look at
whether the loss is finite; where a run captures its step in a CUDA graph, the whole of this one is captured.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from vkd.methods import Batch, Output, Progress
from vkd.training.forward import forward
from vkd.training.graphs import WARM_UP_STEPS, CudaCapture, Replayable, first_cause
from vkd.training.trainer import Trainer

logger = logging.getLogger("vkd")


class BoundLoop:
    """Repeats one step of a trainer's first student on one batch.

    Args:
        trainer: the parts are taken from it, and it is not to be used any more. It has a teacher.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.teacher, self.switches, self.device = trainer.teacher, trainer.switches, trainer.device
        self.learner = trainer.sessions[0].learner
        recipe = trainer.recipe
        pixels = next(
            trainer.data.train_batches(seed=trainer.seed, epoch=1, batch_size=recipe.batch_size, drop_last=True)
        )
        self.images = trainer.normalization(pixels.images).contiguous(memory_format=trainer.layout)
        self.teacher_images = (
            self.images if self.teacher.shares_normalization else self.teacher.normalization(pixels.images)
        )
        self.targets, self.indices = pixels.targets.clone(), pixels.indices.clone()
        self.progress = Progress(1, recipe.epochs, 1, recipe.epochs * trainer.steps_per_epoch)
        self.learner.student.train()
        self.learner.method.train()
        self._graph: Replayable | None = None
        self._wants_graph = self.switches.graphs and self.learner.graph_obstacle() is None

    def take_steps(self, count: int) -> None:
        """Take the step so many times; the first call captures it where the switches say so."""
        if self._wants_graph:
            self._capture()
        for _ in range(count):
            if self._graph is None:
                self.step()
            else:
                self._graph.replay()

    def step(self, teacher: Output | None = None) -> Tensor:
        """Teacher forward, student forward and backward, optimizer; the loss.

        With the teacher's output given, it is not asked.
        """
        learner = self.learner
        teacher = teacher or self.ask_teacher()
        with learner.precision.autocast():
            student = forward(learner.student, learner.intermediates, self.images)
        terms = learner.method(Batch(student, teacher, self.targets, self.indices, self.progress))
        loss = sum(terms.values())
        if learner.cross_entropy_weight > 0:
            smoothing = learner.recipe.label_smoothing
            cross_entropy = functional.cross_entropy(student.logits, self.targets, label_smoothing=smoothing)
            loss = loss + learner.cross_entropy_weight * cross_entropy
        learner.precision.update(loss, learner.optimizer, learner.parameters, learner.recipe.clip_grad_norm)
        return loss.detach()

    def ask_teacher(self) -> Output:
        """The teacher's output on the batch."""
        teacher = self.teacher
        network = teacher.model if teacher.network is None else teacher.network
        with torch.inference_mode(), teacher.precision.autocast():
            output = forward(network, teacher.intermediates, self.teacher_images)
        # Tensors of inference mode cannot take part in a loss.
        return output.map(Tensor.clone)

    def _capture(self) -> None:
        """Make a CUDA graph of the step; where it cannot be captured, say so and take it as it is."""
        self._wants_graph = False
        capture = CudaCapture(self.device)
        for _ in range(WARM_UP_STEPS):
            capture.run(self.step)
        try:
            self._graph = capture.capture(self.step)
        except RuntimeError as error:
            logger.warning("the bound runs without a CUDA graph: %s", first_cause(error))
