"""The loop: what the teacher, the student and the method see, and what the record says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toys import (
    CHANNELS,
    Spy,
    TinyNetwork,
    differences,
    outcome,
    recipe,
    rig,
    toy_data,
    toy_teacher,
)

from vkd.data import Normalization
from vkd.errors import ConfigError, TrainingError
from vkd.methods import Combination, Method
from vkd.training.interruption import Interrupted


def watched(data, how=None, **options):
    """A finished run whose method kept every batch."""
    spy = Spy()
    parts = rig(data, how, method=Combination({"spy": spy}), **options)
    record = parts.trainer.fit()[0]
    return parts, record, spy.batches


def scripted(figures):
    """An evaluation that gives the next of (val, test) accuracies at each call."""
    lines = iter(figures)

    def evaluate(_model: nn.Module):
        val, test = next(lines)
        return {"val/top1": val, "test/top1": test, "test/nll": 1.0}

    return evaluate


def test_a_method_sees_the_epoch_from_one_and_steps_over_the_whole_run(data):
    _, _, batches = watched(data)
    seen = [(b.progress.epoch, b.progress.epochs, b.progress.step, b.progress.steps) for b in batches]
    assert seen == [(1 + (step - 1) // 4, 3, step, 12) for step in range(1, 13)]


def test_the_indices_of_a_batch_point_at_its_images_in_the_training_split(tmp_path):
    data = toy_data(tmp_path, augmentation={})
    seen = []

    class Looking(nn.Module):
        def __init__(self, student):
            super().__init__()
            self.inner = student

        def forward(self, images):
            if self.training:
                seen.append(images.detach())
            return self.inner(images)

    _, _, batches = watched(data, student=Looking(TinyNetwork()))
    mean, std = (np.array(values).reshape(CHANNELS, 1, 1) for values in (data.mean, data.std))
    for images, batch in zip(seen, batches, strict=True):
        pixels = np.rint((images.double().numpy() * std + mean) * 255)
        assert np.array_equal(pixels, data.images("train")[batch.indices].numpy())
        assert torch.equal(batch.targets, data.targets("train")[batch.indices])


def test_every_epoch_shows_every_training_image_once_in_another_order(data):
    _, _, batches = watched(data)
    epochs = [torch.cat([b.indices for b in batches if b.progress.epoch == epoch]).tolist() for epoch in (1, 2, 3)]
    assert all(sorted(order) == list(range(30)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [8, 8, 8, 6]), (True, [8, 8, 8])])
def test_the_last_batch_is_kept_or_dropped_as_configured(data, drop_last, sizes):
    _, record, batches = watched(data, recipe(drop_last=drop_last, epochs=2))
    assert [len(batch.targets) for batch in batches] == sizes * 2
    assert [batch.progress.steps for batch in batches] == [2 * len(sizes)] * len(batches)
    hits = record.history[-1]["train/top1"] / 100 * sum(sizes)
    assert hits == pytest.approx(round(hits), abs=1e-9)


def test_a_last_batch_of_one_image_is_left_out(data):
    _, _, batches = watched(data, recipe(batch_size=29, epochs=1))
    assert [len(batch.targets) for batch in batches] == [29]


def test_a_batch_that_no_epoch_can_fill_is_refused_before_training(data):
    with pytest.raises(ConfigError, match=r"recipe\.batch_size=31"):
        rig(data, recipe(batch_size=31, drop_last=True))


def test_training_figures_are_those_of_all_images_of_the_epoch(data):
    _, record, batches = watched(data, recipe(epochs=1))
    logits = torch.cat([batch.student.logits for batch in batches]).detach().double()
    targets = torch.cat([batch.targets for batch in batches])
    squares = sum(b.student.logits.double().square().mean().item() * len(b.targets) for b in batches) / 30
    entropy = 0.1 * nn.functional.cross_entropy(logits, targets).item()
    (line,) = record.history
    assert line["train/spy"] == pytest.approx(squares, rel=1e-5)
    assert line["train/cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert line["train/loss"] == pytest.approx(squares + entropy, rel=1e-5)
    assert line["train/top1"] == pytest.approx(100 * (logits.argmax(-1) == targets).double().mean().item())


def test_the_teacher_leaves_a_run_as_it_entered_it(data):
    teacher = toy_teacher(data)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    modes = []
    teacher.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    _, _, batches = watched(data, teacher=teacher)
    assert differences(before, dict(teacher.model.state_dict())) == []
    assert modes == [False] * 12
    assert not any(module.training for module in teacher.model.modules())
    assert all(entry.grad is None for entry in teacher.model.parameters())
    assert not any(batch.teacher.logits.requires_grad for batch in batches)


@pytest.mark.parametrize("own", [None, ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])])
def test_a_teacher_sees_the_same_view_as_the_student_normalised_its_own_way(data, own):
    mean, std = own or (data.mean, data.std)
    teacher = toy_teacher(data, mean=own and mean, std=own and std)
    seen = {"teacher": [], "student": []}
    teacher.model.register_forward_pre_hook(lambda _, args: seen["teacher"].append(args[0].clone()))
    parts = rig(data, recipe(epochs=1), teacher=teacher)
    parts.learner.student.register_forward_pre_hook(
        lambda module, args: seen["student"].append(args[0].clone()) if module.training else None
    )
    parts.trainer.fit()
    student_pixels, teacher_pixels = [], []
    for name, pixels, (m, s) in (
        ("student", student_pixels, (data.mean, data.std)),
        ("teacher", teacher_pixels, (mean, std)),
    ):
        m, s = (np.array(values).reshape(CHANNELS, 1, 1) for values in (m, s))
        pixels.extend((images.double().numpy() * s + m) * 255 for images in seen[name])
    assert len(student_pixels) == 4
    for one, other in zip(student_pixels, teacher_pixels, strict=True):
        assert np.abs(one - np.rint(one)).max() < 1e-3
        assert np.array_equal(np.rint(one), np.rint(other))


def test_the_teacher_output_that_a_method_gets_is_that_of_the_frozen_network(data):
    teacher = toy_teacher(data, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    _, _, batches = watched(toy_data_without_augmentation(data), recipe(epochs=1), teacher=teacher)
    own = Normalization([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], 3)
    for batch in batches:
        with torch.no_grad():
            expected = teacher.model(own(data.images("train")[batch.indices]))
        torch.testing.assert_close(batch.teacher.logits, expected, rtol=1e-5, atol=1e-5)


def toy_data_without_augmentation(data):
    """The same images as they are stored."""
    data.augmentations = []
    return data


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_teacher_in_half_precision_gives_float32_logits(data, precision):
    teacher = toy_teacher(data, precision=precision)
    images = data.images("test")
    logits = teacher(images, teacher.normalization(images)).logits
    assert logits.dtype == torch.float32
    full = teacher.model(teacher.normalization(images))
    assert not torch.equal(logits, full)
    torch.testing.assert_close(logits, full, rtol=0.05, atol=0.05)


def test_plain_training_asks_no_teacher_and_has_null_figures_for_it(data):
    parts = rig(data, plain=True)
    record = parts.trainer.fit()[0]
    assert record.metrics["test/agreement"] is None
    assert record.metrics["test/teacher_kl"] is None
    assert [name for name in record.metrics if name.startswith("train/")] == [
        "train/loss",
        "train/cross_entropy",
        "train/top1",
    ]


def test_the_record_equals_a_recomputation_from_the_history(data):
    record = rig(data, recipe(epochs=8)).trainer.fit()[0]
    vals = [line["val/top1"] for line in record.history]
    tests = [line["test/top1"] for line in record.history]
    best = vals.index(max(vals))
    assert [line["epoch"] for line in record.history] == list(range(1, 9))
    assert len(set(tests)) > 1
    assert record.metrics["best_epoch"] == best + 1
    assert record.metrics["val/top1_at_best_val"] == vals[best]
    assert record.metrics["test/top1_at_best_val"] == tests[best]
    assert record.metrics["test/top1_max_over_epochs"] == max(tests)
    for name, value in record.history[-1].items():
        if "/" in name:
            assert record.metrics[name] == value


def test_the_last_line_of_the_history_is_what_the_saved_network_gives(data):
    parts = rig(data, recipe(ema_decay=0.5))
    record = parts.trainer.fit()[0]
    measured = parts.evaluator(parts.learner.evaluated_model)
    assert measured["test/nll"] is not None
    assert {name: record.metrics[name] for name in measured} == measured


def test_of_equally_good_epochs_the_first_is_taken(data):
    evaluate = scripted([(50.0, 10.0), (60.0, 20.0), (60.0, 40.0), (55.0, 30.0)])
    metrics = rig(data, recipe(epochs=4), evaluate=evaluate).trainer.fit()[0].metrics
    assert metrics["best_epoch"] == 2
    assert metrics["val/top1_at_best_val"] == 60
    assert metrics["test/top1_at_best_val"] == 20
    assert metrics["test/top1_max_over_epochs"] == 40
    assert (metrics["val/top1"], metrics["test/top1"]) == (55, 30)


def test_epochs_without_an_evaluation_take_no_part_in_selection(data):
    evaluate = scripted([(60.0, 10.0), (50.0, 20.0), (55.0, 30.0)])
    record = rig(data, recipe(epochs=5, evaluate_every=2), evaluate=evaluate).trainer.fit()[0]
    assert [line["epoch"] for line in record.history if "test/top1" in line] == [2, 4, 5]
    assert record.metrics["best_epoch"] == 2
    assert record.metrics["test/top1_at_best_val"] == 10
    assert record.metrics["test/top1"] == 30


def test_without_a_validation_split_nothing_is_selected(tmp_path):
    record = rig(toy_data(tmp_path, val_fraction=0)).trainer.fit()[0]
    nulls = {name for name, value in record.metrics.items() if value is None}
    assert {name for name in record.metrics if name.startswith("val/")} <= nulls
    assert {"val/top1", "best_epoch", "test/top1_at_best_val", "val/top1_at_best_val"} <= nulls
    assert record.metrics["test/top1_max_over_epochs"] == max(line["test/top1"] for line in record.history)


@pytest.mark.parametrize("scheduler", ["cosine", "plateau"])
def test_nothing_but_test_figures_depends_on_the_test_labels(tmp_path, scheduler):
    how = recipe(epochs=6, scheduler=scheduler, scheduler_options={"patience_epochs": 0})
    outcomes = []
    for name, labels in (("true", None), ("permuted", [1, 1, 0, 2] * 3 + [0, 3])):
        parts = rig(toy_data(tmp_path / name, test_labels=labels), how)
        outcomes.append(outcome(parts))
    true, permuted = outcomes
    assert differences(true["student"], permuted["student"]) == []
    assert true["metrics"]["test/top1"] != permuted["metrics"]["test/top1"]

    def without_test(found):
        return {name: value for name, value in found.items() if not name.startswith("test/")}

    assert without_test(true["metrics"]) == without_test(permuted["metrics"])
    assert list(map(without_test, true["history"])) == list(map(without_test, permuted["history"]))


def test_the_history_has_the_rate_that_each_epoch_was_trained_with(data):
    history = rig(data, recipe(scheduler="multistep", milestones=[1, 2])).trainer.fit()[0].history
    assert [line["learning_rate"] for line in history] == pytest.approx([0.05, 0.005, 0.0005])


def test_the_speed_leaves_out_the_first_steps_and_counts_images_of_training_steps_alone(data):
    parts = rig(data)
    timing = parts.trainer.fit()[0].timing
    # Three epochs of thirty images, less the three first batches of eight.
    assert timing["images_per_second"] * timing["training_seconds"] == pytest.approx(90 - 24)
    assert timing["training_seconds"] < timing["seconds"]


def test_a_run_shorter_than_the_warm_up_of_the_clock_has_no_speed(data):
    record = rig(data, recipe(epochs=1, batch_size=15)).trainer.fit()[0]
    assert record.timing["images_per_second"] is None
    assert record.history[0]["images_per_second"] is None


class Drifting(Method):
    """A term that is infinite from its third step on, with a gradient of zero."""

    def forward(self, batch):
        zero = 0 * batch.student.logits.sum()
        return {"drift": zero + (float("inf") if batch.progress.step >= 3 else 1.0)}


def test_a_loss_that_is_not_finite_ends_the_run_by_the_end_of_the_epoch(data, tmp_path):
    path = tmp_path / "last.ckpt"
    parts = rig(data, checkpoint=path, method=Combination({"drift": Drifting()}))
    with pytest.raises(TrainingError, match=r"'drift' at step 3"):
        parts.trainer.fit()
    assert parts.display.steps == 4
    assert not path.exists()


def test_weights_broken_by_the_very_last_step_are_no_result(data, tmp_path):
    path = tmp_path / "last.ckpt"
    parts = rig(data, recipe(epochs=1), checkpoint=path)
    step = parts.learner.step

    def breaking(images, teacher, targets, indices, progress, views, **how):
        step(images, teacher, targets, indices, progress, views, **how)
        if progress.step == 4:
            with torch.no_grad():
                parts.learner.student.fc.bias.fill_(float("nan"))

    parts.learner.step = breaking
    with pytest.raises(TrainingError, match="not finite after epoch 1"):
        parts.trainer.fit()
    assert not path.exists()


def test_a_stop_after_the_last_epoch_is_no_interruption(data):
    parts = rig(data, stop_after_epoch=3)
    assert len(parts.trainer.fit()[0].history) == 3


def test_an_interruption_says_where_it_was(data):
    with pytest.raises(Interrupted, match="after step 2 of epoch 2"):
        rig(data, stop_after=6).trainer.fit()
    with pytest.raises(Interrupted, match="after epoch 2"):
        rig(data, stop_after_epoch=2).trainer.fit()


def test_the_same_seed_gives_the_same_run_and_the_layout_of_images_changes_little(data):
    first, second = rig(data), rig(data)
    expected = outcome(first)
    assert differences(expected, outcome(second)) == []
    other = rig(data)
    other.trainer.layout = torch.channels_last
    weights = outcome(other)["student"]
    for name, value in expected["student"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_training_leaves_the_global_generator_alone(data):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    rig(data).trainer.fit()
    assert torch.equal(before, torch.get_rng_state())
