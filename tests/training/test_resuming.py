"""A run may be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import (
    differences,
    interrupted_run,
    outcome,
    recipe,
    rig,
    toy_data,
    toy_method,
)

from vkd.errors import TrainingError
from vkd.training.checkpoint import read_checkpoint
from vkd.training.interruption import Interrupted

# Thirty images in batches of eight: four steps an epoch, the last one of six images; three without it.
CASES = {
    "momentum": ({}, {}),
    "adamw, a method with parameters": ({"optimizer": "adamw", "learning_rate": 0.01}, {"methods": ("kd", "drawn")}),
    "moving average, cosine": ({"ema_decay": 0.8, "scheduler": "cosine", "warmup_epochs": 1}, {}),
    "fp16, clipping": ({"clip_grad_norm": 0.5}, {"precision": "fp16"}),
    "plateau": (
        {"scheduler": "plateau", "learning_rate": 1e-6, "scheduler_options": {"patience_epochs": 0}, "epochs": 4},
        {},
    ),
    "every other evaluation": ({"evaluate_every": 2, "scheduler": "multistep", "milestones": [1, 2]}, {}),
    "no validation": ({"drop_last": True}, {"val_fraction": 0}),
    "plain": ({"label_smoothing": 0.1}, {"plain": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_after_any_step_or_epoch_a_run_ends_as_if_it_had_not_been(tmp_path, drawn, case):
    fields, options = CASES[case]
    options = dict(options)
    how = recipe(**fields)
    val_fraction = options.pop("val_fraction", 0.25)
    methods = options.pop("methods", ("kd",))

    def parts(**stop):
        data = toy_data(tmp_path / "data", val_fraction=val_fraction)
        method = toy_method(*methods, seed=1)
        return data, {"method": method, **options, **stop}

    data, given = parts()
    whole = rig(data, how, checkpoint=tmp_path / "whole.ckpt", **given)
    expected = outcome(whole)
    steps = data.steps_per_epoch(8, how.drop_last) * how.epochs
    stops = [{"stop_after": step} for step in range(1, steps + 1)]
    stops += [{"stop_after_epoch": epoch} for epoch in range(1, how.epochs)]
    for number, stop in enumerate(stops):
        path = tmp_path / f"{number}.ckpt"
        data, given = parts(**stop)
        interrupted_run(data, path, how, **given)
        data, given = parts()
        # Other initial weights: everything must come from the checkpoint.
        again = rig(data, how, checkpoint=path, init=77, **given)
        assert again.session.restore()
        assert differences(expected, outcome(again)) == [], stop


def test_a_run_that_is_stopped_after_every_single_step_gets_there_too(data, tmp_path):
    whole = rig(data)
    expected = outcome(whole)
    path = tmp_path / "last.ckpt"
    for _ in range(12):
        parts = rig(data, checkpoint=path, stop_after=1)
        parts.session.restore()
        with pytest.raises(Interrupted):
            parts.trainer.fit()
    last = rig(data, checkpoint=path)
    assert last.session.restore()
    assert differences(expected, outcome(last)) == []
    assert last.display.steps == 0


def test_the_plateau_case_does_lower_its_rate(data):
    fields, _ = CASES["plateau"]
    history = rig(data, recipe(**fields)).trainer.fit()[0].history
    assert history[-1]["learning_rate"] < history[0]["learning_rate"]


def test_a_kill_between_checkpoints_replays_what_was_lost(data, tmp_path):
    whole = rig(data)
    expected = outcome(whole)
    path = tmp_path / "last.ckpt"

    class Killed(Exception):
        pass

    parts = rig(data, checkpoint=path)
    trainer_step, taken = parts.learner.step, []

    def step(*arguments, **how):
        if len(taken) == 6:
            raise Killed
        taken.append(1)
        trainer_step(*arguments, **how)

    parts.learner.step = step
    with pytest.raises(Killed):
        parts.trainer.fit()
    again = rig(data, checkpoint=path, init=77)
    assert again.session.restore()
    assert again.session.position == (2, 0)
    assert differences(expected, outcome(again)) == []


@pytest.mark.parametrize("moment", ["evaluation", "on_epoch"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_an_interruption_at_the_end_of_an_epoch_loses_nothing_but_time(data, tmp_path, moment, epoch):
    whole = rig(data, recipe(ema_decay=0.8))
    expected = outcome(whole)
    path = tmp_path / "last.ckpt"
    evaluations = []

    def evaluate(model):
        evaluations.append(model)
        if moment == "evaluation" and len(evaluations) == epoch:
            raise KeyboardInterrupt
        return whole.evaluator(model)

    def on_epoch(line):
        if moment == "on_epoch" and line["epoch"] == epoch:
            raise KeyboardInterrupt

    parts = rig(data, recipe(ema_decay=0.8), checkpoint=path, evaluate=evaluate, on_epoch=on_epoch)
    with pytest.raises(KeyboardInterrupt):
        parts.trainer.fit()
    again = rig(data, recipe(ema_decay=0.8), checkpoint=path, init=77)
    assert again.session.restore() == path.exists() == (moment == "on_epoch" or epoch > 1)
    if not path.exists():
        again = rig(data, recipe(ema_decay=0.8), checkpoint=path)
    assert differences(expected, outcome(again)) == []


def test_a_finished_run_restored_gives_its_record_at_once(data, tmp_path):
    path = tmp_path / "last.ckpt"
    first = rig(data, checkpoint=path)
    expected = outcome(first)
    again = rig(data, checkpoint=path, init=77)
    assert again.session.restore()
    assert differences(expected, outcome(again)) == []
    assert again.display.steps == 0


def test_the_time_of_all_parts_is_added_up(data, tmp_path):
    path = tmp_path / "last.ckpt"
    interrupted_run(data, path, stop_after_epoch=2)
    before = read_checkpoint(path)["timed"]
    again = rig(data, checkpoint=path)
    again.session.restore()
    timing = again.trainer.fit()[0].timing
    assert before["seconds"] > 0
    assert timing["seconds"] > before["seconds"]
    assert timing["training_seconds"] > before["training_seconds"]


def test_the_checkpoint_is_written_before_anyone_is_told_of_the_epoch(data, tmp_path):
    path = tmp_path / "last.ckpt"
    seen = []

    def on_epoch(line):
        state = read_checkpoint(path)
        seen.append((line["epoch"], state["position"], [entry["epoch"] for entry in state["history"]]))

    rig(data, checkpoint=path, on_epoch=on_epoch).trainer.fit()
    assert seen == [(1, [2, 0], [1]), (2, [3, 0], [1, 2]), (3, [4, 0], [1, 2, 3])]


def test_without_a_checkpoint_a_run_begins_at_the_beginning(data, tmp_path):
    parts = rig(data, checkpoint=tmp_path / "last.ckpt")
    assert not parts.session.restore()
    assert parts.session.position == (1, 0)
    assert not rig(data, checkpoint=None).session.restore()


def test_the_checkpoint_of_another_run_is_refused_and_kept(data, tmp_path):
    path = tmp_path / "last.ckpt"
    interrupted_run(data, path, stop_after=2, fingerprint="a" * 64)
    content = path.read_bytes()
    parts = rig(data, checkpoint=path, fingerprint="b" * 64)
    before = {name: value.clone() for name, value in parts.learner.student.state_dict().items()}
    with pytest.raises(TrainingError, match=r"last\.ckpt belongs to a run with another config") as caught:
        parts.session.restore()
    assert "aaaaaaaa" in str(caught.value)
    assert "bbbbbbbb" in str(caught.value)
    assert path.read_bytes() == content
    assert differences(before, dict(parts.learner.student.state_dict())) == []


def test_a_disk_that_is_full_stops_the_run_and_the_checkpoint_before_still_serves(data, tmp_path, monkeypatch):
    whole = rig(data)
    expected = outcome(whole)
    path = tmp_path / "last.ckpt"
    writes = []

    def fsync(_descriptor):
        writes.append(1)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises(TrainingError, match="No space left on device"):
            rig(data, checkpoint=path).trainer.fit()
    again = rig(data, checkpoint=path, init=77)
    assert again.session.restore()
    assert again.session.position == (2, 0)
    assert differences(expected, outcome(again)) == []


def test_a_loss_that_is_not_finite_is_found_when_the_run_is_stopped_and_makes_no_checkpoint(data, tmp_path):
    path = tmp_path / "last.ckpt"
    parts = rig(data, checkpoint=path, stop_after=2)
    with torch.no_grad():
        parts.learner.student.fc.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="at step 1"):
        parts.trainer.fit()
    assert not path.exists()


@pytest.mark.parametrize("stop", [{"stop_after": 2}, {"stop_after": 4}, {"stop_after": 6}, {"stop_after_epoch": 2}])
def test_students_that_a_kill_left_at_different_steps_are_brought_together_and_equal_each_alone(data, tmp_path, stop):
    path = tmp_path / "last.ckpt"
    expected = [outcome(rig(data, init=init, seed=init)) for init in (3, 4)]
    interrupted_run(data, path, init=3, seed=3, **stop)
    ahead, behind = rig(data, checkpoint=path, init=77, seed=3), rig(data, init=4, seed=4)
    assert ahead.session.restore()
    assert ahead.session.position > behind.session.position
    ahead.trainer.sessions.append(behind.session)
    records = ahead.trainer.fit()
    found = [outcome(parts, record) for parts, record in zip((ahead, behind), records, strict=True)]
    assert differences(expected, found) == []


def test_a_student_that_fails_leaves_the_others_as_they_are_alone(data):
    expected = outcome(rig(data, init=4, seed=4))
    bad, good = rig(data, init=3, seed=3), rig(data, init=4, seed=4)
    with torch.no_grad():
        bad.learner.student.fc.bias.fill_(float("nan"))
    failures = []
    bad.trainer.sessions.append(good.session)
    bad.trainer.on_failure = lambda session, error: failures.append((session, str(error)))
    records = bad.trainer.fit()
    assert records[0] is None
    assert differences(expected, outcome(good, records[1])) == []
    (failure,) = failures
    assert failure[0] is bad.session
    assert "at step 1" in failure[1]


def test_students_that_train_side_by_side_equal_each_alone(data):
    alone = [rig(data, init=init, seed=init) for init in (3, 4)]
    expected = [outcome(parts) for parts in alone]
    together = [rig(data, init=init, seed=init) for init in (3, 4)]
    together[0].trainer.sessions.append(together[1].session)
    records = together[0].trainer.fit()
    found = [outcome(parts, record) for parts, record in zip(together, records, strict=True)]
    assert differences(expected, found) == []
    assert differences(found[0]["student"], found[1]["student"])


def test_a_student_that_was_ahead_trains_on_when_the_one_that_was_behind_fails(data, tmp_path):
    path = tmp_path / "last.ckpt"
    expected = outcome(rig(data, init=3, seed=3))
    interrupted_run(data, path, init=3, seed=3, stop_after=3)
    ahead, behind = rig(data, checkpoint=path, init=77, seed=3), rig(data, init=4, seed=4)
    assert ahead.session.restore()
    step, calls = behind.learner.step, []

    def broken(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return step(*arguments, **options)

    behind.learner.step = broken
    failures = []
    ahead.trainer.sessions.append(behind.session)
    ahead.trainer.on_failure = lambda session, error: failures.append(str(error))
    record, nothing = ahead.trainer.fit()
    assert (nothing, failures) == (None, ["out of luck"])
    assert differences(expected, outcome(ahead, record)) == []


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_checkpoint_of_another_memory_layout_is_gone_on_from_as_from_ones_own(data, optimizer):
    how = recipe(optimizer=optimizer, learning_rate=0.01)
    parts = rig(data, how, fused_optimizer=True)
    parts.trainer.take_steps(3)
    state = parts.learner.state_dict()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        again = rig(data, how, fused_optimizer=True)
        again.learner.student.to(memory_format=layout)
        again.learner.load_state_dict(copy.deepcopy(state))
        again.trainer.sessions[0].position = (1, 3)
        again.trainer.take_steps(1)
        results.append(again.learner.student.state_dict())
    # The bias ahead of a BatchNorm has no gradient but rounding, which Adam takes for a direction.
    for name, value in results[0].items():
        if name != "conv.bias":
            torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)
