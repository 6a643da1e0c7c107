"""The switches of speed change no more than rounding, and say so when they are on."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import PAIR, PLAIN, TEACHERS, TINY, only_run, read, train
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from toys import TinyNetwork, recipe, rig, toy_teacher

from vkd.composition import compose_config
from vkd.config import parse
from vkd.models import create_model, save_weights
from vkd.training.assembly import Workplace, assemble
from vkd.training.run import run
from vkd.training.switches import Switches
from vkd.training.teacher_views import TeacherViews

QUIET = Console(quiet=True)
needs_a_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The file of a teacher whose BatchNorms have statistics and weights of their own, as after training."""
    network = create_model("cifar_resnet8", num_classes=10, in_channels=1, image_size=(8, 8), seed=5)
    random = torch.Generator().manual_seed(6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for entry in (module.running_var, module.weight.data):
                entry.uniform_(0.5, 2, generator=random)
            for entry in (module.running_mean, module.bias.data):
                entry.normal_(0, 0.2, generator=random)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(network, path, {"arch": "cifar_resnet8"})
    return path


@pytest.fixture(scope="module")
def distil(teacher, tmp_path_factory):
    """Trains a student for an epoch in a study of its own: its weights and figures, and the switches that were on."""
    root = tmp_path_factory.mktemp("runs")

    def distil(study: str, *words: str) -> SimpleNamespace:
        given = ["teacher.arch=cifar_resnet8", f"teacher.checkpoint={teacher}", "recipe.batch_size=128"]
        given += ["recipe.drop_last=true", f"study={study}", f"runs_root={root}"]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            directory = run(parse(compose_config([*TINY, *given, *words])), console=QUIET).directory
        finally:
            torch.set_num_threads(before)
        result = read(directory.result)
        return SimpleNamespace(
            weights=load_file(directory.weights),
            metrics=result["metrics"],
            switches=result["environment"]["switches"],
            root=root,
        )

    return distil


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((entry.double() - other[name].double()).abs().max().item() for name, entry in one.items())


# Switches that only round


@pytest.fixture(scope="module")
def usual(distil):
    """A student that learns with the switches that are on by default."""
    return distil("usual", "student.arch=cifar_resnet8")


@pytest.mark.parametrize(
    ("word", "switch"),
    [
        ("teacher.fold=false", "fold"),
        ("channels_last=false", "channels_last"),
        ("fused_optimizer=false", "fused_optimizer"),
    ],
)
def test_a_student_is_the_same_but_for_rounding_without_a_switch(distil, usual, word, switch):
    without = distil(switch, "student.arch=cifar_resnet8", word)
    assert without.switches == {**usual.switches, switch: False}
    assert usual.switches[switch] is True
    difference = largest_difference(without.weights, usual.weights)
    assert 0 < difference < 1e-4
    assert without.metrics["train/loss"] == pytest.approx(usual.metrics["train/loss"], rel=1e-5)
    assert without.metrics["test/nll"] == pytest.approx(usual.metrics["test/nll"], rel=1e-4)


@pytest.mark.parametrize("word", ["true", "false"])
def test_weights_and_images_lie_as_the_switch_says(teacher, word):
    words = ["teacher.arch=cifar_resnet8", f"teacher.checkpoint={teacher}", "student.arch=cifar_resnet8"]
    trainer = assemble([parse(compose_config([*TINY, *words, f"channels_last={word}"]))], Workplace())
    student = trainer.sessions[0].learner.student
    seen = []
    student.layer1.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    trainer.take_steps(1)
    weights = [module.weight for module in student.layer1.modules() if isinstance(module, nn.Conv2d)]
    assert len(weights) > 1
    for entry in (*weights, *seen):
        assert entry.is_contiguous(memory_format=torch.channels_last) is (word == "true")


def switched(**on: bool) -> Switches:
    """All switches off but these."""
    fields = {entry.name: False for entry in dataclasses.fields(Switches)}
    return Switches(**{**fields, "cache": "none", "precision": "fp32", **on})


@needs_a_compiler
def test_a_compiled_teacher_teaches_the_same_but_for_rounding(data):
    # Four steps, the last one of six images and not eight.
    images = next(iter(data.eval_batches("test", batch_size=8))).images
    plain = toy_teacher(data)
    compiled = plain.made_fast(switched(fold=True, compile_teacher=True), images, batch_size=8)
    assert compiled.padded_to == 8
    assert type(compiled.network) is not type(plain.model)
    for count in (8, 6, 1):
        inputs = plain.normalization(images[:count])
        found, expected = compiled(images[:count], inputs).logits, plain(images[:count], inputs).logits
        assert found.shape == expected.shape == (count, data.num_classes)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    students = [rig(data, recipe(epochs=1), teacher=one) for one in (plain, compiled)]
    for parts in students:
        parts.trainer.take_steps(4)
    one, other = (parts.learner.student.state_dict() for parts in students)
    assert largest_difference(one, other) < 1e-5


@needs_a_compiler
def test_a_compiled_student_learns_the_same_but_for_rounding(data):
    students = [
        rig(data, recipe(drop_last=True), student=TinyNetwork(3, dropout=0.0), compile=compile)
        for compile in (False, True)
    ]
    assert [parts.learner.student._compiled_call_impl is not None for parts in students] == [False, True]
    for parts in students:
        parts.trainer.take_steps(4)
    one, other = (parts.learner.student.state_dict() for parts in students)
    assert largest_difference(one, TinyNetwork(3).state_dict()) > 1e-2
    assert largest_difference(one, other) < 1e-5


# The teacher's logits from a table

VIEWS = ["dataset.augmentation={crop:{padding:1},flip:{}}"]


@pytest.fixture(scope="module")
def tables(distil):
    """Students of the same teacher, with tables of its logits and without; and which rows were computed for each."""
    asked, computed = {}, {}

    def learn(name: str, *words: str) -> SimpleNamespace:
        logits = TeacherViews.logits
        asked[name], computed[name] = [], []

        def noted(self, view_rows, compute):
            asked[name].extend(view_rows.tolist())

            def compute_noted(positions):
                computed[name].extend(view_rows[positions].tolist())
                return compute(positions)

            return logits(self, view_rows, compute_noted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TeacherViews, "logits", noted)
            return distil(name, *VIEWS, *words)

    cached = ["teacher.cache=views", "teacher.cache_dtype=float32"]
    return SimpleNamespace(
        asked=asked,
        computed=computed,
        live=learn("live"),
        first=learn("first", *cached),
        live_of_another_seed=learn("live_of_another_seed", "seed=2"),
        of_another_seed=learn("of_another_seed", *cached, "seed=2"),
        of_another_method=learn("of_another_method", *cached, "method=dkd"),
        half=learn("half", "teacher.cache=views"),
    )


def test_a_student_of_a_table_in_float32_equals_one_of_the_teacher_itself_to_the_last_bit(tables):
    for cached, live in ((tables.first, tables.live), (tables.of_another_seed, tables.live_of_another_seed)):
        assert (cached.switches["cache"], live.switches["cache"]) == ("views", "none")
        assert largest_difference(cached.weights, live.weights) == 0
        assert cached.metrics == live.metrics
    assert largest_difference(tables.live.weights, tables.live_of_another_seed.weights) > 0
    assert tables.asked["live"] == tables.computed["live"] == []


def test_runs_of_another_seed_and_method_find_the_logits_that_were_computed_before(tables):
    images = 8 * 128  # of the steps of an epoch
    first, second = set(tables.asked["first"]), set(tables.asked["of_another_seed"])
    assert len(first) == len(tables.asked["first"]) == len(second) == images
    assert set(tables.computed["first"]) == first
    assert len(first & second) > 10
    assert set(tables.computed["of_another_seed"]) == second - first
    assert set(tables.asked["of_another_method"]) == first
    assert tables.computed["of_another_method"] == []
    # A table of each precision, with a row for each view of each image: nine crops, as they are and flipped.
    sizes = sorted(path.stat().st_size for path in tables.first.root.glob(".teacher_views/*/logits.bin"))
    rows = read(next(iter(tables.first.root.glob(".teacher_views/*/identity.json"))))["rows"]
    assert sizes == [2 * 10 * rows, 4 * 10 * rows]
    assert rows % 18 == 0
    filled = [path.read_bytes().count(1) for path in tables.first.root.glob(".teacher_views/*/filled.bin")]
    assert sorted(filled) == [images, len(first | second)]


def test_a_student_of_a_table_in_float16_is_the_same_within_that_precision(tables):
    assert 0 < largest_difference(tables.half.weights, tables.live.weights) < 2e-3
    assert tables.half.metrics["train/loss"] == pytest.approx(tables.live.metrics["train/loss"], rel=1e-3)
    assert tables.half.metrics["test/nll"] == pytest.approx(tables.live.metrics["test/nll"], rel=1e-2)


# What is on, and what cannot be


def test_the_log_of_a_run_says_which_switches_are_on_and_a_plain_one_has_none_of_a_teacher(trained):
    switches = {}
    for name, directory in (("teacher", trained / TEACHERS), ("student", trained / PAIR)):
        log = (only_run(directory) / "train.log").read_text()
        ((on, off),) = re.findall(r"speed: on: (.*); off: (.*)\n", log)
        switches[name] = {**dict.fromkeys(on.split(", "), True), **dict.fromkeys(off.split(", "), False)}
    for name, is_on in {"fused optimizer": True, "channels last": False, "student compiled": False}.items():
        assert switches["student"][name] is switches["teacher"][name] is is_on
    assert switches["student"]["teacher folded"] is True
    assert not any(switches["teacher"][name] for name in switches["teacher"] if name.startswith("teacher"))
    assert read(only_run(trained / PAIR) / "result.json")["environment"]["switches"]["channels_last"] is False


def test_channels_last_is_refused_where_torch_would_compute_wrong_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("method=none", "channels_last=true") == 1
    said = capsys.readouterr().err
    assert "channels_last=true" in said
    assert "cifar_resnet8_width4" in said
    assert "channels_last=false" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not Path("runs", PLAIN).exists()
