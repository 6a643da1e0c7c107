"""The classic loop: it learns what it claims to learn, from the images it claims, and leaves no worker behind."""

import copy
import math
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from vkd.config import RecipeConfig
from vkd.data import ImageArrays
from vkd.data.augmentation import build_augmentations
from vkd.divergences import make_divergence
from vkd.methods import MethodContext, Output, Progress, make_method
from vkd.speed.classic import ClassicLoop, PhotoDataset, distillation_loss, make_transform
from vkd.training.learner import Learner
from vkd.training.precision import Precision

CPU = torch.device("cpu")
CLASSES, MEAN, STD = 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class TinyNetwork(nn.Module):
    """Convolution, BatchNorm and a classifier: images [B, 3, H, W] to logits [B, 4]."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 5, 3, padding=1)
            self.norm = nn.BatchNorm2d(5)
            self.fc = nn.Linear(5, CLASSES)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean(dim=(2, 3)))


def photos(count=24, size=(6, 8), channels=3):
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (count, *size, channels), dtype=np.uint8)
    return ImageArrays(images, np.arange(count, dtype=np.int64) % CLASSES)


def dataset(augmentation=None, **shape):
    images = photos(**shape)
    size, channels = images.images.shape[1:3], images.images.shape[3]
    augmentations = build_augmentations(augmentation or {}, "resident")
    return PhotoDataset(images, make_transform(augmentations, size, MEAN[:channels], STD[:channels]))


def make_loop(data=None, **options):
    given = {"batch_size": 8, "workers": 0, "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4, **options}
    return ClassicLoop(TinyNetwork(1), TinyNetwork(2), data or dataset(), device=CPU, **given)


def batches(count):
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 3, 6, 8, generator=random), torch.randint(0, CLASSES, (8,), generator=random))
        for _ in range(count)
    ]


def kd_learner(student, teacher):
    """vkd's own student in training, by kd with forward KL at its default weights."""
    context = MethodContext(
        divergence=make_divergence("fkld", temperature=4.0),
        num_classes=CLASSES,
        train_size=24,
        epochs=1,
        steps_per_epoch=3,
        student=student,
        teacher=teacher,
        image_shape=(3, 6, 8),
        generator=torch.Generator(),
    )
    recipe = RecipeConfig(
        epochs=1, batch_size=8, optimizer="momentum", learning_rate=0.05, momentum=0.9, weight_decay=5e-4
    )
    return Learner(
        student,
        make_method({"kd": {"weight": 0.9, "temperature_squared": True}}, context, 1),
        recipe,
        precision=Precision("fp32", CPU),
        cross_entropy_weight=0.1,
        seed=1,
        device=CPU,
    )


def test_it_learns_what_vkd_learns_by_kd_with_forward_kl_from_the_same_batches():
    loop = make_loop()
    teacher = TinyNetwork(2).eval()
    learner = kd_learner(TinyNetwork(1), teacher)
    for number, (images, targets) in enumerate(batches(4), start=1):
        loss = loop.step(images, targets)
        with torch.no_grad():
            output = Output(teacher(images))
        learner.start_epoch_sums()
        learner.step(images, output, targets, torch.arange(8), Progress(1, 1, number, 4))
        assert loss == pytest.approx(learner.epoch_figures()["loss"], rel=1e-5)
    mine, theirs = loop.student.state_dict(), learner.student.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


def test_its_loss_is_the_literatures_sum_by_plain_arithmetic():
    random = np.random.RandomState(5)
    student, teacher = 4 * random.randn(3, 5), 4 * random.randn(3, 5)
    targets = [4, 0, 2]
    expected = 0.0
    for row in range(3):
        total = sum(math.exp(value) for value in student[row])
        expected -= 0.1 * math.log(math.exp(student[row][targets[row]]) / total) / 3
        p = [math.exp(value / 4) for value in teacher[row]]
        q = [math.exp(value / 4) for value in student[row]]
        for k in range(5):
            p_k, q_k = p[k] / sum(p), q[k] / sum(q)
            expected += 0.9 * 16 * p_k * math.log(p_k / q_k) / 3
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(targets))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_teacher_stays_as_it_was_and_the_student_does_not():
    loop = make_loop()
    before = copy.deepcopy((loop.teacher.state_dict(), loop.student.state_dict()))
    with loop.running():
        loop.take_steps(2)
    assert all(torch.equal(value, before[0][name]) for name, value in loop.teacher.state_dict().items())
    assert not torch.equal(loop.student.conv.weight, before[1]["conv.weight"])
    assert loop.steps == 2
    assert math.isfinite(loop.loss_sum)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_without_augmentation_are_the_stored_ones_normalised(channels):
    data = dataset(channels=channels)
    for index in (0, 7):
        image, label = data[index]
        stored = data.images.images[index].astype(np.float64)
        expected = (stored / 255 - MEAN[:channels]) / STD[:channels]
        np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
        assert label == index % CLASSES


def test_crop_and_flip_give_the_views_that_the_data_set_has_and_no_others():
    data = dataset({"crop": {"padding": 1}, "flip": {}}, count=1)
    stored = np.pad(data.images.images[0], ((1, 1), (1, 1), (0, 0)))
    views = set()
    for top in range(3):
        for left in range(3):
            cut = stored[top : top + 6, left : left + 8]
            views |= {cut.tobytes(), np.ascontiguousarray(cut[:, ::-1]).tobytes()}
    seen = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(300):
            pixels = (data[0][0].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
            seen.add(pixels.round().to(torch.uint8).numpy().tobytes())
    assert seen == views


def test_it_goes_through_all_images_before_it_sees_one_again():
    seen = []

    class Noting(PhotoDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    plain = dataset()
    loop = make_loop(Noting(plain.images, plain.transform))
    with loop.running():
        loop.take_steps(6)
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:]


def test_workers_work_as_long_as_it_runs_and_no_longer():
    loop = make_loop(workers=2)
    with loop.running():
        loop.take_steps(1)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    with loop.running():
        loop.take_steps(1)
    assert loop.steps == 2
    assert multiprocessing.active_children() == []
