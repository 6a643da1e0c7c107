"""The classic loop of knowledge distillation, against which vkd is measured.

What published code does: worker processes augment one image after the other with torchvision's transforms of PIL
images, networks run in float32 and in contiguous layout, the teacher in eval mode without gradient, the loss is
torch's `kl_div` beside the cross-entropy, and every step asks the device for the loss and the accuracy. Nothing of
vkd's trainer, data pipeline or divergences is in it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from vkd.data.augmentation import AutoAugment, Crop, Flip, ImageAugmentation, RandomResizedCrop
from vkd.data.sources import ImageArrays, Images

TEMPERATURE = 4.0
CROSS_ENTROPY_WEIGHT, KD_WEIGHT = 0.1, 0.9
"""The literature's, as vkd's defaults are; speed does not depend on them."""

ENDLESS = 10**9
"""Images that a pass over the loader may take, more than anybody waits for."""


class PhotoDataset(Dataset):
    """Labelled images that are transformed one by one.

    Args:
        images: arrays or files.
        transform: from a PIL image to a tensor [C, H, W].
    """

    def __init__(self, images: Images, transform: transforms.Compose) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if isinstance(self.images, ImageArrays):
            pixels = self.images.images[index]
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        else:
            with Image.open(Path(self.images.root, self.images.paths[index])) as file:
                image = file.convert("RGB")
        return self.transform(image), int(self.images.labels[index])


def make_transform(
    augmentations: Sequence[ImageAugmentation],
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop_fraction: float | None = None,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
) -> transforms.Compose:
    """The same augmentations by torchvision's transforms of PIL images, then `ToTensor` and `Normalize`.

    Args:
        augmentations: as the data set's config has them.
        image_size: (height, width) in pixels.
        mean, std: per channel, for pixels in [0, 1].
        crop_fraction: of images that have sizes of their own, where no augmentation resizes: share of the resized
            image's shorter side that a centre crop keeps; None for images of one size.
        interpolation: how images are resized.
    """
    steps: list[nn.Module] = []
    if crop_fraction is not None and not any(isinstance(entry, RandomResizedCrop) for entry in augmentations):
        side = round(image_size[0] / crop_fraction)
        steps += [transforms.Resize(side, interpolation), transforms.CenterCrop(image_size)]
    for entry in augmentations:
        if isinstance(entry, Crop):
            steps.append(transforms.RandomCrop(image_size, padding=entry.padding))
        elif isinstance(entry, Flip):
            steps.append(transforms.RandomHorizontalFlip(entry.p))
        elif isinstance(entry, RandomResizedCrop):
            resized = transforms.RandomResizedCrop(image_size, entry.scale, entry.ratio, interpolation)
            steps.append(resized)
        elif isinstance(entry, AutoAugment):
            steps.append(transforms.AutoAugment(entry.policy))
        else:
            steps.append(entry.transform(image_size[0], interpolation))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """0.1 cross-entropy + 0.9 T^2 KL(p || q) at T = 4, from logits [B, C] and labels [B]; a scalar."""
    student = functional.log_softmax(student_logits / TEMPERATURE, dim=1)
    teacher = functional.softmax(teacher_logits / TEMPERATURE, dim=1)
    divergence = functional.kl_div(student, teacher, reduction="batchmean") * TEMPERATURE**2
    return CROSS_ENTROPY_WEIGHT * functional.cross_entropy(student_logits, targets) + KD_WEIGHT * divergence


def _leave_interrupts(_worker: int) -> None:
    """Leaves Ctrl-C, which a terminal sends to workers too, to the process that started them; SIGTERM ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class ClassicLoop:
    """A student in training by the classic loop.

    Args:
        student, teacher: the networks, on the CPU.
        dataset: training images.
        batch_size: images a step.
        workers: processes that read and augment; 0 does it in this one.
        device: where the networks run.
        learning_rate, momentum, weight_decay: of SGD.
        teacher_image_size: (height, width) that the teacher wants its images in; None for theirs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        teacher_image_size: tuple[int, int] | None = None,
    ) -> None:
        self.student = student.to(device).train()
        self.teacher = teacher.to(device).eval()
        self.device = device
        self.teacher_image_size = teacher_image_size
        # One pass without an end, reshuffled whenever every image was seen: published code starts its workers again
        # for every epoch, which would cost data sets of a few batches more than their training.
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=RandomSampler(dataset, num_samples=ENDLESS),
            num_workers=workers,
            worker_init_fn=_leave_interrupts,
        )
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), learning_rate, momentum=momentum, weight_decay=weight_decay
        )
        self.loss_sum, self.accuracy_sum, self.steps = 0.0, 0.0, 0
        self._batches: Iterator[list[Tensor]] | None = None

    @property
    def queue(self) -> int:
        """How many batches may wait in the workers' queue."""
        return self.loader.num_workers * (self.loader.prefetch_factor or 0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Workers exist as long as this lasts, so that they take nothing from whoever is measured next."""
        chosen = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        self._batches = iter(self.loader)
        try:
            yield
        finally:
            self._batches = None  # ends the workers and waits for them
            torch.backends.cudnn.benchmark = chosen

    def take_steps(self, count: int) -> None:
        """The next steps; within `running`."""
        for _ in range(count):
            images, targets = next(self._batches)
            self.step(images, targets)

    def step(self, images: Tensor, targets: Tensor) -> float:
        """Learn from normalised images [B, C, H, W] with labels [B], on the CPU; the loss."""
        images, targets = images.to(self.device), targets.to(self.device)
        with torch.no_grad():
            teacher_logits = self.teacher(self._for_teacher(images))
        logits = self.student(images)
        loss = distillation_loss(logits, teacher_logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        correct = (logits.argmax(dim=1) == targets).float().mean()
        value = loss.item()
        self.loss_sum += value
        self.accuracy_sum += correct.item()
        self.steps += 1
        return value

    def _for_teacher(self, images: Tensor) -> Tensor:
        if self.teacher_image_size is None:
            return images
        return functional.interpolate(images, self.teacher_image_size, mode="bilinear", antialias=True)
