"""What is measured of a network on a split: accuracy, calibration, entropy, agreement with the teacher.

Every figure is a sum over images that is divided by their true number once, at the end, so neither the batch size nor a
short last batch changes it. Networks are measured in eval mode and float32, whatever precision they were trained in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vkd.data import Data, Normalization
from vkd.divergences import forward_kl
from vkd.training.distribution import ONE, Processes

CALIBRATION_BINS = 15
FIGURES = ("top1", "top5", "nll", "ece", "entropy", "agreement", "teacher_kl")
PERCENT_FIGURES = ("top1", "top5", "agreement")


class Measurement:
    """Running sums over the images of one split.

    Args:
        num_classes: C.
        with_teacher: whether `add` will get the teacher's logits.
        device: where the sums live, so that adding to them never waits.
    """

    def __init__(self, num_classes: int, *, with_teacher: bool, device: torch.device) -> None:
        # MPS has no float64; everywhere else sums of a million terms keep their digits.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.num_classes = num_classes
        self.with_teacher = with_teacher
        self.sums = {name: torch.zeros((), dtype=self.dtype, device=device) for name in FIGURES if name != "ece"}
        self.bins = torch.zeros(3, CALIBRATION_BINS, dtype=self.dtype, device=device)
        self.count = 0

    def add(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add a batch: student logits [B, C], labels [B] and, where there is a teacher, its logits [B, C]."""
        logits = logits.float()
        log_probabilities = functional.log_softmax(logits, dim=-1)
        probabilities = log_probabilities.exp()
        confidence = probabilities.amax(dim=-1)
        # Of the logits, since two that differ by little can have one probability in float32.
        predictions = logits.argmax(dim=-1)
        correct = predictions == targets
        self._sum("top1", correct)
        if self.num_classes > 5:
            self._sum("top5", (logits.topk(5, dim=-1).indices == targets[:, None]).any(dim=-1))
        self._sum("nll", functional.nll_loss(log_probabilities, targets, reduction="none"))
        self._sum("entropy", -(probabilities * log_probabilities).sum(dim=-1))
        # Bins are (k/15, (k+1)/15], as in Guo et al. 2017.
        bin_of = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, correct.float()]).to(self.dtype)
        self.bins.index_add_(1, bin_of, rows)
        if teacher_logits is not None:
            teacher_logits = teacher_logits.float()
            self._sum("agreement", predictions == teacher_logits.argmax(dim=-1))
            self._sum("teacher_kl", forward_kl(logits, teacher_logits, reduction="none"))
        self.count += len(targets)

    def _sum(self, name: str, values: Tensor) -> None:
        self.sums[name] += values.to(self.dtype).sum()

    def add_up(self, processes: Processes) -> None:
        """Put the sums over the images of all processes in the place of the own ones."""
        if not processes.several:
            return
        count = torch.tensor([self.count], dtype=self.dtype, device=self.bins.device)
        processes.sum_([*self.sums.values(), self.bins, count])
        self.count = int(count)

    def result(self) -> dict[str, float | None]:
        """The figures of all images added so far.

        top1, top5, agreement in percent (top5 is null where there are no more than five classes); nll, entropy and
        teacher_kl (KL(p||q) at temperature 1) in nats; ece, the expected calibration error over 15 equal bins (Guo et
        al., ICML 2017), from 0 to 1. What needs a teacher is null without one.
        """
        mean = {name: total.item() / self.count for name, total in self.sums.items()}
        _, confidence, correct = self.bins.tolist()
        gaps = sum(abs(one - other) for one, other in zip(confidence, correct, strict=True))
        return {
            "top1": 100 * mean["top1"],
            "top5": 100 * mean["top5"] if self.num_classes > 5 else None,
            "nll": mean["nll"],
            "ece": gaps / self.count,
            "entropy": mean["entropy"],
            "agreement": 100 * mean["agreement"] if self.with_teacher else None,
            "teacher_kl": mean["teacher_kl"] if self.with_teacher else None,
        }

    def reliability(self) -> dict[str, list]:
        """What a reliability diagram shows of all images added so far, by bin of the largest probability.

        Bin k of 15 is (k/15, (k+1)/15]. counts: images; confidence: the sum of their largest probabilities; correct:
        how many of them are classified rightly.
        """
        counts, confidence, correct = self.bins.tolist()
        return {"counts": [int(n) for n in counts], "confidence": confidence, "correct": [int(n) for n in correct]}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def split_logits(
    model: nn.Module,
    data: Data,
    split: str,
    normalization: Normalization,
    *,
    batch_size: int,
    processes: Processes = ONE,
) -> tuple[Tensor, Tensor]:
    """The network's logits [N, C], float32, and the labels [N] of every image of a split, in order, on its device.

    Several processes share the work, and each gets all of it.
    """
    logits, targets = [], []
    with evaluation_mode(model):
        for batch in data.eval_batches(split, batch_size=batch_size, part=processes.part):
            logits.append(model(normalization(batch.images)).float())
            targets.append(batch.targets)
        if not processes.several:
            return torch.cat(logits), torch.cat(targets)
        # A share may be empty.
        logits.append(torch.empty(0, data.num_classes, device=data.device))
        targets.append(torch.empty(0, dtype=torch.int64, device=data.device))
        sizes = processes.sizes(data.sizes[split])
        return processes.gather_rows(torch.cat(logits), sizes), processes.gather_rows(torch.cat(targets), sizes)


class Evaluator:
    """Measures a network on the splits that there are, as `val/top1`, `test/nll`, ...

    Args:
        data: the data set.
        normalization: of the network that is measured.
        teacher_logits: the teacher's logits [N, C] by split, in the split's order; empty without a teacher.
        batch_size: images a batch.
        device: where the network is.
        processes: each measures a part of the images, and all get the figures of all images.
    """

    def __init__(
        self,
        data: Data,
        normalization: Normalization,
        *,
        teacher_logits: Mapping[str, Tensor],
        batch_size: int,
        device: torch.device,
        processes: Processes = ONE,
    ) -> None:
        self.processes = processes
        self.data = data
        self.normalization = normalization
        self.teacher_logits = teacher_logits
        self.batch_size = batch_size
        self.device = device
        self._reliability: dict[str, dict[str, list] | None] = {}
        self._rate: float | None = None

    def __call__(self, model: nn.Module, splits: Sequence[str] = ("val", "test")) -> dict[str, float | None]:
        """Every figure on the splits; those of a split that is not there are null."""
        figures: dict[str, float | None] = {}
        began, images = time.perf_counter(), 0
        for split in splits:
            present = split in self.data.splits_present
            measurement = self._measure(model, split) if present else None
            # Reading the result waits for the device, so that the clock sees all of the work.
            measured = dict.fromkeys(FIGURES) if measurement is None else measurement.result()
            figures.update({f"{split}/{name}": value for name, value in measured.items()})
            self._reliability[split] = measurement and measurement.reliability()
            images += measurement.count if measurement else 0
        self._rate = images / (time.perf_counter() - began) if images else None
        return figures

    def details(self) -> dict[str, Any]:
        """What else the last call saw.

        reliability: by split, see `Measurement.reliability`; null for one that is not there.
        images_per_second: loaded, put through the network and measured.
        """
        return {"reliability": dict(self._reliability), "images_per_second": self._rate}

    def _measure(self, model: nn.Module, split: str) -> Measurement:
        teacher_logits = self.teacher_logits.get(split)
        measurement = Measurement(self.data.num_classes, with_teacher=teacher_logits is not None, device=self.device)
        seen = sum(self.processes.sizes(self.data.sizes[split])[: self.processes.rank])
        with evaluation_mode(model):
            for batch in self.data.eval_batches(split, batch_size=self.batch_size, part=self.processes.part):
                share = None if teacher_logits is None else teacher_logits[seen : seen + len(batch.targets)]
                measurement.add(model(self.normalization(batch.images)), batch.targets, share)
                seen += len(batch.targets)
        measurement.add_up(self.processes)
        return measurement
