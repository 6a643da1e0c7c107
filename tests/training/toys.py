"""Networks of ten lines, fifty random images, and everything that a run of a second needs around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from vkd.config import DatasetConfig, RecipeConfig, config_directory
from vkd.data import Data, Normalization, load_data
from vkd.divergences import make_divergence
from vkd.methods import METHODS, Batch, Combination, Method, MethodContext, Output, Progress, make_method
from vkd.training.display import LineDisplay
from vkd.training.interruption import Interrupted
from vkd.training.learner import Learner
from vkd.training.measurement import Evaluator, split_logits
from vkd.training.precision import Precision
from vkd.training.session import Record, Session
from vkd.training.teacher import Teacher
from vkd.training.trainer import Trainer

CPU = torch.device("cpu")
CLASSES, CHANNELS, SIZE = 4, 3, (6, 6)


class TinyNetwork(nn.Module):
    """Convolution, BatchNorm, dropout and a classifier: images [B, 3, H, W] to logits [B, classes]."""

    def __init__(self, seed: int = 0, classes: int = CLASSES, dropout: float = 0.2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(CHANNELS, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(6, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.norm(self.conv(images)).relu().mean(dim=(2, 3))))


class DrawnProjection(Method):
    """A method with parameters, a buffer and draws of its own."""

    uses_divergence = False

    def __init__(self, context: MethodContext, *, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.projection = nn.Linear(context.num_classes, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.generator = context.generator

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        noise = torch.rand(len(batch.targets), 1, generator=self.generator)
        self.seen += 1
        gap = self.projection(batch.student.logits) - noise * batch.teacher.logits[:, :3]
        return {"match": self.weight * gap.square().mean() / self.seen, "bias": self.projection.bias.square().sum()}


class Spy(nn.Module):
    """Keeps every batch that a method is shown."""

    needs_features, views = False, 1

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.batches.append(batch)
        return {"spy": batch.student.logits.square().mean()}


class Counting(LineDisplay):
    """Counts steps and shows nothing."""

    def __init__(self) -> None:
        self.steps = 0

    def step_done(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        self.steps += 1

    def epoch_done(self, figures: dict[str, Any]) -> None:
        pass


def write_images(root: Path, *, train: int = 42, test: int = 14, classes: int = CLASSES, test_labels=None) -> None:
    """Packed files of random images whose brightness hints at their class."""
    random = np.random.RandomState(0)
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count, dtype=np.int64) % classes
        pixels = random.randint(0, 100, (count, *SIZE, CHANNELS)) + 40 * labels[:, None, None, None]
        if split == "test" and test_labels is not None:
            labels = np.asarray(test_labels, dtype=np.int64)
        (root / "toy").mkdir(parents=True, exist_ok=True)
        names = np.array([f"class {index}" for index in range(classes)])
        images = np.clip(pixels, 0, 255).astype(np.uint8)
        np.savez(root / "toy" / f"{split}.npz", images=images, labels=labels, class_names=names)


def toy_data(root: Path, *, val_fraction: float = 0.25, augmentation: dict | None = None, **images: Any) -> Data:
    """Thirty training images with flips and crops, twelve for validation, fourteen for testing."""
    write_images(root, **images)
    augmentation = {"crop": {"padding": 1}, "flip": {}} if augmentation is None else augmentation
    config = DatasetConfig(
        name="toy", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], val_fraction=val_fraction, augmentation=augmentation
    )
    return load_data(config, root, device=CPU)


def recipe(**fields: Any) -> RecipeConfig:
    """Three epochs of SGD with momentum over batches of eight, with any field replaced."""
    given = {"epochs": 3, "batch_size": 8, "optimizer": "momentum", "learning_rate": 0.05, "weight_decay": 5e-4}
    return RecipeConfig(**{**given, **fields})


def toy_teacher(data: Data, *, precision: str = "fp32", mean=None, std=None, seed: int = 7) -> Teacher:
    """A frozen network whose BatchNorm has statistics of its own."""
    model = TinyNetwork(seed, data.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    model.eval().requires_grad_(False)
    normalization = Normalization(mean or data.mean, std or data.std, data.channels)
    logits = {
        split: split_logits(model, data, split, normalization, batch_size=5)[0]
        for split in ("val", "test")
        if split in data.splits_present
    }
    return Teacher(
        model=model,
        normalization=normalization,
        shares_normalization=mean is None,
        precision=Precision(precision, CPU),
        arch="tiny",
        source="checkpoint",
        sha256="0",
        saw_val="unknown",
        logits=logits,
    )


def context_for(*, classes: int = CLASSES, temperature: float = 4.0) -> MethodContext:
    return MethodContext(
        divergence=make_divergence("fkld", temperature=temperature),
        num_classes=classes,
        train_size=30,
        epochs=3,
        steps_per_epoch=4,
        student=TinyNetwork(1, classes),
        teacher=TinyNetwork(2, classes),
        image_shape=(CHANNELS, *SIZE),
        generator=torch.Generator(),
    )


def configured(name: str) -> dict[str, Any]:
    """The parameters of a method as its file in conf/ has them."""
    path = config_directory() / "method" / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def toy_method(*names: str, seed: int = 1, classes: int = CLASSES) -> Combination:
    return make_method({name: configured(name) for name in names}, context_for(classes=classes), seed)


def toy_learner(
    how: RecipeConfig | None = None,
    *,
    method: nn.Module | None = None,
    precision: str = "fp32",
    seed: int = 1,
    init: int = 3,
    student: nn.Module | None = None,
    **options: Any,
) -> Learner:
    return Learner(
        TinyNetwork(init) if student is None else student,
        toy_method("kd") if method is None else method,
        how or recipe(),
        precision=Precision(precision, CPU),
        cross_entropy_weight=options.pop("cross_entropy_weight", 0.1),
        seed=seed,
        device=CPU,
        **options,
    )


def random_batch(step: int, *, count: int = 8, classes: int = CLASSES) -> tuple[Any, ...]:
    """What `Learner.step` takes, another batch for every step."""
    random = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(count, CHANNELS, *SIZE, generator=random)
    logits = 3 * torch.randn(count, classes, generator=random)
    targets = torch.randint(0, classes, (count,), generator=random)
    return images, Output(logits), targets, torch.arange(count), Progress(1, 3, step, 12)


def rig(
    data: Data,
    how: RecipeConfig | None = None,
    *,
    checkpoint: Path | None = None,
    teacher: Teacher | None = None,
    plain: bool = False,
    method: nn.Module | None = None,
    stop_after: int | None = None,
    stop_after_epoch: int | None = None,
    fingerprint: str = "f" * 64,
    display: Any = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
    evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
    **learner_options: Any,
) -> SimpleNamespace:
    """A trainer with one session, and all its parts."""
    how = how or recipe()
    precision = learner_options.get("precision", "fp32")
    teacher = None if plain else teacher or toy_teacher(data, precision=precision)
    method = Combination({}) if plain else method
    learner = toy_learner(how, method=method, cross_entropy_weight=1.0 if plain else 0.1, **learner_options)
    normalization = Normalization(data.mean, data.std, data.channels)
    logits = {} if teacher is None else teacher.logits
    evaluator = Evaluator(data, normalization, teacher_logits=logits, batch_size=5, device=CPU)
    done_epochs: list[int] = []

    def epoch_done(line: dict[str, Any]) -> None:
        done_epochs.append(line["epoch"])
        on_epoch(line)

    session = Session(
        learner, evaluate or evaluator, fingerprint=fingerprint, checkpoint_path=checkpoint, on_epoch=epoch_done
    )
    display = display or Counting()
    trainer = Trainer(
        [session],
        teacher=teacher,
        data=data,
        recipe=how,
        normalization=normalization,
        seed=1,
        device=CPU,
        display=display,
        should_stop=lambda: display.steps == stop_after or stop_after_epoch in done_epochs,
    )
    return SimpleNamespace(
        trainer=trainer, session=session, learner=learner, teacher=teacher, display=display, evaluator=evaluator
    )


TIMING = ("seconds", "images_per_second")


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in history]


def outcome(parts: SimpleNamespace, record: Record | None = None) -> dict[str, Any]:
    """Train to the end, unless a record is given: everything about the run that must not depend on interruptions."""
    record = record or parts.trainer.fit()[0]
    state = parts.learner.state_dict()
    return copy.deepcopy(
        {
            "student": state["student"],
            "average": state["average"],
            "method": state["method"],
            "optimizer": state["optimizer"]["state"],
            "precision": state["precision"],
            "history": timeless(record.history),
            "metrics": record.metrics,
        }
    )


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nests of tensors and numbers are not bit for bit the same."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        if not isinstance(other, dict) or list(one) != list(other):
            return [f"{path}: keys"]
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: length"]
        pairs = zip(one, other, strict=True)
        return [found for index, (a, b) in enumerate(pairs) for found in differences(a, b, f"{path}/{index}")]
    return [] if one == other else [f"{path}: {one} != {other}"]


def interrupted_run(data: Data, path: Path, how: RecipeConfig | None = None, **options: Any) -> SimpleNamespace:
    """Train until the stop that `options` ask for; the checkpoint lies at `path` then."""
    parts = rig(data, how, checkpoint=path, **options)
    try:
        parts.trainer.fit()
    except Interrupted:
        return parts
    raise AssertionError("it was not interrupted")


def registered(monkeypatch: Any, name: str, method: type[Method]) -> None:
    """Register a method for the duration of a test."""
    monkeypatch.setitem(METHODS._entries, name, method)
