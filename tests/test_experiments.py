"""The literature's methods on CIFAR-100 (`conf/experiment/cifar100/`): they compose, say everything, and sweep."""

from __future__ import annotations

import re

import pytest
import yaml

import vkd.composition
from vkd.composition import compose_config, compose_jobs, group_choices
from vkd.config import Config, config_directory, parameters_of, parse
from vkd.methods import METHODS

FOLDER = config_directory() / "experiment" / "cifar100"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAIRS = [name for name in group_choices()["pair"] if not name.startswith(("digits", "imagenet"))]
# The file's name is the method's, but for these, which run it with the alpha-beta divergence.
METHOD_OF = {"none": None, "abkd": "kd", "ablsd": "lsd", "abdkd": "dkd", "abttm": "ttm"}


def method_of(name: str) -> str | None:
    return METHOD_OF.get(name, name)


@pytest.fixture(scope="module")
def experiments() -> dict[str, Config]:
    """The config of every experiment, as the look ahead of one sweep over all of them reads it."""
    read: list[Config] = []

    def reading(composed: object) -> Config:
        read.append(parse(composed))
        return read[-1]

    sweep = "+experiment=" + ",".join(f"cifar100/{name}" for name in NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vkd.composition, "parse", reading)
        assert len(compose_jobs(["-m"], [sweep, "teacher.checkpoint=resnet56.safetensors"])) == len(NAMES)
    return dict(zip(NAMES, read, strict=True))


def head(name: str) -> list[str]:
    """The comment that the file begins with."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def words_for_pairs(name: str) -> list[tuple[list[str], str]]:
    """The words that the head has ready for other pairs, line by line, with the pair."""
    found = [re.fullmatch(r"(\S+=\S+(?: \S+=\S+)*) for pair=(\S+)", line) for line in head(name)]
    return [(match[1].split(), match[2]) for match in found if match]


def value_at(config: Config, key: str) -> object:
    node = config.as_dict()
    for part in key.split("."):
        node = node[part]
    return node


def test_every_method_has_an_experiment_and_so_has_plain_training():
    assert set(NAMES) == {*METHODS, "none", "abkd", "ablsd", "abdkd", "abttm"}


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_its_method_on_cifar100_by_the_literatures_recipe(name, experiments):
    config = experiments[name]
    assert (config.study, config.dataset.name, config.dataset.val_fraction) == ("cifar100", "cifar100", 0.1)
    assert list(config.method) == [entry for entry in [method_of(name)] if entry]
    assert config.student.arch == "cifar_resnet20"
    assert (config.recipe.epochs, config.recipe.milestones, config.recipe.batch_size) == (240, [150, 180, 210], 64)
    assert config.recipe.learning_rate == 0.05
    if name == "none":
        assert config.teacher is None
    else:
        assert (config.teacher.arch, config.teacher.checkpoint) == ("cifar_resnet56", "resnet56.safetensors")
    divergence = None
    if any(METHODS[method].uses_divergence for method in config.method):
        divergence = "abkd" if name in METHOD_OF else "fkld"
    assert config.divergence.get("name") == divergence


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_spells_out_every_weight_so_that_no_default_can_change_it(name):
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(content["cross_entropy_weight"], float)
    method = method_of(name)
    if method is None:
        assert "method" not in content
        return
    assert {key: set(value) for key, value in content["method"].items()} == {method: {*parameters_of(METHODS[method])}}
    if METHODS[method].uses_divergence:
        kept = ["temperature"] if METHODS[method].uses_temperature else []
        kept += ["alpha", "beta", "match_kl_scale"] if name in METHOD_OF else []
        assert sorted(content.get("divergence", {})) == sorted(kept)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_names_the_command_and_the_way_to_a_publishable_figure(name):
    text = head(name)
    checkpoint = "" if name == "none" else " teacher.checkpoint=resnet56.safetensors"
    assert f"python -m vkd.train +experiment=cifar100/{name}{checkpoint}" in text
    assert any("dataset.val_fraction=0 gives the figure" in line for line in text)


def test_an_experiment_alone_is_one_run():
    assert len(compose_jobs([], ["+experiment=cifar100/kd", "dataset.val_fraction=0", "seed=3"])) == 1


def test_an_experiment_takes_any_pair_of_the_literature():
    assert len(PAIRS) > 10
    assert len(compose_jobs(["-m"], ["+experiment=cifar100/reviewkd", "pair=" + ",".join(PAIRS)])) == len(PAIRS)


def test_weights_that_are_published_by_pair_are_listed():
    listed = {name: len(words_for_pairs(name)) for name in NAMES if words_for_pairs(name)}
    assert listed == {"dkd": 10, "abdkd": 10, "lsd": 4, "reviewkd": 7, "ttm": 2, "abttm": 2}


@pytest.mark.parametrize("name", [name for name in NAMES if words_for_pairs(name)])
def test_the_words_for_other_pairs_are_right_ones(name, experiments):
    lines = words_for_pairs(name)
    for words, pair in lines:
        assert pair in PAIRS
        for word in words:
            key, _, value = word.partition("=")
            assert isinstance(value_at(experiments[name], key), float)
            assert float(value) > 0
    words, pair = lines[-1]
    config = parse(compose_config([f"+experiment=cifar100/{name}", f"pair={pair}", *words]))
    for word in words:
        key, _, value = word.partition("=")
        assert value_at(config, key) == float(value)
    assert config.student.arch != "cifar_resnet20"


@pytest.mark.parametrize("name", [name for name in NAMES if words_for_pairs(name)])
def test_a_pair_with_weights_of_its_own_gets_them_and_the_users_word_wins(name):
    for words, pair in words_for_pairs(name):
        chosen = [f"+experiment=cifar100/{name}", f"pair={pair}"]
        config = parse(compose_config(chosen))
        for word in words:
            key, _, value = word.partition("=")
            assert value_at(config, key) == float(value), (pair, key)
            assert value_at(parse(compose_config([*chosen, f"{key}=0.125"])), key) == 0.125


# Typed from the sources, not from the files.


@pytest.mark.parametrize(
    ("name", "cross_entropy", "method", "divergence"),
    [
        (
            "kd",
            0.1,
            {"kd": {"weight": 0.9, "temperature_squared": True}},
            {"name": "fkld", "temperature": 4},
        ),
        (
            "abkd",
            1.0,
            {"kd": {"weight": 32, "temperature_squared": False}},
            {"name": "abkd", "temperature": 4, "alpha": 0.8, "beta": 0.3, "match_kl_scale": False},
        ),
        (
            "lsd",
            0.1,
            {"lsd": {"weight": 9, "temperature_squared": True}},
            {"name": "fkld", "temperature": 2},
        ),
        (
            "ablsd",
            0.1,
            {"lsd": {"weight": 9, "temperature_squared": True}},
            {"name": "abkd", "temperature": 2, "alpha": 0.9, "beta": 0.3, "match_kl_scale": False},
        ),
        (
            "dkd",
            1.0,
            {
                "dkd": {
                    "target_weight": 1,
                    "nontarget_weight": 2,
                    "warmup_epochs": 20,
                    "temperature_squared": True,
                    "target_divergence": "fkld",
                }
            },
            {"name": "fkld", "temperature": 4},
        ),
        (
            "dist",
            1.0,
            {"dist": {"inter_weight": 2, "intra_weight": 2, "temperature": 4, "temperature_squared": True}},
            {},
        ),
        (
            "crd",
            1.0,
            {"crd": {"weight": 0.8, "embedding_size": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5}},
            {},
        ),
        (
            "reviewkd",
            1.0,
            {"reviewkd": {"weight": 0.6, "warmup_epochs": 20, "max_mid_channels": 512}},
            {},
        ),
    ],
)
def test_the_weights_are_the_published_ones(name, cross_entropy, method, divergence, experiments):
    config = experiments[name]
    assert config.cross_entropy_weight == cross_entropy
    assert config.method == method
    assert config.divergence == divergence


@pytest.mark.parametrize(
    ("name", "weight"),
    [("fitnet", 100), ("at", 1000), ("nst", 50), ("sp", 3000), ("pkt", 30000), ("rkd", 1), ("cc", 0.02), ("vid", 1)],
)
def test_the_weights_of_the_feature_methods_are_repdistillers(name, weight, experiments):
    config = experiments[name]
    assert (config.cross_entropy_weight, config.method[name]["weight"]) == (1.0, weight)
