"""`conf/` and the command line: every choice composes, and the word that should win wins."""

import dataclasses

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from vkd.composition import compose_config, compose_jobs, group_choices, read_command_line
from vkd.config import Config, config_directory, parse
from vkd.errors import ConfigError
from vkd.methods import METHODS
from vkd.tracking import TRACKERS

CHOICES = [(group, name) for group, names in group_choices().items() for name in names]


def recipe(name):
    """The content of a recipe's file."""
    return yaml.safe_load((config_directory() / "recipe" / f"{name}.yaml").read_text())


def holds(found, expected):
    """Whether a recipe has every value of a file."""
    return all(getattr(found, key) == value for key, value in expected.items())


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_with_all_other_defaults_and_makes_sense(group, name):
    word = f"{'+' if group == 'experiment' else ''}{group}={name}"
    config = parse(compose_config([word]))
    if group in ("dataset", "tracker", "divergence"):
        assert getattr(config, group)["name"] if group == "divergence" else getattr(config, group).name == name
    if group == "method":
        assert list(config.method) == ([] if name == "none" else [name])
    if group == "recipe":
        assert holds(config.recipe, recipe(name))
        assert holds(config.teacher.recipe, recipe(name))


def test_the_groups_are_those_of_the_design_and_their_choices_are_what_is_registered():
    from vkd.divergences import DIVERGENCES

    groups = group_choices()
    assert set(groups) == {
        *("dataset", "divergence", "experiment", "hydra/launcher", "method", "pair", "recipe", "tracker")
    }
    assert groups["hydra/launcher"] == [
        "fused", "fused_ray", "fused_slurm", "fused_slurm_local", "ray", "slurm", "slurm_local"
    ]  # fmt: skip
    assert set(groups["divergence"]) == set(DIVERGENCES)
    assert set(groups["method"]) == {*METHODS, "none"}
    assert set(groups["tracker"]) == set(TRACKERS)


@pytest.mark.parametrize("name", group_choices()["divergence"])
def test_a_divergence_is_called_like_its_file(name):
    assert parse(compose_config([f"divergence={name}"])).divergence["name"] == name


def leaves(schema, prefix=""):
    """(path, value) of every key of the schema that holds a value, with the value of the default config."""
    for entry in dataclasses.fields(schema):
        value = getattr(schema, entry.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{entry.name}.")
        elif not isinstance(value, dict):
            yield prefix + entry.name, value


def test_every_key_of_the_schema_can_be_set_without_a_plus():
    default = parse(compose_config([]))
    words = []
    for path, value in leaves(default):
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"{path}={text.replace(' ', '')}")
    assert len(words) > 60
    assert {"seed=1", "teacher.recipe.epochs=30", "student.arch=cifar_resnet8_width4"} <= set(words)
    assert parse(compose_config(words)) == default


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("recipe.optimizer_options.nesterov=true", "recipe.optimizer_options", {"nesterov": True}),
        ("recipe.optimizer_options={nesterov:true}", "recipe.optimizer_options", {"nesterov": True}),
        ("teacher.recipe.scheduler_options.k_decay=2", "teacher.recipe.scheduler_options", {"k_decay": 2}),
        ("dataset.augmentation.crop={padding:2}", "dataset.augmentation", {"crop": {"padding": 2}}),
        ("dataset.augmentation.crop.padding=2", "dataset.augmentation", {"crop": {"padding": 2}}),
        ("divergence.temperature=2", "divergence", {"name": "fkld", "temperature": 2}),
    ],
)
def test_options_that_no_file_names_can_be_set_without_a_plus(word, path, value):
    assert OmegaConf.select(compose_config([word]), path) == value


def test_a_data_set_brings_its_pair_and_its_recipe_for_the_teacher_too():
    config = parse(compose_config(["dataset=cifar100"]))
    assert (config.teacher.arch, config.student.arch) == ("cifar_resnet56", "cifar_resnet20")
    for found in (config.recipe, config.teacher.recipe):
        assert holds(found, recipe("cifar240"))
        assert (found.epochs, found.milestones, found.drop_last) == (240, [150, 180, 210], True)
    assert config.dataset.mean == [0.5070, 0.4865, 0.4409]
    assert config.dataset.std == [0.2673, 0.2564, 0.2761]


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_command_line_says_wins_over_what_the_data_set_brings_in_any_order(order):
    words = ["dataset=cifar100", "recipe=quick", "pair=resnet20_resnet8", "recipe.epochs=7", "student.arch=resnet18"]
    config = parse(compose_config(words[::order]))
    assert holds(config.recipe, {**recipe("quick"), "epochs": 7})
    assert holds(config.teacher.recipe, recipe("quick"))
    assert (config.teacher.arch, config.student.arch) == ("cifar_resnet20", "resnet18")
    assert config.dataset.name == "cifar100"


def test_the_teacher_may_have_a_recipe_of_its_own():
    config = parse(compose_config(["dataset=cifar100", "recipe@teacher.recipe=quick"]))
    assert holds(config.recipe, recipe("cifar240"))
    assert holds(config.teacher.recipe, recipe("quick"))


@pytest.fixture
def with_experiment(monkeypatch, tmp_path):
    """A function that adds an experiment to a copy of `conf/`."""
    import shutil

    import vkd.composition

    def add(text):
        shutil.copytree(config_directory(), tmp_path / "conf")
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
        monkeypatch.setattr(vkd.composition, "config_directory", lambda: tmp_path / "conf")

    return add


def test_an_experiment_wins_over_what_the_data_set_brings_and_the_command_line_over_both(with_experiment):
    with_experiment(
        "defaults:\n  - override /dataset: cifar100\n  - override /recipe: imagenet100\n"
        "  - override /pair: resnet110_resnet32\n  - _self_\nstudy: mine\nrecipe:\n  epochs: 5\n"
    )
    config = parse(compose_config(["+experiment=mine"]))
    assert (config.dataset.name, config.study, config.teacher.arch) == ("cifar100", "mine", "cifar_resnet110")
    assert holds(config.recipe, {**recipe("imagenet100"), "epochs": 5})
    assert holds(config.teacher.recipe, recipe("imagenet100"))
    config = parse(compose_config(["+experiment=mine", "recipe=quick", "study=yours", "recipe.epochs=6"]))
    assert holds(config.recipe, {**recipe("quick"), "epochs": 6})
    assert (config.study, config.dataset.name) == ("yours", "cifar100")


def test_a_sum_of_methods_is_a_list():
    assert compose_config(["method=[kd]"]).method == compose_config(["method=kd"]).method
    assert compose_config(["method=[]"]).method == {}


# The command line


@pytest.mark.parametrize(
    ("words", "flags", "overrides"),
    [
        ("a=1 b=2", [], ["a=1", "b=2"]),
        ("-m a=1,2", ["-m"], ["a=1,2"]),
        ("a=1 -m b=2", ["-m"], ["a=1", "b=2"]),
        ("a=1 b=2 --multirun", ["--multirun"], ["a=1", "b=2"]),
        ("--cfg job a=1", ["--cfg", "job"], ["a=1"]),
        ("a=1 --cfg job", ["--cfg", "job"], ["a=1"]),
        ("a=1 --cfg=job -p recipe b=2", ["--cfg=job", "-p", "recipe"], ["a=1", "b=2"]),
        ("--info defaults a=1 a=1", ["--info", "defaults"], ["a=1", "a=1"]),
        ("", [], []),
    ],
)
def test_flags_and_words_are_told_apart_wherever_they_stand(words, flags, overrides):
    assert read_command_line(words.split()) == (flags, overrides)


@pytest.mark.parametrize("words", ["--mutlirun", "-x", "a=1 --mutlirun b=2", "--multi", "--cfg", "--cfg nothing"])
def test_an_unknown_switch_is_refused(words):
    with pytest.raises(ConfigError):
        read_command_line(words.split())


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("", 1),
        ("seed=3", 1),
        ("-m seed=3", 1),
        ("-m seed=1,2,3 divergence=fkld,rkld", 6),
        ("-m seed=range(1,5)", 4),
        ("-m divergence=abkd divergence.alpha=0,1 seed=choice(1,2)", 4),
        ("hydra.mode=MULTIRUN seed=1,2", 2),
        ("+experiment=quickstart", 18),
        ("+experiment=quickstart seed=1", 6),
        ("-m +experiment=quickstart method=kd seed=1,2", 6),
        ("--cfg job seed=1,2", None),
    ],
)
def test_the_jobs_of_a_command_are_counted_before_any_starts(words, count):
    planned = compose_jobs(*read_command_line(words.split()))
    assert (planned and len(planned)) == count
    assert not GlobalHydra.instance().is_initialized()


def test_an_impossible_job_of_an_experiment_is_named(with_experiment):
    with_experiment("hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      recipe.epochs: 1,0\n")
    with pytest.raises(ConfigError, match=r"no job was started.*recipe\.epochs=0") as caught:
        compose_jobs([], ["+experiment=mine"])
    assert "recipe.epochs = 0 is too small" in str(caught.value)


def test_the_default_config_is_valid_and_typed():
    config = parse(compose_config([]))
    assert isinstance(config, Config)
    assert (config.dataset.name, config.seed, config.tracker.name) == ("digits", 1, "offline")
    assert config.method == {"kd": {"weight": 0.9, "temperature_squared": True}}
    assert (config.divergence, config.cross_entropy_weight) == ({"name": "fkld", "temperature": 4.0}, 0.1)


def test_a_method_beside_an_experiment_that_sets_another_is_refused_unless_it_is_the_sum():
    with pytest.raises(ConfigError, match=r"the experiment sets method\.dkd") as caught:
        compose_config(["+experiment=cifar100/dkd", "method=at"])
    assert "method=[dkd,at]" in str(caught.value)
    assert set(compose_config(["+experiment=cifar100/dkd", "method=[dkd,at]"]).method) == {"dkd", "at"}
    assert set(compose_config(["+experiment=cifar100/dkd", "method=dkd"]).method) == {"dkd"}


def test_a_misspelt_experiment_of_a_folder_is_answered_with_the_nearest_of_it():
    with pytest.raises(ConfigError, match="there is no experiment 'cifar100/kdd'") as caught:
        compose_config(["+experiment=cifar100/kdd"])
    assert "+experiment=cifar100/kd " in str(caught.value)


def test_a_glob_sweeps_over_the_choices_of_a_group():
    divergences = len(group_choices()["divergence"])
    assert len(compose_jobs(["-m"], ["divergence=glob(*)"])) == divergences
    assert len(compose_jobs(["-m"], ["+experiment/cifar100=glob(ab*)"])) == 4
