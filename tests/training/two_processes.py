"""What two processes do together, beside one process that does the same: the cases of `test_distribution.py`.

Started as a script in each of two processes, which run all cases one after the other, each against a reference that it
computes by itself. What a case does not like it says by an assertion; the texts go into the file that the script is
given.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from toys import CPU, DrawnProjection, toy_data

from vkd.composition import compose_config
from vkd.config import Config, parse
from vkd.data import Normalization
from vkd.errors import TrainingError
from vkd.methods import METHODS, Batch, Method, MethodContext
from vkd.models import save_weights
from vkd.training.assembly import (
    Setting,
    Workplace,
    make_learner,
    make_session,
    make_student,
    make_teacher,
    make_trainer,
    open_given,
    views_of,
)
from vkd.training.batch_norm import synchronized
from vkd.training.display import Silent
from vkd.training.distribution import ONE, GradientSum, Processes, join
from vkd.training.interruption import Interrupted
from vkd.training.measurement import Evaluator, split_logits
from vkd.training.teacher import open_untrained

CASES: dict[str, Callable[[Processes, Path], None]] = {}

WORDS = [
    "dataset=digits",
    "dataset.train_fraction=0.139",  # 145 images: two batches of 70 and one of 5, which cannot be halved
    "teacher.arch=cifar_resnet8",
    "teacher.allow_chance_accuracy=true",
    "student.arch=cifar_resnet8_width4",
    "recipe.epochs=1",
    "recipe.batch_size=70",
    "device=cpu",
]


def case(function: Callable[[Processes, Path], None]) -> Callable[[Processes, Path], None]:
    CASES[function.__name__] = function
    return function


def close(found: Any, expected: Any, tolerance: float) -> bool:
    return torch.allclose(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


# --- single pieces ---------------------------------------------------------------------------------------------------


@case
def what_the_first_process_gives_or_raises_reaches_all(processes: Processes, folder: Path) -> None:
    called = []

    def give() -> str:
        called.append(1)
        return "from the first"

    def fail() -> None:
        raise TrainingError("no room", hint="make some")

    assert processes.first(give) == "from the first"
    assert len(called) == (processes.rank == 0)
    with pytest.raises(TrainingError) as caught:
        processes.first(fail)
    assert str(caught.value) == "no room\n  try: make some"
    assert processes.gather(processes.rank) == [0, 1]


@case
def a_flag_that_one_process_raises_is_seen_by_all_at_the_next_call(processes: Processes, folder: Path) -> None:
    second = processes.rank == 1
    assert processes.agree(second) is True
    assert processes.agree(False) is False
    assert processes.flags(second, False) == (False, False)
    assert processes.flags(False, not second) == (True, False)
    assert processes.flags(False, False) == (False, True)
    processes.settle()
    assert processes.flags(False, False) == (False, False)
    processes.settle()


@case
def gathered_rows_have_the_values_and_the_gradient_of_one_process(processes: Processes, folder: Path) -> None:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(whole: Tensor, matrix: Tensor) -> Tensor:
        return (whole @ matrix @ whole.T).square().sum()

    expected_rows, expected_weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    loss(expected_rows, expected_weight).backward()
    mine, own = (slice(0, 3), slice(3, 5))[processes.rank], weight.clone().requires_grad_()
    share = rows[mine].clone().requires_grad_()
    whole = processes.gather_rows(share, [3, 2])
    assert torch.equal(whole, rows)
    value = loss(whole, own) / 2
    value.backward()
    total = value.detach().clone()
    processes.sum_([total])
    GradientSum([own], processes)()
    assert close(total, loss(rows, weight), 1e-12)
    assert close(share.grad, expected_rows.grad[mine], 1e-12)
    assert close(own.grad, expected_weight.grad, 1e-12)


@case
def a_parameter_with_a_gradient_on_one_process_alone_is_refused(processes: Processes, folder: Path) -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[processes.rank].sum().backward()
    with pytest.raises(TrainingError, match="different parameters"):
        GradientSum(parameters, processes)()


def _layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    plain = nn.BatchNorm2d(3, affine=False)
    cumulative = nn.BatchNorm2d(3, momentum=None)
    act = BatchNormAct2d(3, act_layer=nn.ReLU)
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    return {
        "2d": (nn.BatchNorm2d(3, momentum=0.3), (3, 4, 5)),
        "1d": (nn.BatchNorm1d(3), (3,)),
        "sequence": (nn.BatchNorm1d(3), (3, 6)),
        "3d": (nn.BatchNorm3d(3), (3, 2, 4, 2)),
        "no affine": (plain, (3, 4, 5)),
        "cumulative": (cumulative, (3, 4, 5)),
        "timm's": (act, (3, 4, 5)),
        "untracked": (untracked, (3, 4, 5)),
    }


@case
def batch_norm_over_shares_is_that_of_the_whole_batch(processes: Processes, folder: Path) -> None:
    random = torch.Generator().manual_seed(4)
    for name, (layer, shape) in _layers().items():
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            # A mean far from 0, which a variance from sums of squares would drown in.
            images = 1000 + torch.randn(7, *shape, generator=random, dtype=torch.float64).to(dtype)
            images = images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images
            factors = torch.randn(7, *shape, generator=random, dtype=torch.float64).to(dtype)
            reference = copy.deepcopy(layer).to(dtype).train()
            subject = synchronized(nn.Sequential(copy.deepcopy(layer).to(dtype).train()), processes, CPU)
            assert list(subject[0].state_dict()) == list(reference.state_dict())
            mine = (slice(0, 4), slice(4, 7))[processes.rank]
            for _ in range(2):
                whole = images.clone().requires_grad_()
                share = images[mine].clone().requires_grad_()
                expected, found = reference.double()(whole.double()), subject(share)
                (expected * factors.double()).sum().backward()
                (found * factors[mine]).sum().backward()
                assert found.dtype == dtype, name
                assert close(found, expected[mine], 100 * tolerance), name
                assert close(share.grad, whole.grad[mine], 100 * tolerance), name
            GradientSum(list(subject.parameters()), processes)()
            for one, other in zip(subject.parameters(), reference.parameters(), strict=True):
                assert close(one.grad, other.grad, 300 * tolerance), name
            for one, other in zip(subject.buffers(), reference.buffers(), strict=True):
                assert close(one, other, tolerance), name
                assert all(torch.equal(entry, one) for entry in processes.gather(one)), name
            subject.eval(), reference.eval()
            if reference.track_running_stats:
                assert close(subject(images[mine]), reference(images.double())[mine], 100 * tolerance), name


@case
def every_image_of_a_split_is_measured_once(processes: Processes, folder: Path) -> None:
    for test in (13, 14, 1):
        data = toy_data(Path(tempfile.mkdtemp()), test=test)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, data.num_classes))
        other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, data.num_classes))
        normalization = Normalization(data.mean, data.std, data.channels)
        alone = {split: split_logits(other, data, split, normalization, batch_size=3) for split in ("val", "test")}
        for split, (logits, targets) in alone.items():
            found = split_logits(other, data, split, normalization, batch_size=3, processes=processes)
            assert torch.equal(found[1], targets)
            assert close(found[0], logits, 1e-6)
        teacher = {split: logits for split, (logits, _) in alone.items()}
        figures = [
            Evaluator(data, normalization, teacher_logits=teacher, batch_size=3, device=CPU, processes=each)(network)
            for each in (ONE, processes)
        ]
        assert list(figures[0]) == list(figures[1])
        for name, value in figures[0].items():
            assert value is figures[1][name] or close(figures[1][name], value, 1e-6), name
        assert processes.gather(figures[1]) == [figures[1]] * 2


# --- training --------------------------------------------------------------------------------------------------------


@cache
def config_of(*words: str) -> Config:
    return parse(compose_config(words))


def assembled(
    words: list[str], processes: Processes, folder: Path, *, method: dict[str, Any] | None = None, **options: Any
) -> SimpleNamespace:
    """A trainer with its parts, for a config by its words; `method` is put in the place of the config's."""
    checkpoint = folder / "teacher.safetensors"
    config = copy.deepcopy(config_of(*WORDS, f"teacher.checkpoint={checkpoint}", f"runs_root={folder}", *words))
    config.method = config.method if method is None else method
    setting = Setting(WORKPLACE.data(config, CPU, views_of(config)), CPU, processes=processes)
    assert setting.data.train_size == 145
    student = make_student(config, setting.data)
    setting.decide(config, student)
    if not config.is_plain:
        if not checkpoint.exists():
            processes.first(lambda: save_weights(open_untrained(config, setting.data), checkpoint, {}))
        opened = open_given(config, setting.data)
        setting.teacher = make_teacher(config, setting, Workplace(), opened, {"sha256": opened.sha256})
    learner = make_learner(config, setting, student)
    first = copy.deepcopy(learner.student.state_dict())
    session = make_session(
        config, setting, learner, fingerprint="f" * 64, checkpoint_path=options.pop("checkpoint_path", None)
    )
    trainer = make_trainer(config, setting, [session], display=Silent(), **options)
    return SimpleNamespace(trainer=trainer, learner=learner, session=session, first=first, config=config)


WORKPLACE = Workplace()


def moved(parts: SimpleNamespace) -> Tensor:
    """How far training took the student's parameters and running statistics, as one vector."""
    state = parts.learner.student.state_dict()
    return torch.cat([(state[name] - before).double().flatten() for name, before in parts.first.items()])


def assert_alike(
    words: list[str], processes: Processes, folder: Path, *, rounding: float = 1.0, **options: Any
) -> None:
    """Train on one process and on all: the same course of losses, the same figures, weights and states of methods.

    Weights may differ by a ten-thousandth of the way that training took them, `rounding` times that in half precision.
    """
    one, several = (assembled(words, each, folder, **options) for each in (ONE, processes))
    (alone,), (together,) = one.trainer.fit(), several.trainer.fit()
    assert len(alone.history) == len(together.history)
    for before, after in zip(alone.history, together.history, strict=True):
        assert list(before) == list(after)
        for name, value in before.items():
            if name in ("seconds", "images_per_second"):
                continue
            # An image more or less on the right side of a decision is no matter.
            slack = rounding * (1.5 if name.endswith(("top1", "top5", "agreement")) else 2e-4)
            assert value is after[name] or abs(after[name] - value) <= slack * max(1, abs(value)), (name, before, after)
    assert not torch.equal(moved(one), torch.zeros_like(moved(one)))
    error = ((moved(one) - moved(several)).norm() / moved(one).norm()).item()
    assert error < 1e-4 * rounding, f"weights differ by {error:.2g} of their way"
    for name, value in one.learner.method.state_dict().items():
        found = several.learner.method.state_dict()[name]
        assert torch.allclose(found.double(), value.double(), rtol=1e-2, atol=1e-3), name
    state = {**several.learner.student.state_dict(), **several.learner.method.state_dict()}
    for name, value in state.items():
        assert all(torch.equal(entry, value) for entry in processes.gather(value)), name


def _method_case(name: str) -> None:
    def run(processes: Processes, folder: Path) -> None:
        # Rates at which no method runs away, where rounding errors would grow without bounds.
        assert_alike([f"method={name}", "recipe.learning_rate=0.003"], processes, folder)

    CASES[f"method {name}"] = run


for _name in METHODS:
    _method_case(_name)


class PerImage(Method):
    """A method of each image by itself, with a parameter."""

    per_image = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        gap = self.scale * batch.student.logits - batch.teacher.logits
        return {"gap": 0.1 * gap.square().mean(), "size": 0.01 * batch.student.logits.square().sum(dim=1).mean()}


SETTINGS = {
    "plain training with label smoothing": ["method=none", "recipe.label_smoothing=0.1"],
    "clipping and a moving average": ["method=kd", "recipe.clip_grad_norm=0.05", "recipe.ema_decay=0.9"],
    "adamw": ["method=kd", "recipe.optimizer=adamw", "recipe.learning_rate=0.0003"],
    "a method of each kind": ["method=[kd,rkd,fitnet]", "recipe.learning_rate=0.003"],
    "bf16": ["method=dkd", "precision=bf16", "recipe.learning_rate=0.003"],
    "fp16": ["method=kd", "precision=fp16", "recipe.clip_grad_norm=1", "recipe.learning_rate=0.003"],
    "smaller batches of the last kind": ["method=kd", "recipe.batch_size=30", "recipe.learning_rate=0.003"],
    "views of the teacher that are kept": ["method=kd", "teacher.cache=views", "recipe.learning_rate=0.003"],
    "the last batch left out": ["method=kd", "recipe.batch_size=40", "recipe.drop_last=true"],
}
ROUNDING = {"bf16": 1000.0, "fp16": 500.0}
"""Half precision rounds activations to two or three digits."""


def _setting_case(name: str) -> None:
    CASES[name] = lambda processes, folder: assert_alike(
        SETTINGS[name], processes, folder, rounding=ROUNDING.get(name, 1.0)
    )


for _name in SETTINGS:
    _setting_case(_name)


@case
def methods_that_say_nothing_of_themselves_are_shown_the_whole_batch(processes: Processes, folder: Path) -> None:
    for kind in (DrawnProjection, PerImage):
        METHODS._entries["drawn"] = kind
        try:
            assert_alike(["method=kd"], processes, folder, method={"drawn": {}})
        finally:
            del METHODS._entries["drawn"]


@case
def with_statistics_of_its_own_each_process_has_the_same_weights(processes: Processes, folder: Path) -> None:
    parts = assembled(["method=kd", "sync_batch_norm=false", "recipe.ema_decay=0.9"], processes, folder)
    (record,) = parts.trainer.fit()
    networks = {"student": parts.learner.student, "average": parts.learner.average.module}
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert all(torch.equal(entry, value) for entry in processes.gather(value)), f"{name} {key}"
    assert processes.gather(record.metrics) == [record.metrics] * 2
    over_all = assembled(["method=kd", "recipe.ema_decay=0.9"], processes, folder)
    over_all.trainer.fit()
    assert not torch.equal(moved(parts), moved(over_all))


@case
def dropout_cuts_other_units_from_each_share(processes: Processes, folder: Path) -> None:
    parts = assembled(["method=none"], processes, folder)
    with parts.learner._own_randomness():
        drawn = torch.rand(4)
    assert len({tuple(entry.tolist()) for entry in processes.gather(drawn)}) == 2


@case
def a_loss_that_is_not_finite_on_one_process_stops_both_at_the_same_step(processes: Processes, folder: Path) -> None:
    parts = assembled(["method=kd"], processes, folder)
    step = parts.learner.step

    def breaking(images: Tensor, *arguments: Any, **how: Any) -> None:
        if arguments[3].step == 2 and processes.rank == 1:
            images = images * torch.inf
        step(images, *arguments, **how)

    parts.learner.step = breaking
    with pytest.raises(TrainingError, match="at step 2") as caught:
        parts.trainer.fit()
    assert processes.gather(str(caught.value)) == [str(caught.value)] * 2


@case
def stopped_after_any_step_two_processes_end_as_if_they_had_not_been(processes: Processes, folder: Path) -> None:
    # Draws of a method, dropout, sums of each share: everything must come from the checkpoint.
    words = ["method=crd", "recipe.learning_rate=0.003", "recipe.ema_decay=0.9", "recipe.epochs=2"]
    whole = assembled(words, processes, folder)
    (expected,) = whole.trainer.fit()
    for number in range(1, 5):
        path = folder / f"{number}.ckpt"
        steps = []

        def stop(asked: int = number, steps: list[int] = steps) -> bool:
            steps.append(1)
            # One process alone is asked to.
            return processes.rank == 1 and len(steps) >= asked

        parts = assembled(words, processes, folder, checkpoint_path=path, should_stop=stop)
        with pytest.raises(Interrupted) as caught:
            parts.trainer.fit()
        assert processes.gather(str(caught.value)) == [str(caught.value)] * 2
        again = assembled([*words, "seed=1"], processes, folder, checkpoint_path=path)
        assert again.session.restore()
        assert processes.gather(again.session.position) == [again.session.position] * 2
        (record,) = again.trainer.fit()
        untimed = [
            [
                {name: value for name, value in line.items() if name not in ("seconds", "images_per_second")}
                for line in entry.history
            ]
            for entry in (expected, record)
        ]
        assert untimed[0] == untimed[1], number
        for network in ("student", "method"):
            before, after = (getattr(entry.learner, network).state_dict() for entry in (whole, again))
            assert all(torch.equal(before[name], after[name]) for name in before), (number, network)


@case
def checkpoints_by_the_clock_are_those_of_the_first_process(processes: Processes, folder: Path) -> None:
    path = folder / "clock.ckpt"
    parts = assembled(["method=kd", "checkpoint_minutes=0", "recipe.epochs=2"], processes, folder, checkpoint_path=path)
    saved: list[tuple[int, int]] = []
    save = parts.session.save

    def noted(epoch: int, step: int) -> None:
        saved.append((epoch, step))
        save(epoch, step)

    parts.session.save = noted
    parts.trainer.fit()
    assert processes.gather(saved) == [saved] * 2
    # A flag is read one step after it was raised, and the end of an epoch is a checkpoint anyway.
    assert saved == [(1, 2), (2, 0), (2, 2), (3, 0)]


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    processes = join()
    assert processes.world_size == 2
    faults = {}
    for name, run in CASES.items():
        if chosen and name not in chosen:
            continue
        fault = None
        try:
            run(processes, folder)
        except Exception:
            fault = traceback.format_exc()
        faults[name] = "\n".join(filter(None, processes.gather(fault)))
    if processes.is_first:
        (folder / "faults.json").write_text(json.dumps(faults))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
