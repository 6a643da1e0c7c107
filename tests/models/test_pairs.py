"""`conf/pair/`: teachers and students that exist, and what a pair brings beside them."""

from __future__ import annotations

import pytest
import yaml

from vkd.composition import compose_config, group_choices
from vkd.config import config_directory, parse
from vkd.models import check_arch

PAIRS = group_choices()["pair"]
SLOWER = ("cifar_mobilenetv2_half", "cifar_shufflenet_v1", "cifar_shufflenet_v2")


def networks(pair: str) -> tuple[str, str]:
    """Teacher and student in the pair's file."""
    content = yaml.safe_load((config_directory() / "pair" / f"{pair}.yaml").read_text())
    return content["teacher"]["arch"], content["student"]["arch"]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_called_like_its_networks_and_both_exist(pair):
    teacher, student = networks(pair)
    check_arch(teacher)
    check_arch(student)
    named = f"{teacher.removeprefix('cifar_')}_{student.removeprefix('cifar_')}"
    # timm's name of a network may say more than the literature's: mobilenetv1_100.
    assert named.startswith(pair.removeprefix("digits_").removeprefix("imagenet_"))
    assert teacher.startswith("cifar_") == student.startswith("cifar_") == (not pair.startswith("imagenet_"))


def test_the_pairs_of_the_literature_are_there():
    assert set(PAIRS) >= {
        "wrn_40_2_wrn_16_2",
        "wrn_40_2_wrn_40_1",
        "resnet56_resnet20",
        "resnet110_resnet20",
        "resnet110_resnet32",
        "resnet32x4_resnet8x4",
        "vgg13_vgg8",
        "vgg13_mobilenetv2_half",
        "resnet50_mobilenetv2_half",
        "resnet50_vgg8",
        "resnet32x4_shufflenet_v1",
        "resnet32x4_shufflenet_v2",
        "wrn_40_2_shufflenet_v1",
        "imagenet_resnet34_resnet18",
        "imagenet_resnet50_mobilenetv1",
    }


def test_the_pairs_that_bring_a_learning_rate_are_those_of_students_that_the_literature_trains_slower():
    files = {pair: yaml.safe_load((config_directory() / "pair" / f"{pair}.yaml").read_text()) for pair in PAIRS}
    rates = {pair: content["recipe"] for pair, content in files.items() if "recipe" in content}
    assert set(rates) == {pair for pair in PAIRS if networks(pair)[1] in SLOWER}
    assert all(recipe == {"learning_rate": 0.01} for recipe in rates.values())


@pytest.mark.parametrize(("pair", "rate"), [("vgg13_mobilenetv2_half", 0.01), ("vgg13_vgg8", 0.05)])
def test_a_pair_may_train_its_student_slower_than_the_recipe_and_its_teacher(pair, rate):
    config = parse(compose_config(["dataset=cifar100", f"pair={pair}"]))
    assert (config.recipe.learning_rate, config.teacher.recipe.learning_rate) == (rate, 0.05)
    assert config.recipe.epochs == config.teacher.recipe.epochs == 240


@pytest.mark.parametrize("order", [1, -1])
def test_a_learning_rate_on_the_command_line_wins_over_that_of_the_pair(order):
    words = ["dataset=cifar100", "pair=vgg13_mobilenetv2_half", "recipe.learning_rate=0.03"]
    config = parse(compose_config(words[::order]))
    assert (config.recipe.learning_rate, config.teacher.recipe.learning_rate) == (0.03, 0.05)
    config = parse(compose_config([*words[:2], "teacher.recipe.learning_rate=0.2"]))
    assert config.teacher.recipe.learning_rate == 0.2
