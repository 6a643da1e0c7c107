"""What users of such tools have reported, provoked here; `README.md` beside this file says which test answers which.

Most of those reports are answered by tests elsewhere. Here are the others, and a check of the page.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import pickle
import re
import shlex
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import hydra.core.utils
import numpy as np
import pytest
import torch
import yaml
from commands import TEACHERS, TINY, only_run, read, runs_in, snapshot, train
from hydra._internal.utils import get_args_parser
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import vkd
import vkd.composition
from vkd.composition import compose_config, compose_jobs, read_command_line
from vkd.config import DatasetConfig, config_directory, parse
from vkd.data import load_data
from vkd.errors import ConfigError
from vkd.jobs import Jobs
from vkd.methods import METHODS
from vkd.records.sweep_index import read_sweep
from vkd.training.assembly import Workplace, assemble
from vkd.training.environment import environment, git_revision

CPU = torch.device("cpu")
PAGE = Path(__file__).with_name("README.md")
ROOT = PAGE.parent.parent

REPORTS = {
    "megvii-research/mdistiller": [7, 8, 42, 51, 54, 62, 66],
    "HobbitLong/RepDistiller": [47, 57, 62],
    "lucidrains/vit-pytorch": [232],
    "huggingface/pytorch-image-models": [433, 948],
    "facebookresearch/deit": [61, 91, 116],
    "HikariTJU/LD": [74],
    "yuanli2333/Teacher-free-Knowledge-Distillation": [5, 41],
    "huggingface/trl": [4935],
    "lightonai/pylate": [239],
    "yzd-v/cls_KD": [13],
    "yoshitomo-matsubara/torchdistill": [386],
    "Lightning-AI/pytorch-lightning": [2727, 4732, 9599],
    "milesial/Pytorch-UNet": [468],
    "wandb/wandb": [1233, 1314, 2701, 2877, 4217, 8003],
    "ashleve/lightning-hydra-template": [148, 283, 289, 393, 511, 535, 582],
    "hydra-ecosystem/hydra": [311, 1314, 1331, 1407, 1832, 2070, 2757, 2807, 2946, 3002, 3121, 3328],
    "pytorch/pytorch": [5059, 25162, 135892, 148439, 160281],
    "roboflow/rf-detr": [1507],
    "sunshangquan/logit-standardization-KD": [15, 27],
    "hunto/DIST_KD": [13],
    "pytorch/vision": [5039, 6007],
    "NVIDIA/runx": [20],
    "Hao840/OFAKD": [19, 22, 33],
}


# Names of runs


def test_whatever_a_sweep_is_over_its_runs_have_short_plain_names_and_its_values_are_in_files(place):
    teacher = only_run(place / "runs" / TEACHERS) / "student.safetensors"
    odd = Path("a=b,c", "d [e] {f} 'g' $h;i é", "one.safetensors")
    (place / odd).parent.mkdir(parents=True)
    shutil.copy(teacher, place / odd)
    other = {name: entry * 2 if entry.is_floating_point() else entry for name, entry in load_file(teacher).items()}
    save_file(other, place / "two.safetensors")
    quoted = str(odd).replace("'", "\\'")
    words = ["recipe.milestones=[3],[3,4]", f"teacher.checkpoint='{quoted}',two.safetensors"]
    words += ["tracker.project='a=b,c/d'", "tracker.tags=['x/y','[z]']", "recipe.batch_size=256"]
    assert train("-m", *words) == 0

    runs = runs_in(place / "runs" / "digits")
    assert len(runs) == 4
    for run in runs:
        assert re.fullmatch(r"digits/cifar_resnet8_width4-cifar_resnet8_width4/kd-fkld-s1-[0-9a-f]{8}", _below(run))
    folders = [path for path in (place / "runs").rglob("*") if path.is_dir()]
    for folder in folders:
        assert re.fullmatch(r"[A-Za-z0-9._+-]{1,64}", folder.name), folder
    assert {folder.name for folder in (place / "runs").iterdir()} == {"digits", "teachers", ".sweeps"}
    assert {entry.name for entry in place.iterdir()} == {"runs", "a=b,c", "two.safetensors"}

    asked = {(path, milestones) for path in (str(odd), "two.safetensors") for milestones in ((3,), (3, 4))}
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert {(config["teacher"]["checkpoint"], tuple(config["recipe"]["milestones"])) for config in configs} == asked
    assert {config["tracker"]["project"] for config in configs} == {"a=b,c/d"}
    assert [config["tracker"]["tags"] for config in configs] == [["x/y", "[z]"]] * 4
    # The words of each job ask for it again.
    for run, config in list(zip(runs, configs, strict=True))[:2]:
        _, _, module, *recorded = shlex.split(read(run / "result.json")["environment"]["command"])
        assert module == "vkd.train"
        own = compose_config(recorded)
        assert own.teacher.checkpoint == config["teacher"]["checkpoint"]
        assert own.recipe.milestones == config["recipe"]["milestones"]
    (index,) = (place / "runs" / ".sweeps").glob("*/sweep.json")
    assert sorted(Path(job.directory).name for job in read_sweep(index).jobs) == sorted(run.name for run in runs)


def _below(run: Path) -> str:
    return run.relative_to(run.parents[2]).as_posix()


class _Stopped(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)


def test_sweeps_that_start_in_the_same_second_leave_every_run_of_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datetime, "datetime", _Stopped)
    monkeypatch.setattr(hydra.core.utils, "datetime", _Stopped)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, at=None: strftime(form, at or time.gmtime(1e9)))
    assert train("-m", "method=none", "seed=1,2") == 0
    first = {path: content for path, content in snapshot(tmp_path).items() if not path.endswith(".lock")}
    assert train("-m", "method=none", "seed=3,4") == 0
    both = snapshot(tmp_path)
    assert {path: both[path] for path in first} == first
    assert [read(run / "result.json")["seed"] for run in runs_in(tmp_path)] == [1, 2, 3, 4]
    assert len([path for path in both if path.endswith("/sweep.json")]) == 2


# What was run, and where


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_run_records_which_copy_of_the_package_ran_and_at_which_commit(trained, tmp_path, monkeypatch):
    recorded = read(next(trained.rglob("result.json")))["environment"]
    assert recorded["package"] == str(Path(vkd.__file__).resolve().parent)
    assert "git" in recorded

    # Another copy that is imported in its place, as an installed one is in that of a checkout that was edited.
    copy = tmp_path / "elsewhere" / "vkd" / "__init__.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    monkeypatch.setattr(vkd, "__file__", str(copy))
    assert environment(CPU)["package"] == str(copy.parent.resolve())
    assert environment(CPU)["git"] is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *words], cwd=copy.parent.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert git_revision() == commit[:12]
    copy.write_text("edited = True\n")
    assert git_revision() == commit[:12] + "+"
    git("commit", "--quiet", "--all", "--message", "second")
    assert git_revision() == git("rev-parse", "HEAD")[:12] != commit[:12]


@pytest.fixture
def devices_of(monkeypatch, tmp_path):
    """A function: the device that each job of a sweep asks for in the process in which a launcher has started it."""
    monkeypatch.chdir(tmp_path)
    composed = parse(compose_config(["dataset=digits"]))
    seen = []

    def note(configs, **_options):
        seen.extend(config.device for config in configs)

    monkeypatch.setattr("vkd.training.run.run_together", note)

    def devices(device: str, *, together: bool = False, elsewhere: bool = True) -> list[str]:
        planned = [
            (
                number,
                [f"divergence.temperature={number}"],
                dataclasses.replace(composed, device=device, divergence={"name": "fkld", "temperature": float(number)}),
            )
            for number in range(1, 6)
        ]
        jobs = Jobs(None, [(words, config) for _, words, config in planned], ["-m"])
        seen.clear()
        for group in [planned] if together else [[job] for job in planned]:
            # Each process gets a copy of its own.
            (pickle.loads(pickle.dumps(jobs)) if elsewhere else jobs).together(group)
        return list(seen)

    return devices


def test_jobs_that_run_at_once_do_not_all_take_the_first_gpu(devices_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto") == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert devices_of("cuda:1") == ["cuda:1"] * 5
    assert devices_of("cpu") == ["cpu"] * 5
    # One after the other in the process of the command, each has the first one to itself.
    assert devices_of("auto", elsewhere=False) == ["auto"] * 5
    # A launcher that gives each process one GPU has hidden the others from it.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices_of("auto") == ["auto"] * 5


def test_students_that_train_side_by_side_are_on_one_gpu(devices_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto", together=True) == ["cuda:0"] * 5


# Experiments


@pytest.fixture
def with_experiments(monkeypatch, tmp_path):
    """A function that adds experiments, by their names, to a copy of `conf/`."""

    def add(**texts: str) -> None:
        shutil.copytree(config_directory(), tmp_path / "conf")
        for name, text in texts.items():
            (tmp_path / "conf" / "experiment" / f"{name}.yaml").write_text("# @package _global_\n" + text)
        monkeypatch.setattr(vkd.composition, "config_directory", lambda: tmp_path / "conf")

    return add


SWEEP = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2,3\n"


def test_a_launcher_that_an_experiment_chooses_is_the_one_that_runs_its_jobs(with_experiments, tmp_path, monkeypatch):
    with_experiments(fusing="defaults:\n  - override /hydra/launcher: fused\n  - _self_\n" + SWEEP)
    monkeypatch.chdir(tmp_path)
    launched = []
    # Only the fused launcher hands jobs over together; others call each by itself.
    monkeypatch.setattr(Jobs, "together", lambda self, jobs: launched.append([config.seed for _, _, config in jobs]))
    monkeypatch.setattr(Jobs, "__call__", lambda self, composed: launched.append(composed.seed))
    train("+experiment=fusing", "method=none")
    assert launched == [[1, 2, 3]]
    # The word of the command line wins over that of the experiment.
    launched.clear()
    train("+experiment=fusing", "method=none", "hydra/launcher=basic", "seed=1,2")
    assert launched == [1, 2]


def test_several_experiments_that_sweep_are_refused_rather_than_run_at_one_point(with_experiments):
    with_experiments(one=SWEEP, two=SWEEP)
    assert len(compose_jobs(*read_command_line(["+experiment=one"]))) == 3
    with pytest.raises(ConfigError, match="would run one, which is a sweep itself, at one point"):
        compose_jobs(*read_command_line(["-m", "+experiment=one,two"]))


# Random numbers of workers


def test_no_two_images_share_a_random_stream_whichever_worker_reads_them(tmp_path):
    random = np.random.RandomState(0)
    picture = Image.fromarray(random.randint(0, 256, (48, 48, 3), dtype=np.uint8))
    for split in ("train", "test"):
        for kind in ("ant", "bee"):
            folder = tmp_path / "pictures" / split / kind
            folder.mkdir(parents=True)
            for number in range(8):
                picture.save(folder / f"{number}.png")
    config = DatasetConfig(
        name="imagefolder",
        root=str(tmp_path / "pictures"),
        mean=[0.5],
        std=[0.25],
        image_size=16,
        val_fraction=0.0,
        augmentation={"random_resized_crop": {"scale": [0.1, 0.5]}, "flip": {}},
    )
    # The same numbers in every worker would be drawn from global states like these.
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    data = load_data(config, tmp_path, device=CPU, workers=2)
    drawn = [
        image.numpy().tobytes()
        for epoch in (1, 2)
        for batch in data.train_batches(seed=1, epoch=epoch, batch_size=4, drop_last=False)
        for image in batch.images
    ]
    assert len(drawn) == 2 * 16
    assert len(set(drawn)) == len(drawn)


# Steps


def steps_of(checkpoint: Path, *words: str, change=lambda trainer: None, count: int = 4):
    """The student, and the trainer, after a few steps of a run that leaves no files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = parse(compose_config([*TINY, f"teacher.checkpoint={checkpoint}", *words]))
        trainer = assemble([config], Workplace())
        change(trainer)
        trainer.take_steps(count)
    finally:
        torch.set_num_threads(threads)
    learner = trainer.sessions[0].learner
    learner.check_finite()
    return {name: entry.detach().clone() for name, entry in learner.student.state_dict().items()}


@pytest.fixture
def teacher(trained):
    """The weights of a trained teacher."""
    return only_run(trained / TEACHERS) / "student.safetensors"


@pytest.mark.parametrize("constant", ["student", "student and teacher"])
@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].needs_features])
def test_constant_logits_in_fp16_give_every_method_of_logits_a_finite_gradient(name, constant, teacher, tmp_path):
    if "teacher" in constant:
        weights = load_file(teacher)
        save_file(
            {key: torch.zeros_like(entry) if key.startswith("fc.") else entry for key, entry in weights.items()},
            tmp_path / "constant.safetensors",
        )
        teacher = tmp_path / "constant.safetensors"
    before = {}

    def make_constant(trainer):
        learner = trainer.sessions[0].learner
        for parameter in learner.student.get_classifier().parameters():
            nn.init.zeros_(parameter)
        before.update({key: entry.detach().clone() for key, entry in learner.student.named_parameters()})
        # Unscaled, so that what is not finite comes from the loss.
        learner.precision.scaler.load_state_dict({**learner.precision.scaler.state_dict(), "scale": 1.0})

    words = [f"method={name}", "precision=fp16", "recipe.learning_rate=0.001", "recipe.batch_size=32"]
    after = steps_of(teacher, *words, change=make_constant, count=1)
    assert all(entry.isfinite().all() for entry in after.values())
    # The scaler leaves a step out whose gradient is not finite.
    assert any(not torch.equal(after[key], entry) for key, entry in before.items())


class Overwriting(nn.Module):
    """Writes every output where the one before it was, as compiled networks do that replay CUDA graphs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.last: dict[torch.Size, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(images)
        return self.last.setdefault(output.shape, torch.empty_like(output)).copy_(output)


def test_a_teacher_that_overwrites_its_last_output_teaches_the_same(teacher):
    def overwrite(trainer):
        trainer.teacher.network = Overwriting(trainer.teacher.network)

    # It is asked for two views of each image before the student learns from either.
    expected, found = (steps_of(teacher, "method=mlkd", change=change) for change in (lambda trainer: None, overwrite))
    assert all(torch.equal(entry, found[name]) for name, entry in expected.items())


def test_compiled_teacher_and_student_are_chained_without_the_modes_that_overwrite_outputs(teacher, monkeypatch):
    compile_, asked = torch.compile, []

    def compile_fast(model, **options):
        asked.append(options)
        return compile_(model, backend="aot_eager")

    plain = steps_of(teacher, "method=mlkd")
    monkeypatch.setattr(torch, "compile", compile_fast)
    compiled = steps_of(teacher, "method=mlkd", "compile=true", "teacher.compile=true")
    assert len(asked) == 2
    assert all(not options.get("mode") and not options.get("options") for options in asked)
    for name, entry in plain.items():
        torch.testing.assert_close(compiled[name], entry, rtol=1e-4, atol=1e-5)


# Pythons


def test_no_python_is_promised_on_which_hydras_command_line_cannot_be_read():
    # Python 3.14 looks for "%" in every help text as it is given, and Hydra gives it an object that is no text.
    texts = [action.help for action in get_args_parser()._actions]
    if not all(isinstance(text, str) for text in texts):
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        promised = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)\"", project)]
        assert promised
        assert max(promised) < 14


# The page


@functools.cache
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """The cells of each row of the table."""
    table = [line for line in page().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def reports_in(text: str) -> list[tuple[str, int]]:
    """The reports that a text names; a number alone belongs to the repository before it."""
    found, repository = [], ""
    for name, number in re.findall(r"([\w.-]+/[\w.-]+)?#(\d+)", text):
        repository = name or repository
        found.append((repository, int(number)))
    return found


def test_the_page_answers_every_report_once():
    counted = Counter(reports_in(page()))
    assert counted == {(name, number): 1 for name, numbers in REPORTS.items() for number in numbers}


def test_every_row_of_the_page_says_what_vkd_does_and_names_a_test_or_why_there_is_none():
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        assert "::test_" in row[3] or row[3].startswith("No test: "), row
        assert reports_in(row[0]) or row[0] == "found by vkd's own sweeps", row


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`([^`]+)::(\w+)`", page())
    assert len(named) == page().count("::") > 50
    for path, name in named:
        assert name in functions_of(path), f"{path}::{name}"


@functools.cache
def functions_of(path: str) -> set[str]:
    """The names of a file's own functions, which is not imported."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
