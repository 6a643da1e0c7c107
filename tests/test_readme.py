"""The README is a promise: its examples run as they stand, its commands compose."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, read
from timm.models import is_model

import vkd.data.sources
import vkd.divergences
import vkd.methods
import vkd.models
from vkd.composition import compose_jobs, read_command_line
from vkd.config import DatasetConfig, config_directory, parameters_of
from vkd.methods import METHODS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def section(title: str) -> list[tuple[str, str]]:
    """The (language, text) of every code block under a heading."""
    text = README.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def forget():
    """Takes names out of registries again."""
    taken = []
    yield lambda registry, name: taken.append((registry, name))
    for registry, name in taken:
        registry._entries.pop(name, None)


def test_the_divergence_that_the_readme_adds_is_the_squared_hellinger_distance(forget):
    forget(vkd.divergences.DIVERGENCES, "hellinger")
    (_, code), (_, config) = section("Add a divergence")
    exec(code, dict(vars(vkd.divergences)))
    student = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    divergence = vkd.divergences.make_divergence("hellinger", temperature=4.0)
    p, q = (teacher / 4).softmax(-1), (student / 4).softmax(-1)
    expected = (p.sqrt() - q.sqrt()).square().sum(-1).mean()
    value = divergence(student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    gradient, reference = (torch.autograd.grad(entry, student)[0] for entry in (value, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)
    assert "name: hellinger" in config


def test_the_method_that_the_readme_adds_trains_with_any_divergence(forget):
    forget(vkd.methods.METHODS, "confident_kd")
    (_, code), (_, config) = section("Add a method")
    exec(code, {})
    method = vkd.methods.METHODS["confident_kd"]
    assert list(parameters_of(method)) == ["weight"]
    assert "@package method.confident_kd" in config
    assert "weight: 1.0" in config
    student = torch.randn(5, 4, requires_grad=True)
    batch = vkd.methods.Batch(
        student=vkd.methods.Output(student),
        teacher=vkd.methods.Output(torch.randn(5, 4)),
        targets=torch.zeros(5, dtype=torch.int64),
        indices=torch.arange(5),
        progress=vkd.methods.Progress(epoch=1, epochs=1, step=1, steps=1),
    )
    for name in ("fkld", "rkld", "js", "tvd"):
        context = vkd.methods.MethodContext(
            divergence=vkd.divergences.make_divergence(name),
            num_classes=4,
            train_size=5,
            epochs=1,
            steps_per_epoch=1,
            student=torch.nn.Identity(),
            teacher=torch.nn.Identity(),
            image_shape=(1, 2, 2),
            generator=torch.Generator(),
        )
        (term,) = method(context, weight=1.0)(batch).values()
        term.backward()
        assert torch.isfinite(student.grad).all()


def test_following_the_readme_word_for_word_adds_a_method_to_the_command(tmp_path):
    (_, code), (_, config) = section("Add a method")
    assert len((code + config).splitlines()) < 25
    source = Path(vkd.methods.__file__).parents[1]
    shutil.copytree(source, tmp_path / "vkd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(config_directory(), tmp_path / "conf")
    (tmp_path / "vkd" / "methods" / "confident_kd.py").write_text(code, encoding="utf-8")
    (tmp_path / "conf" / "method" / "confident_kd.yaml").write_text(config, encoding="utf-8")
    words = [*TINY, "-m", "divergence=abkd,js", "method=[kd,confident_kd]"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "vkd.train", *words], check=True, cwd=tmp_path, env=environment)
    results = [read(path) for path in (tmp_path / "runs" / "digits").rglob("result.json")]
    assert sorted(result["divergence"]["name"] for result in results) == ["abkd", "js"]
    for result in results:
        assert result["method"]["confident_kd"] == {"weight": 1.0}


def test_the_data_set_that_the_readme_adds_loads(forget, tmp_path):
    forget(vkd.data.sources.SOURCES, "shapes")
    (_, code) = section("Add a data set")[-1]
    exec(code, {**vars(vkd.data.sources), "np": np, "Path": Path, "DatasetConfig": DatasetConfig})
    for split, count in (("train", 30), ("test", 9)):
        np.save(tmp_path / f"shapes_{split}.npy", np.zeros((count, 8, 8, 1), dtype=np.uint8))
    config = DatasetConfig(name="shapes", mean=[0.5], std=[0.5], val_fraction=0.2)
    data = vkd.data.load_data(config, tmp_path, device=torch.device("cpu"))
    assert data.sizes == {"train": 24, "val": 6, "test": 9}


def training_commands() -> list[str]:
    """Every `python -m vkd.train ...` of the README's shell blocks, on one line, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0] for line in lines if line.startswith("python -m vkd.train") and "--help" not in line]


@pytest.mark.parametrize("command", training_commands())
def test_every_training_command_of_the_readme_composes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_jobs(*read_command_line(shlex.split(command)[3:]))
    assert list(tmp_path.iterdir()) == []


def test_the_readmes_column_of_published_figures_is_that_of_the_files():
    with (config_directory().parent / "results" / "published" / "classification.csv").open(encoding="utf-8") as file:
        pair = ("cifar_resnet56", "cifar_resnet20")
        figures = {
            line["method"]: line["top1"]
            for line in csv.DictReader(file)
            if (line["teacher"], line["student"]) == pair and line["dataset"] == "cifar100"
        }
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.-]+)(?: \(480 epochs\))? \| `", README, flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(METHODS)
    assert {name: figure for name, figure in rows if figure != "-"} == {
        name: figure for name, figure in figures.items() if name in METHODS
    }


def test_the_readme_names_every_network_pair_and_experiment_of_the_literature():
    for path in (config_directory() / "pair").glob("*.yaml"):
        assert path.stem.startswith("digits") or f"`{path.stem}`" in README, path.stem
    for path in (config_directory() / "experiment" / "cifar100").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.stem
    for prefix, names in re.findall(r"`cifar_(\w*){([\w,]+)}`", README):
        for name in names.split(","):
            assert is_model(f"cifar_{prefix}{name}")


def test_the_readme_names_every_choice_of_method_divergence_and_recipe():
    for group in ("method", "divergence", "recipe", "tracker", "dataset"):
        for path in (config_directory() / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"{group}={path.stem} is not in the README"
