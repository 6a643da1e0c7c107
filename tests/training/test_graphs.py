"""Captured steps: they give what eager steps give, and what cannot be captured, or is captured wrongly, runs eagerly.

A recorder stands in for CUDA graphs. As those of a graph, its recordings keep the learning rate, the epoch and whatever
else the host gave when they were made, and repeat the work on what the tensors hold by then.
"""

from __future__ import annotations

import copy
import gc
import logging
import re
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import (
    CHANNELS,
    CLASSES,
    CPU,
    SIZE,
    TinyNetwork,
    differences,
    outcome,
    random_batch,
    recipe,
    rig,
    toy_learner,
    toy_method,
    toy_teacher,
)

from vkd.composition import compose_config
from vkd.config import parse
from vkd.data.batches import ImageBatch
from vkd.errors import TrainingError
from vkd.methods import METHODS, Combination, Method, Output, Progress
from vkd.training.graphs import CudaCapture, Graphed, StaticBatch, Written
from vkd.training.interruption import Interrupted
from vkd.training.learner import Learner
from vkd.training.optimization import make_optimizer
from vkd.training.precision import Precision
from vkd.training.switches import choose_switches

# Thirty images in batches of four: seven steps of a whole batch and one of two images in each of three epochs.
WHOLE_STEPS = 3 * 7


class Recorder:
    """Counts what was run, recorded and replayed; `damage` makes a replay of a function into a wrong one."""

    def __init__(self, *learners: Learner, damage=None) -> None:
        self.learners, self.damage = list(learners), damage
        self.ran = self.recorded = self.replayed = 0

    def run(self, function) -> None:
        self.ran += 1
        function()

    def capture(self, function):
        self.recorded += 1
        return Recording(self, function)


class Recording:
    def __init__(self, recorder: Recorder, function) -> None:
        self.recorder = recorder
        self.replay_once = function if recorder.damage is None else recorder.damage(function)
        self.options = [copy.deepcopy(self.without_parameters(group)) for group in self.groups()]

    def groups(self):
        return [group for learner in self.recorder.learners for group in learner.optimizer.param_groups]

    @staticmethod
    def without_parameters(group):
        return {name: value for name, value in group.items() if name != "params"}

    def replay(self) -> None:
        self.recorder.replayed += 1
        now = [self.without_parameters(group) for group in self.groups()]
        for group, options in zip(self.groups(), self.options, strict=True):
            group.update(options)
        self.replay_once()
        for group, options in zip(self.groups(), now, strict=True):
            group.update(options)


class Projection(Method):
    """Parameters, and a buffer that is counted up in place."""

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.projection = nn.Linear(CLASSES, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        self.seen += 1
        gap = self.projection(batch.student.logits) - batch.teacher.logits[:, :3]
        return {"match": gap.square().mean() / self.seen}


class Paced(Method):
    """Looks at some part of the progress."""

    capturable = True

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    def forward(self, batch):
        gap = batch.student.logits - batch.teacher.logits
        return {"paced": getattr(batch.progress, self.field) * gap.square().mean()}


class Replacing(Method):
    """Puts a new buffer in the place of the old one."""

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        self.seen = self.seen + 1
        return {"replacing": batch.student.logits.square().mean() / self.seen}


class Silent(Method):
    """Promises nothing."""

    def forward(self, batch):
        return {"silent": batch.student.logits.square().mean()}


def graphed(data, how=None, *, damage=None, **options):
    """A rig whose trainer records its steps."""
    parts = rig(data, how or recipe(batch_size=4), **options)
    parts.recorder = parts.trainer.capture = Recorder(parts.learner, damage=damage)
    return parts


CASES = {
    "one rate": ({}, {}),
    "another rate in every epoch": ({"scheduler": "cosine", "warmup_epochs": 1}, {}),
    "moving average and clipping": ({"ema_decay": 0.8, "clip_grad_norm": 0.1, "scheduler": "cosine"}, {}),
    "adamw, a method with parameters and a buffer": ({"optimizer": "adamw"}, {"method": Projection}),
    "the epoch in the loss": ({}, {"method": partial(Paced, "epoch")}),
    "dkd, whose weight rises": ({}, {"method": lambda: toy_method("dkd").methods["dkd"]}),
    "ctkd, which learns its temperature": ({}, {"method": lambda: toy_method("ctkd").methods["ctkd"]}),
    "bf16": ({}, {"precision": "bf16"}),
    "plain": ({"label_smoothing": 0.1}, {"plain": True}),
    "batches of the whole size alone": ({"drop_last": True, "batch_size": 6}, {}),
}


def given(options):
    """The same options with a method of its own."""
    if "method" not in options:
        return options
    return {**options, "method": Combination({"kd": toy_method("kd").methods["kd"], "own": options["method"]()})}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_equals_an_eager_one_bit_for_bit(data, case, caplog):
    fields, options = CASES[case]
    how = recipe(**{"batch_size": 4, **fields})
    expected = outcome(rig(data, how, **given(options)))
    parts = graphed(data, how, **given(options))
    with caplog.at_level(logging.INFO, logger="vkd"):
        assert differences(expected, outcome(parts)) == []
    assert parts.recorder.replayed > WHOLE_STEPS // 2
    assert caplog.records == []


def test_the_teacher_may_have_a_normalization_of_its_own(data):
    def teacher():
        return toy_teacher(data, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])

    expected = outcome(rig(data, recipe(batch_size=4), teacher=teacher()))
    assert differences(expected, outcome(graphed(data, teacher=teacher()))) == []


def test_after_three_steps_of_warm_up_and_one_to_check_every_step_of_a_whole_batch_is_replayed(data):
    parts = graphed(data)
    parts.trainer.fit()
    # Of teacher and student each; the teacher's first batch fills its tensors before anything is counted.
    assert parts.recorder.recorded == 2
    assert parts.recorder.ran == 2 * (3 + 1)
    assert parts.recorder.replayed == (WHOLE_STEPS - 3) + (WHOLE_STEPS - 1 - 3)


def test_another_learning_rate_is_another_recording_of_the_student_and_not_of_the_teacher(data):
    parts = graphed(data, recipe(batch_size=4, scheduler="multistep", milestones=[1]))
    parts.trainer.fit()
    assert parts.recorder.recorded == 3
    assert parts.recorder.ran == 4 + (4 + 2)


@pytest.mark.parametrize("stop", [{"stop_after": step} for step in (1, 3, 4, 5, 8, 13, 16)] + [{"stop_after_epoch": 2}])
def test_a_captured_run_that_was_stopped_goes_on_as_if_it_had_not_been(data, tmp_path, stop):
    how = recipe(batch_size=4, ema_decay=0.8, optimizer="adamw", learning_rate=0.01, scheduler="cosine")
    expected = outcome(rig(data, how))
    path = tmp_path / "last.ckpt"
    with pytest.raises(Interrupted):
        graphed(data, how, checkpoint=path, **stop).trainer.fit()
    again = graphed(data, how, checkpoint=path, init=77)
    assert again.session.restore()
    assert differences(expected, outcome(again)) == []
    assert again.recorder.replayed > 0


def test_students_side_by_side_share_the_teachers_recording_and_equal_each_alone(data):
    how = recipe(batch_size=4)
    expected = [outcome(rig(data, how, init=init, seed=init)) for init in (3, 4)]
    together = [graphed(data, how, init=init, seed=init) for init in (3, 4)]
    trainer, recorder = together[0].trainer, together[0].recorder
    trainer.sessions.append(together[1].session)
    recorder.learners.append(together[1].learner)
    records = trainer.fit()
    found = [outcome(parts, record) for parts, record in zip(together, records, strict=True)]
    assert differences(expected, found) == []
    assert recorder.recorded == 3


def stale(function):
    """A recording that goes on reading the batch on which it was made."""
    return partial(function.func, *copy.deepcopy(function.args))


def is_teacher(function):
    return isinstance(function.func.__self__, StaticBatch)


def of_student(damage):
    """The damage to the student's recording, and not to the teacher's."""
    return lambda function: function if is_teacher(function) else damage(function)


def of_teacher(damage):
    return lambda function: damage(function) if is_teacher(function) else function


def nothing(_function):
    return lambda: None


def twice(function):
    def replay():
        function()
        function()

    return replay


def failing(_function):
    def replay():
        raise RuntimeError("out of luck\nand more")

    return replay


DAMAGES = {
    "stale": (of_student(stale), "differ in"),
    "nothing": (of_student(nothing), "differ in"),
    "twice": (of_student(twice), "differ in"),
    "failing": (of_student(failing), "replaying it failed: out of luck"),
    "the teacher does nothing": (of_teacher(nothing), "the teacher runs without.*differ in the images"),
}


@pytest.mark.parametrize("fields", [{}, {"optimizer": "adamw", "ema_decay": 0.9}], ids=["momentum", "adamw"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_recording_is_found_at_its_first_replay_and_changes_nothing(data, damage, fields, caplog):
    how = recipe(batch_size=4, **fields)
    expected = outcome(rig(data, how))
    damage, said = DAMAGES[damage]
    parts = graphed(data, how, damage=damage)
    assert differences(expected, outcome(parts)) == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(said, record.getMessage())


@pytest.mark.parametrize("part", ["fc.weight", "norm.running_mean", "norm.num_batches_tracked"])
def test_a_recording_that_leaves_out_a_single_tensor_is_found(data, part, caplog):
    expected = outcome(rig(data, recipe(batch_size=4)))

    def damage(function):
        def replay():
            entry = parts.learner.student.state_dict()[part]
            before = entry.clone()
            function()
            entry.copy_(before)

        return replay

    parts = graphed(data)
    parts.recorder.damage = of_student(damage)
    assert differences(expected, outcome(parts)) == []
    assert len(caplog.records) == 1


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_the_first_cause_is_said_once(data, caplog):
    expected = outcome(rig(data, recipe(batch_size=4)))
    parts = graphed(data)

    def capture(function):
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError as error:
            raise RuntimeError("the recording is invalid") from error

    parts.recorder.capture = capture
    assert differences(expected, outcome(parts)) == []
    reason = "runs without a CUDA graph: recording it failed: operation not permitted when stream is capturing"
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [f"the student's step {reason}", f"the teacher {reason}"]


OBSTACLES = {
    "fp16": ({}, {"precision": "fp16"}, "precision=fp16"),
    "an optimizer of timm": ({"optimizer": "lion", "learning_rate": 0.001}, {}, "the optimizer Lion"),
    "a method that promises nothing": ({}, {"method": Silent}, "method=own decides or draws on the host"),
    "the number of the step": ({}, {"method": partial(Paced, "step")}, "looks at the number of the step"),
    "a new buffer": ({}, {"method": Replacing}, "puts new tensors in the place of others"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_cannot_be_captured_runs_eagerly_and_the_reason_is_said_once(data, case, caplog):
    fields, options, reason = OBSTACLES[case]
    how = recipe(batch_size=4, **fields)
    expected = outcome(rig(data, how, **given(options)))
    parts = graphed(data, how, **given(options))
    with caplog.at_level(logging.INFO, logger="vkd"):
        assert differences(expected, outcome(parts)) == []
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("the student's step runs without a CUDA graph: ")
    assert reason in record.getMessage()
    assert parts.recorder.recorded == 1


def test_a_method_that_draws_from_a_generator_of_its_own_is_not_captured(drawn, monkeypatch):
    monkeypatch.setattr(METHODS[drawn], "capturable", True, raising=False)
    assert "draws random numbers" in toy_learner(method=toy_method(drawn)).graph_obstacle()


def test_of_the_methods_only_those_without_host_state_promise_that_they_may_be_captured():
    assert [name for name in METHODS if not METHODS[name].capturable] == ["crd"]


def test_a_teacher_with_a_table_of_logits_is_not_captured_and_its_students_are(data, caplog):
    class Table:
        def logits(self, view_rows, compute):
            asked.append(view_rows)
            return compute(torch.arange(len(view_rows)))

    expected = outcome(rig(data, recipe(batch_size=4)))
    asked = []
    teacher = toy_teacher(data)
    teacher.views = Table()
    parts = graphed(data, teacher=teacher)
    with caplog.at_level(logging.INFO, logger="vkd"):
        assert differences(expected, outcome(parts)) == []
    assert len(asked) == 3 * 8
    assert parts.recorder.recorded == 1
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["the teacher runs without a CUDA graph"]


def fed(learner: Learner, steps: int, capture=None, *, views: int = 1, device=CPU, static=None) -> list[torch.Tensor]:
    """Steps over the batches of `random_batch`, copied into the same tensors (`static`) each time; those tensors."""
    for step in range(1, steps + 1):
        shown = [random_batch(100 * view + step) for view in range(views)]
        targets, indices, progress = shown[0][2:]
        tensors = [entry for images, output, *_ in shown for entry in (images, output.logits)]
        tensors = [entry.to(device) for entry in (*tensors, targets, indices)]
        if static is None:
            static = [entry.clone() for entry in tensors]
        for mine, entry in zip(static, tensors, strict=True):
            mine.copy_(entry)
        pairs = [(static[2 * view], Output(static[2 * view + 1])) for view in range(views)]
        (images, output), *others = pairs
        learner.step(images, output, static[-2], static[-1], progress, others, capture=capture)
    return static


def test_a_method_of_two_views_is_captured(caplog):
    learner, eager = (toy_learner(method=toy_method("mlkd")) for _ in range(2))
    recorder = Recorder(learner)
    with caplog.at_level(logging.INFO, logger="vkd"):
        fed(learner, 8, recorder, views=2)
    fed(eager, 8, views=2)
    assert differences(eager.state_dict(), learner.state_dict()) == []
    assert recorder.replayed == 5
    assert caplog.records == []


def test_figures_and_the_step_of_a_loss_that_is_not_finite_are_right_behind_replays():
    learner, eager = toy_learner(), toy_learner()
    recorder = Recorder(learner)
    fed(learner, 8, recorder)
    fed(eager, 8)
    assert learner.epoch_figures() == eager.epoch_figures()
    images, teacher, targets, indices, _ = random_batch(1)
    for entry in (learner, eager):
        entry.check_finite()
        entry.start_epoch_sums()
        assert entry.state_dict()["sums"] == {
            "terms": {},
            "first_not_finite": {},
            "correct": torch.tensor(0),
            "images": 0,
            "steps": 0,
        }
    recorder = Recorder(learner)
    for step in range(1, 9):
        if step == 7:
            with torch.no_grad():
                learner.student.fc.weight.fill_(float("inf"))
        learner.step(images, teacher, targets, indices, Progress(1, 3, step, 12), capture=recorder)
    assert recorder.replayed == 5
    with pytest.raises(TrainingError, match="at step 7"):
        learner.check_finite()


def test_tensors_elsewhere_than_those_of_the_recording_are_never_taken_for_them():
    learner, eager = toy_learner(), toy_learner()
    recorder, kept = Recorder(learner), []
    for step in range(1, 9):
        batch = random_batch(step)
        kept.append(batch)
        learner.step(*batch, capture=recorder)
        eager.step(*batch)
    assert recorder.replayed == 0
    assert differences(eager.state_dict(), learner.state_dict()) == []


def test_loading_a_state_forgets_the_recording():
    learner, eager, other = toy_learner(), toy_learner(), toy_learner(init=9, seed=9)
    fed(other, 3)
    state = copy.deepcopy(other.state_dict())
    recorder = Recorder(learner)
    static = fed(learner, 6, recorder)
    assert (recorder.ran, recorder.recorded) == (4, 1)
    for entry in (learner, eager):
        entry.load_state_dict(copy.deepcopy(state))
    fed(learner, 6, recorder, static=static)
    fed(eager, 6)
    # The optimizer has its state in other places then.
    assert (recorder.ran, recorder.recorded) == (8, 2)
    assert differences(eager.state_dict(), learner.state_dict()) == []


def test_an_epoch_forgets_that_a_loss_of_the_one_before_was_not_finite():
    learner = toy_learner()
    images, teacher, *others = random_batch(1)
    learner.step(images, Output(torch.full_like(teacher.logits, torch.nan)), *others)
    with pytest.raises(TrainingError):
        learner.check_finite()
    learner = toy_learner()
    learner.step(images, Output(torch.full_like(teacher.logits, torch.nan)), *others)
    learner.start_epoch_sums()
    learner.student.load_state_dict(TinyNetwork().state_dict())
    learner.step(images, teacher, *others)
    learner.check_finite()


def test_a_trainer_keeps_no_recording_behind_its_end(data):
    parts = graphed(data)
    kept = []
    capture = parts.recorder.capture
    parts.recorder.capture = lambda function: weakly(kept, capture(function))
    gc.disable()
    try:
        parts.trainer.fit()
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def weakly(kept, recording):
    kept.append(weakref.ref(recording))
    return recording


def test_gradients_do_not_outlive_a_captured_step():
    learner = toy_learner()
    fed(learner, 6, Recorder(learner))
    assert all(entry.grad is None for entry in learner.parameters)


def check_of(replay, tolerance=0.05) -> Graphed:
    """A function that adds (100, 100) to one tensor and 0.5 to another, and a recording that does `replay` instead."""
    large, small = torch.full((2,), 1000.0), torch.full((1,), 1.0)

    def function(_inputs):
        large.add_(100)
        small.add_(0.5)

    class Fixed:
        def run(self, function):
            function()

        def capture(self, function):
            return SimpleNamespace(replay=lambda: replay(large, small))

    made = Graphed(
        "it",
        function,
        written=lambda: [Written("numbers", [large, small], tolerance)],
        baked=lambda inputs: None,
        capture=Fixed(),
        device=CPU,
    )
    for _ in range(4):
        made(None)
    if made.runs_eagerly:
        assert (large.tolist(), small.tolist()) == ([1400.0, 1400.0], [3.0])
    return made


@pytest.mark.parametrize(
    ("right", "large", "small"),
    [
        (True, (100.0, 100.0), 0.5),
        # Within the tolerance, and a small tensor with nothing but errors of its own size.
        (True, (101.0, 99.0), 0.5),
        (True, (100.0, 100.0), -0.5),
        # The right length in another direction; too far; not at all, though it hardly matters to the whole.
        (False, (100.0, -100.0), 0.5),
        (False, (110.0, 110.0), 0.5),
        (False, (100.0, 100.0), 0.0),
        (False, (100.0, 100.0), 1.5),
        (False, (float("nan"), 100.0), 0.5),
    ],
)
def test_a_replay_must_move_every_tensor_about_as_far_and_all_of_them_to_about_the_same_place(right, large, small):
    def replay(one, other):
        one.add_(torch.tensor(large))
        other.add_(small)

    assert check_of(replay).runs_eagerly is not right


def test_a_static_batch_holds_every_view_of_the_batch_that_was_loaded_last():
    def batch(seed):
        random = torch.Generator().manual_seed(seed)
        first, second = (
            torch.randint(256, (4, CHANNELS, *SIZE), dtype=torch.uint8, generator=random) for _ in range(2)
        )
        return ImageBatch(first, torch.arange(4) + seed, torch.arange(4) * seed, [second])

    def ask(pixels, images, rows, out):
        out.logits.copy_(pixels.float().mean(dim=(2, 3)) + images.amax())

    def see(shown):
        return [
            (p.float() / 2, Output(p.float().mean(dim=(2, 3)) + p.amax() / 2)) for p in (shown.images, *shown.views)
        ]

    recorder = Recorder()
    static = StaticBatch(batch(0), see(batch(0)), look=lambda p: p / 2, ask=ask, capture=recorder, device=CPU)
    places = [entry.data_ptr() for images, output in static.views for entry in (images, output.logits)]
    for seed in range(1, 8):
        shown = batch(seed)
        static.load(shown)
        assert torch.equal(static.targets, shown.targets)
        assert torch.equal(static.indices, shown.indices)
        for (images, output), (own_images, own_output) in zip(static.views, see(shown), strict=True):
            assert torch.equal(images, own_images)
            assert torch.equal(output.logits, own_output.logits)
    assert recorder.replayed == 4
    assert places == [entry.data_ptr() for images, output in static.views for entry in (images, output.logits)]


def test_optimizers_count_their_steps_on_the_device_where_they_can_and_the_recipe_leaves_it_open():
    def group(**fields):
        return make_optimizer(recipe(**fields), TinyNetwork(), capturable=True).param_groups[0]

    assert group(optimizer="adamw")["capturable"] is True
    assert group(optimizer="adamw", optimizer_options={"capturable": False})["capturable"] is False
    assert "capturable" not in group(optimizer="momentum")


def test_a_checkpoint_of_a_captured_run_serves_where_there_are_no_graphs():
    how = recipe(optimizer="adamw", learning_rate=0.01)
    learner, other = toy_learner(how), toy_learner(how, init=9)
    fed(learner, 3)
    state = copy.deepcopy(learner.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group.update(capturable=True)
    other.load_state_dict(state)
    fed(learner, 3)
    # With the option on a CPU torch refuses to take a step.
    fed(other, 3)
    assert differences(learner.state_dict(), other.state_dict()) == []


@pytest.mark.parametrize(
    ("given", "device", "on"), [("null", "cuda", False), ("true", "cuda", True), ("true", "cpu", False)]
)
def test_graphs_are_captured_on_cuda_where_they_are_asked_for(given, device, on):
    config = parse(compose_config([f"graphs={given}", "recipe.epochs=1"]))
    assert choose_switches(config, torch.device(device), TinyNetwork()).graphs is on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_give_what_eager_steps_give(optimizer, precision, caplog):
    device = torch.device("cuda")

    def build():
        return Learner(
            TinyNetwork(3).to(device),
            toy_method("dkd").to(device),
            recipe(optimizer=optimizer, ema_decay=0.9, clip_grad_norm=1.0, learning_rate=0.01),
            precision=Precision(precision, device),
            cross_entropy_weight=0.1,
            seed=1,
            device=device,
            fused_optimizer=True,
            capturable_optimizer=True,
        )

    learner, eager = build(), build()
    capture = CudaCapture(device)
    counted = SimpleNamespace(run=capture.run, capture=lambda function: recorded.append(1) or capture.capture(function))
    recorded = []
    with caplog.at_level(logging.INFO, logger="vkd"):
        fed(learner, 12, counted, device=device)
    fed(eager, 12, device=device)
    assert caplog.records == []
    assert recorded == [1]
    torch.testing.assert_close(
        dict(learner.student.state_dict()), dict(eager.student.state_dict()), rtol=1e-3, atol=1e-5
    )
    assert learner.epoch_figures() == pytest.approx(eager.epoch_figures(), rel=1e-3)
