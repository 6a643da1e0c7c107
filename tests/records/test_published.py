import csv
import dataclasses
import io
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from records.studies import result
from vkd.config import DatasetConfig, RecipeConfig, config_directory
from vkd.errors import UserError
from vkd.records.grouping import build_table
from vkd.records.published import (
    DEFAULT,
    BaseToNewFigure,
    ClassificationFigure,
    read_classification,
    read_published,
)
from vkd.records.reading import Run
from vkd.records.tables import grid, notes, to_csv, to_markdown
from vkd.records.terminal import to_rich

FOLDER = config_directory().parent / DEFAULT
CONF = config_directory()


@pytest.fixture(scope="module")
def figures():
    """The figures of classification that come with vkd."""
    return [figure for figure in read_published(FOLDER) if isinstance(figure, ClassificationFigure)]


def pick(figures, **values):
    return [figure for figure in figures if all(getattr(figure, name) == value for name, value in values.items())]


# Typed from the papers' tables, by network pair, independently of the files.
STORED = [
    ("cifar_wrn_40_2", "cifar_wrn_16_2", "teacher", 75.61),
    ("cifar_vgg13", "cifar_vgg8", "teacher", 74.64),
    ("cifar_resnet56", "cifar_resnet20", "student", 69.06),
    ("cifar_resnet32x4", "cifar_resnet8x4", "student", 72.50),
    ("cifar_resnet56", "cifar_resnet20", "KD", 70.66),
    ("cifar_resnet110", "cifar_resnet32", "KD", 73.08),
    ("cifar_vgg13", "cifar_vgg8", "CRD", 73.94),
    ("cifar_resnet110", "cifar_resnet20", "ITRD", 71.99),
    ("cifar_wrn_40_2", "cifar_wrn_40_1", "DIST", 74.73),
    ("cifar_resnet56", "cifar_resnet20", "DKD", 71.97),
    ("cifar_resnet110", "cifar_resnet20", "DKD", 71.06),
    ("cifar_resnet32x4", "cifar_resnet8x4", "CTKD", 73.39),
    ("cifar_resnet32x4", "cifar_resnet8x4", "LSD", 76.62),
    ("cifar_resnet110", "cifar_resnet32", "DKD+LSD", 74.29),
    ("cifar_wrn_40_2", "cifar_wrn_16_2", "TTM", 76.23),
    ("cifar_wrn_40_2", "cifar_wrn_16_2", "WTTM", 76.37),
    ("cifar_vgg13", "cifar_vgg8", "MLKD", 75.18),
    ("cifar_resnet50", "cifar_mobilenetv2_half", "KD", 67.35),
    ("cifar_resnet32x4", "cifar_shufflenet_v2", "DKD", 77.07),
    ("cifar_wrn_40_2", "cifar_shufflenet_v1", "WTTM", 75.42),
]


@pytest.mark.parametrize(("teacher", "student", "label", "top1"), STORED)
def test_a_stored_figure_is_the_published_one(figures, teacher, student, label, top1):
    (figure,) = pick(figures, dataset="cifar100", teacher=teacher, student=student, label=label)
    assert figure.top1 == top1
    assert figure.source


def test_the_sources_that_differ_on_one_cell_are_both_there(figures):
    found = pick(figures, teacher="cifar_wrn_40_2", student="cifar_wrn_16_2", label="DKD")
    assert [(figure.top1, figure.source) for figure in found] == [
        (76.23, "mdistiller README"),
        (76.24, "TTM README"),
    ]


def test_no_figure_is_made_up_for_what_nobody_published(figures):
    assert not pick(figures, teacher="cifar_resnet110", student="cifar_resnet44")
    assert not [figure for figure in figures if figure.divergence not in ("", "fkld") or figure.alpha is not None]
    assert {figure.runs for figure in figures} == {None}


def test_the_protocol_of_each_source_is_what_is_known_of_it(figures):
    for figure in pick(figures, source="RepDistiller README"):
        assert (figure.epochs, figure.epoch_reported, figure.drop_last) == (240, "last", False)
    for figure in pick(figures, source="logit-standardization-KD README"):
        assert figure.epochs == (480 if figure.label == "MLKD" else 240)
        assert (figure.epoch_reported, figure.drop_last) == ("best on test", None)
    assert {figure.epoch_reported for figure in pick(figures, source="TTM README")} == {"unknown"}
    assert {figure.epochs for figure in pick(figures, label="ITRD")} == {None}
    assert {(figure.epochs, figure.settings) for figure in pick(figures, dataset="imagenet")} == {(None, ())}


def test_published_settings_are_those_of_the_papers(figures):
    def setting(name, **values):
        return {dict(figure.settings).get(name) for figure in pick(figures, dataset="cifar100", **values)}

    assert setting("divergence.temperature", label="KD") == {4.0}
    assert setting("cross_entropy_weight", label="KD") == setting("cross_entropy_weight", label="LSD") == {0.1}
    assert setting("cross_entropy_weight", label="AT") == {1.0}
    assert setting("divergence.temperature", label="LSD", student="cifar_vgg8") == {3.0}
    assert setting("method.lsd.weight", label="LSD", teacher="cifar_resnet110") == {9.0, 12.0}
    assert setting("method.dkd.nontarget_weight", label="DKD", student="cifar_resnet8x4") == {8.0}
    assert setting("method.dkd.nontarget_weight", label="DKD", teacher="cifar_resnet56") == {2.0}


def test_the_recipe_behind_240_epochs_is_stated_and_no_other(figures):
    slower = {"cifar_mobilenetv2_half", "cifar_shufflenet_v1", "cifar_shufflenet_v2"}
    for figure in figures:
        if figure.epochs != 240 or figure.method == "teacher":
            assert figure.recipe == ()
            continue
        assert dict(figure.recipe) == {
            "recipe.batch_size": 64.0,
            "recipe.optimizer": "momentum",
            "recipe.learning_rate": 0.01 if figure.student in slower else 0.05,
            "recipe.momentum": 0.9,
            "recipe.weight_decay": 0.0005,
        }


def test_every_published_method_and_divergence_is_a_word_of_vkd(figures):
    methods = {path.stem for path in (CONF / "method").glob("*.yaml")} | {"teacher"}
    divergences = {path.stem for path in (CONF / "divergence").glob("*.yaml")}
    assert {figure.divergence for figure in figures} - {""} <= divergences
    named = {figure.method for figure in figures} - {""}
    expected = {"none", "teacher", "kd", "dkd", "lsd", "ttm", "wttm", "dist", "crd", "ctkd", "mlkd"}
    assert named == expected | {"fitnet", "at", "nst", "sp", "pkt", "rkd", "cc", "vid"}
    if missing := named - methods:
        pytest.skip(f"not in conf/method: {sorted(missing)}")


def test_a_label_stands_for_one_method_and_labels_without_a_method_have_none(figures):
    by_label = {(figure.label, figure.method, figure.divergence) for figure in figures}
    assert max(Counter(label for label, _, _ in by_label).values()) == 1
    assert {label for label, method, _ in by_label if not method} == {"ITRD", "DKD+LSD", "AB", "FT", "FSP"}
    assert {("KD", "kd", "fkld"), ("LSD", "lsd", "fkld"), ("DIST", "dist", ""), ("student", "none", "")} <= by_label


def test_every_published_setting_is_a_key_of_its_method(figures):
    names = {field.name for field in dataclasses.fields(RecipeConfig)}
    assert {name for figure in figures for name, _ in figure.recipe} <= {f"recipe.{name}" for name in names}
    for name, method in {(name, figure.method) for figure in figures for name, _ in figure.settings}:
        if name.startswith("method."):
            _, own, key = name.split(".")
            assert own == method
            path = CONF / "method" / f"{own}.yaml"
            assert not path.exists() or key in yaml.safe_load(path.read_text())
        else:
            assert name in ("cross_entropy_weight", "divergence.temperature")


def test_every_published_network_is_one_that_timm_creates(figures):
    import timm

    import vkd.models  # noqa: F401  (it registers the CIFAR networks)

    named = {name for figure in figures for name in (figure.teacher, figure.student)}
    unknown = named - set(timm.list_models())
    paired = {name for path in (CONF / "pair").glob("*.yaml") for name in re.findall(r"arch: (\S+)", path.read_text())}
    assert not unknown & paired
    assert all(name.startswith("cifar_") for name in unknown)
    if unknown:
        pytest.skip(f"not registered: {sorted(unknown)}")


def test_the_base_to_new_figures_are_read_and_are_not_those_of_classification():
    found = [figure for figure in read_published(FOLDER) if isinstance(figure, BaseToNewFigure)]
    assert len(found) == 71
    (figure,) = (figure for figure in found if (figure.dataset, figure.label) == ("DTD", "PromptSRC"))
    assert (figure.base, figure.new, figure.harmonic_mean) == (83.37, 62.97, 71.75)
    wrong = {
        (figure.dataset, figure.label)
        for figure in found
        if abs(2 / (1 / figure.base + 1 / figure.new) - figure.harmonic_mean) > 0.0051
    }
    assert wrong == {("StanfordCars", "PromptKD (= KD baseline)"), ("UCF101", "PromptKD (= KD baseline)")}
    assert not [figure for figure in read_classification(str(FOLDER)) if isinstance(figure, BaseToNewFigure)]


def test_the_readme_of_the_files_explains_every_column():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.csv"):
        assert path.name in text
        for name in path.read_text().splitlines()[0].split(","):
            assert f"`{name}`" in text or name in ("base", "new", "harmonic_mean")


def test_a_wheel_and_a_source_distribution_hold_the_files():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    wheel = text.split("[tool.hatch.build.targets.wheel.force-include]\n")[1].split("\n\n")[0]
    rules = dict(re.findall(r'"(.+)" = "(.+)"', wheel))
    # Beside each other in a wheel as in a checkout, so that one is found from the other.
    assert rules == {"conf": "vkd/conf", DEFAULT: f"vkd/{DEFAULT}"}
    assert f'"/{DEFAULT}"' in text.split("[tool.hatch.build.targets.sdist]\n")[1]


HEADER = "dataset,teacher,student,label,method,divergence,alpha,beta,settings,top1,source,epochs,epoch_reported,split"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lacks dataset, label, source, student, top1"),
        ("dataset,student,label,top1\n", "lacks source"),
        (f"{HEADER},top-1\n", "unknown column 'top-1'"),
        (f"{HEADER},epoch\n", "try: epochs"),
        (f"{HEADER},top1\n", "the column top1 more than once"),
        (f"{HEADER}\na,b,c\n", "line 2 has 3 cells"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,,here,240,last,test\n", "line 2: top1 is empty"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,70,,240,last,test\n", "source is empty"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,nan,x,240,last,test\n", "top1 = 'nan'"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,7066,x,240,last,test\n", "percent, from 0 to 100"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,70,x,0,last,test\n", "epochs = '0'"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,70,x,240,best,test\n", "last, best on test or unknown"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,,70,x,240,last,val\n", "split = 'val'"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,T 4,70,x,240,last,test\n", "key=value pairs"),
        (f"{HEADER}\na,b,c,KD,kd,abkd,0.8,,,70,x,240,last,test\n", "alpha and beta"),
        (f"{HEADER}\na,b,c,CRD,crd,,0.8,0.3,,70,x,240,last,test\n", "alpha and beta"),
        (f"{HEADER}\na,b,c,KD,kd,abkd,0.8,inf,,70,x,240,last,test\n", "a finite number"),
        (f"{HEADER}\na,b,c,ITRD,,fkld,,,,70,x,240,last,test\n", "divergence fkld without a method"),
        (f"{HEADER}\na,,c,KD,kd,fkld,,,,70,x,240,last,test\n", "teacher is empty"),
        (f"{HEADER},drop_last\na,b,c,KD,kd,fkld,,,,70,x,240,last,test,yes\n", "drop_last = 'yes'"),
        (f"{HEADER}\na,b,c,KD,kd+,fkld,,,,70,x,240,last,test\n", "method = 'kd+'"),
        (f"{HEADER}\na,b,c,KD,kd+kd,fkld,,,,70,x,240,last,test\n", "different ones with + between"),
        (f"{HEADER}\na,b,c,KD,none+kd,fkld,,,,70,x,240,last,test\n", "method = 'none+kd'"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,divergence.temprature=4,70,x,240,last,test\n", "try: divergence.temperature="),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,method.weight=4,70,x,240,last,test\n", "settings: the column takes no key"),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,cross_entropy=1,70,x,240,last,test\n", "try: cross_entropy_weight="),
        (f"{HEADER}\na,b,c,KD,kd,fkld,,,recipe.lr=1 recipe.lr=2,70,x,240,last,test\n", "each key once"),
        (f"{HEADER},recipe\na,b,c,KD,kd,fkld,,,,70,x,240,last,test,recipe.learning_rat=1\n", "recipe.learning_rate="),
        (f"{HEADER},recipe\na,b,c,KD,kd,fkld,,,,70,x,240,last,test,dataset.val=0.1\n", "dataset.val_fraction="),
        (
            f"{HEADER},recipe\na,b,c,KD,kd,fkld,,,,70,x,240,last,test,method.kd.weight=1\n",
            "line 2: recipe: the column takes no",
        ),
        (f"{HEADER},recipe\na,b,c,KD,kd,fkld,,,,70,x,240,last,test,recipe.epochs=9\n", "a column of their own"),
        (f'{HEADER}\n"a,b\n', "no CSV file in UTF-8"),
        (b"\xff\xfe\x00", "no CSV file in UTF-8"),
    ],
)
def test_a_malformed_file_is_one_message_with_its_place(content, message, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_published(path)
    assert message in str(caught.value)
    assert "mine.csv" in str(caught.value)


def test_a_file_with_the_columns_that_matter_alone_is_enough(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes("\ufeffstudent,dataset,label,method,top1,source\n\nnet,digits,alone,none,91.5,here\n".encode())
    (figure,) = read_published(path)
    assert (figure.dataset, figure.student, figure.method, figure.top1) == ("digits", "net", "none", 91.5)
    assert (figure.epochs, figure.epoch_reported, figure.drop_last, figure.settings) == (None, "unknown", None, ())


def read_one(tmp_path, **cells):
    """The figure that a file with these cells holds, the other columns filled."""
    cells = {
        "dataset": "cifar100",
        "teacher": "cifar_resnet56",
        "student": "cifar_resnet20",
        "label": "A",
        "top1": "70.0",
        "source": "x",
        "epochs": "240",
        **cells,
    }
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([cells.keys(), cells.values()])
    (figure,) = read_published(tmp_path / "mine.csv")
    return figure


def test_every_key_that_decides_training_can_be_stated_and_of_a_methods_the_form_is_enough(tmp_path):
    from vkd.config import parameters_of
    from vkd.divergences import DIVERGENCES

    recipe = [f"recipe.{field.name}" for field in dataclasses.fields(RecipeConfig) if field.name != "epochs"]
    data = [f"dataset.{field.name}" for field in dataclasses.fields(DatasetConfig)]
    options = ["recipe.optimizer_options.nesterov", "dataset.augmentation.random_crop.padding"]
    own = {name for divergence in DIVERGENCES for name in parameters_of(DIVERGENCES[divergence])} - {
        "mask",
        "reduction",
    }
    losses = ["cross_entropy_weight", "method.mine.weight", "divergence.name", *(f"divergence.{name}" for name in own)]
    words = " ".join(f"{name}=1" for name in recipe + data + options)
    figure = read_one(tmp_path, method="mine", recipe=words, settings=f"{words} {' '.join(f'{n}=1' for n in losses)}")
    assert [name for name, _ in figure.recipe] == recipe + data + options
    assert [name for name, _ in figure.settings] == recipe + data + options + losses


def test_values_are_read_as_runs_record_them(tmp_path):
    words = "recipe.milestones=[150,180] recipe.clip_grad_norm=null recipe.optimizer=sgd recipe.drop_last=true"
    figure = read_one(tmp_path, method="kd", divergence="fkld", recipe=words)
    content = result(recipe={"milestones": [150, 180], "clip_grad_norm": None, "optimizer": "sgd", "drop_last": True})
    parameters = Run("x", "done", "", content).parameters
    assert dict(figure.recipe) == {name: parameters[name] for name, _ in figure.recipe}


@pytest.mark.parametrize("words", ["kd+at+crd", "at+kd+crd", "crd + at + kd"])
def test_a_sum_of_methods_stands_beside_ours_in_any_order(words, tmp_path):
    table = make(*student("at+crd+kd"), figures=[read_one(tmp_path, method=words, divergence="fkld")])
    assert shown(table)[1] == ("70.00", "+0.50")


def test_figures_are_found_by_file_by_folder_and_by_several_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text(f"dataset,student,label,method,top1,source\nd,s,{name},none,50,x\n")
    (tmp_path / "empty").mkdir()
    assert [figure.label for figure in read_classification(".")] == ["a", "b"]
    assert [figure.label for figure in read_classification("b.csv, a.csv")] == ["b", "a"]
    assert read_classification("none") == read_classification("null") == []
    assert len(read_classification(DEFAULT)) > 250
    for words, message in (("c.csv", "there is no c.csv"), ("a.csv,", "without a name"), ("empty", "no CSV file")):
        with pytest.raises(UserError, match=message):
            read_classification(words)
    (tmp_path / DEFAULT).mkdir(parents=True)
    (tmp_path / "a.csv").rename(tmp_path / DEFAULT / "a.csv")
    assert [figure.label for figure in read_classification(DEFAULT)] == ["a"]


def student(
    method="kd", divergence="fkld", tops=(70.0, 71.0), *, epochs=240, val_fraction=0.0, source="checkpoint", **settings
):
    """Runs of resnet56 -> resnet20 on CIFAR-100 with the published protocol, or what the arguments make of it."""
    accuracy, data = settings.pop("accuracy", 72.34), settings.pop("data", {})
    temperature, learning_rate = settings.pop("temperature", 4.0), settings.pop("learning_rate", 0.05)
    defaults = {"dataset": "cifar100", "teacher": "cifar_resnet56", "student": "cifar_resnet20"}
    runs = []
    for seed, top1 in enumerate(tops, 1):
        recipe = {"epochs": epochs, "learning_rate": learning_rate}
        run = result(method, divergence, seed=seed, top1=top1, recipe=recipe, **{**defaults, **settings})
        run["dataset"] |= {"val_fraction": val_fraction, "train": 50_000, "test": 10_000, "classes": 100, **data}
        if run["teacher"]:
            run["teacher"] |= {"source": source, "accuracy": {"val": None, "test": accuracy}}
        if run["divergence"]:
            run["divergence"]["temperature"] = temperature
        different = f"{epochs} {val_fraction} {temperature} {source} {data}"
        runs.append(run | {"group": run["group"] + different, "fingerprint": run["fingerprint"] + different})
    return runs


def published(method="kd", divergence="fkld", top1=70.66, **values):
    """A figure of resnet56 -> resnet20 on CIFAR-100."""
    defaults = {
        "dataset": "cifar100",
        "teacher": "cifar_resnet56",
        "student": "cifar_resnet20",
        "label": method.upper(),
        "source": "a paper",
        "epochs": 240,
        "epoch_reported": "last",
    }
    return ClassificationFigure(**{**defaults, "method": method, "divergence": divergence, "top1": top1, **values})


TEACHER = published("teacher", "", 72.34)


def make(*contents, figures=(), metric="test/top1", rows=False):
    runs = [Run(f"study/pair/{index:03}", "done", "", content) for index, content in enumerate(contents)]
    return build_table(runs, study="s", metric=metric, command="c", published=figures, published_rows=rows)


def lines(table):
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def text(table):
    return "\n".join(notes(table))


def shown(table):
    """(figure, difference) as the table shows them for its single column, a pair for each line."""
    header, body = grid(table)
    assert header[-2:] == ["published", "to published"]
    return [tuple(line[-2:]) for line in body]


def test_ours_theirs_and_the_difference_stand_beside_each_other():
    figures = [TEACHER, published(), published("none", "", 69.06, label="student"), published("dkd", "fkld", 71.97)]
    table = make(*student("none", None, (69.0, 69.5)), *student(), *student("at", None), figures=figures)
    assert shown(table) == [("72.34", "+0.00"), ("69.06", "+0.19"), ("70.66", "-0.16"), ("", "")]
    plain, kd, at = lines(table)
    assert float(plain["difference_to_published"]) == pytest.approx(69.25 - 69.06, abs=1e-12)
    assert float(kd["difference_to_published"]) == pytest.approx(70.5 - 70.66, abs=1e-12)
    assert (kd["published_top1"], kd["published_source"], kd["not_comparable"]) == ("70.66", "a paper", "")
    names = ("published_top1", "published_source", "difference_to_published", "not_comparable", "published_also")
    assert [at[name] for name in names] == [""] * 5
    assert "published: top-1 (%) that others report (a paper)" in text(table)


@pytest.mark.parametrize(
    "other",
    [
        published(dataset="cifar10"),
        published(teacher="cifar_resnet110"),
        published(student="cifar_resnet32"),
        published("dkd"),
        published(divergence="rkld"),
        published("", "", label="ITRD"),
        published("kd", "abkd", alpha=0.8, beta=0.3),
    ],
)
def test_a_figure_of_anything_else_leaves_every_form_as_it_was_to_the_byte(other):
    trained = student(source="trained")
    contents = [*student("none", None, teacher="x"), *trained, *student("kd", "abkd", point=(0.8, 0.4))]
    bare, table = make(*contents), make(*contents, figures=[TEACHER, other])
    assert to_markdown(table) == to_markdown(bare)
    assert to_csv(table) == to_csv(bare)
    consoles = [Console(width=120, file=io.StringIO(), force_terminal=False) for _ in range(2)]
    for console, made in zip(consoles, (bare, table), strict=True):
        console.print(*to_rich(made, 120))
    assert consoles[0].file.getvalue() == consoles[1].file.getvalue()


def test_alpha_and_beta_are_part_of_what_a_figure_belongs_to():
    figures = [published("kd", "abkd", top1, alpha=alpha, beta=0.3) for alpha, top1 in ((0.8, 71.0), (0.9, 72.0))]
    table = make(*student("kd", "abkd", point=(0.9, 0.3)), figures=figures)
    assert lines(table)[0]["published_top1"] == "72.0"


LEARNT = "and published students learn from all images outside test"
RECIPE = (("recipe.learning_rate", 0.05), ("recipe.batch_size", 64.0))


@pytest.mark.parametrize(
    ("change", "stated", "reason"),
    [
        ({"epochs": 20}, {}, "recipe.epochs 20 here, 240 there"),
        ({}, {"epochs": None}, "the epochs behind the published figure are not known"),
        ({"val_fraction": 0.1}, {}, f"dataset.val_fraction 0.1 here, {LEARNT}"),
        ({"val_fraction": 0.1, "data": {"train": 45_000}}, {}, f"dataset.val_fraction 0.1 here, {LEARNT}"),
        ({"data": {"train_fraction": 0.1, "train": 5_000}}, {}, f"dataset.train_fraction 0.1 here, {LEARNT}"),
        ({"data": {"train": 5_000}}, {}, "dataset.train 5000 here, 50000 there"),
        ({"learning_rate": 0.001}, {"recipe": RECIPE}, "recipe.learning_rate 0.001 here, 0.05 there"),
        ({}, {"recipe": (("recipe.batch_size", 128.0),)}, "recipe.batch_size 64 here, 128 there"),
        ({"accuracy": 71.2}, {}, "the teacher has 71.20 here, 72.34 there"),
        ({"accuracy": 73.5}, {}, "the teacher has 73.50 here, 72.34 there"),
    ],
)
def test_a_figure_of_another_protocol_is_shown_as_not_comparable_with_the_reason(change, stated, reason):
    table = make(*student(**change), figures=[TEACHER, published(**stated)])
    assert shown(table)[1] == ("70.66§", "-")
    assert "§" not in shown(table)[0][0]
    (line,) = lines(table)
    assert (line["published_top1"], line["difference_to_published"], line["not_comparable"]) == ("70.66", "", reason)
    assert f"`§` not comparable: {reason}: every figure of cifar100: cifar_resnet56 -> cifar_resnet20." in notes(table)
    assert text(table).count(reason) == 1


@pytest.mark.parametrize(("name", "ours", "theirs"), [("test", 1_000, 10_000), ("classes", 10, 100)])
def test_on_a_fragment_of_the_test_set_neither_student_nor_teacher_compares(name, ours, theirs):
    reason = f"dataset.{name} {ours} here, {theirs} there"
    table = make(*student(val_fraction=0.1, data={name: ours}), figures=[TEACHER, published()])
    assert shown(table) == [("72.34§", "-"), ("70.66§", "-")]
    title = "cifar100: cifar_resnet56 -> cifar_resnet20"
    assert f"`§` not comparable: {reason}: every figure of {title}, the teacher of {title}." in notes(table)


def test_the_whole_of_imagenet_compares_and_a_fragment_does_not_while_other_data_sets_are_not_checked():
    def differences(dataset, **data):
        runs = student(dataset=dataset, data={"test": 50_000, "classes": 1_000, **data})
        return lines(make(*runs, figures=[published(dataset=dataset)]))[0]

    assert differences("imagenet", train=1_281_167)["difference_to_published"] != ""
    assert differences("imagenet", train=128_116)["not_comparable"] == "dataset.train 128116 here, 1281167 there"
    assert differences("digits", train=7)["difference_to_published"] != ""


def test_a_recipe_that_agrees_or_that_either_side_does_not_say_compares_and_the_notes_say_what_was_compared():
    table = make(*student(), figures=[published(recipe=RECIPE)])
    assert shown(table)[1] == ("70.66", "-0.16")
    assert "the recipes recipe.epochs, recipe.learning_rate and recipe.batch_size; nothing else of them." in text(table)
    table = make(*student(), figures=[published(recipe=(("recipe.ema_decay", 0.9),))])
    assert shown(table)[1] == ("70.66", "-0.16")
    assert "runs here do not record and that are not compared: recipe.ema_decay." in text(table)
    table = make(*student(), figures=[published()])
    assert "of the recipes recipe.epochs; nothing else of them." in text(table)
    assert "Of the recipes behind the published KD the epochs alone are known." in notes(table)


def test_a_teacher_that_vkd_trained_is_another_network_but_its_student_is_judged_by_its_accuracy():
    table = make(*student(source="trained"), figures=[TEACHER, published()])
    assert shown(table) == [("72.34§", "-"), ("70.66", "-0.16")]
    assert (
        "`§` not comparable: the teacher here is one that vkd trained, another network than the published one: "
        "the teacher of cifar100: cifar_resnet56 -> cifar_resnet20." in notes(table)
    )
    assert lines(table)[0]["not_comparable"] == ""
    weak = make(*student(source="trained", accuracy=70.0), figures=[TEACHER, published()])
    assert lines(weak)[0]["not_comparable"] == "the teacher has 70.00 here, 72.34 there"


@pytest.mark.parametrize(
    ("stage", "relu", "top1"), [(None, True, "69.21"), (1, True, ""), (None, False, ""), (3, True, "")]
)
def test_fitnet_stands_beside_the_published_one_after_its_stage_and_with_its_regressor_alone(
    figures, stage, relu, top1
):
    runs, others = student("fitnet", None), student()
    for run in runs:
        run["method"] = {"fitnet": {"weight": 100.0, "stage": stage, "relu": relu}}
        run["cross_entropy_weight"] = 1.0
    for run in others:
        run["method"]["kd"]["temperature_squared"] = True
    table = make(*others, *runs, figures=figures)
    assert [line["published_top1"] for line in lines(table)] == ["70.66", top1]
    if stage:
        assert "FitNet is published with method.fitnet.stage not set." in text(table)


def test_a_teacher_within_a_point_compares_and_so_does_one_whose_published_accuracy_is_not_known():
    near = make(*student(accuracy=71.4), figures=[TEACHER, published()])
    assert shown(near) == [("72.34", "-0.94"), ("70.66", "-0.16")]
    assert "not known: cifar100" not in text(near)
    table = make(*student(accuracy=50.0), figures=[published()])
    assert shown(table)[1] == ("70.66", "-0.16")
    assert "The accuracy of the published teacher is not known: cifar100: cifar_resnet56 -> cifar_resnet20." in notes(
        table
    )


def test_the_plain_student_asks_for_no_teacher_and_stands_in_every_column():
    figures = [published("none", "", 69.06, label="student", teacher=teacher) for teacher in ("cifar_resnet56", "y")]
    table = make(*student("none", None, (69.0, 69.5)), *student(source="trained"), figures=figures)
    assert shown(table)[1] == ("69.06", "+0.19")
    alone = make(*student("none", None, (69.0, 69.5)), figures=figures)
    assert shown(alone) == [("69.06", "+0.19")]


def test_reasons_that_hold_for_some_rows_name_them():
    table = make(*student(epochs=20), *student("dkd"), figures=[published(), published("dkd", "fkld", 71.0)])
    assert "there: kd fkld (cifar100: cifar_resnet56 -> cifar_resnet20)." in text(table)
    several = make(*student(epochs=20, val_fraction=0.1), figures=[published()])
    assert lines(several)[0]["not_comparable"].count(";") == 1


def test_a_row_with_other_settings_than_the_published_ones_has_no_figure_and_a_note_says_which():
    figures = [published(settings=(("divergence.temperature", 4.0), ("method.kd.weight", 0.9)))]
    table = make(*student(temperature=1.0), *student(temperature=4.0), figures=figures)
    assert [line["published_top1"] for line in lines(table)] == ["", "70.66"]
    assert (
        "No published figure beside kd fkld [divergence.temperature=1] (cifar100: cifar_resnet56 -> cifar_resnet20): "
        "KD is published with divergence.temperature 4." in notes(table)
    )
    words = "rows and published figures were compared: KD: divergence.temperature, method.kd.weight."
    assert f"Settings in which {words}" in notes(table)


def test_settings_that_nobody_states_are_not_compared_and_the_note_says_so():
    table = make(*student(temperature=1.0), *student(temperature=4.0), figures=[published()])
    assert [line["published_top1"] for line in lines(table)] == ["70.66", "70.66"]
    assert "The settings behind the published KD are not known and not compared." in notes(table)
    table = make(*student(), figures=[published(settings=(("method.kd.wieght", 0.9),))])
    assert "that runs here do not record and that are not compared: method.kd.wieght." in text(table)
    assert "were compared:" not in text(table)
    assert "are not known and not compared" not in text(table)


def test_settings_of_switches_compare_with_a_runs(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "dataset,teacher,student,label,method,divergence,settings,top1,source\n"
        "cifar100,cifar_resnet56,cifar_resnet20,KD,kd,fkld,method.kd.squared=true method.kd.weight=9e-1,70.0,x\n"
    )
    runs = student()
    for run in runs:
        run["method"]["kd"]["squared"] = True
    assert lines(make(*runs, figures=read_published(path)))[0]["published_top1"] == "70.0"
    for run in runs:
        run["method"]["kd"]["squared"] = False
    assert "published_top1" not in lines(make(*runs, figures=read_published(path)))[0]


def test_sources_that_differ_are_both_shown_with_their_differences():
    figures = [published(), published(top1=70.9, source="a README"), published(source="a thesis")]
    table = make(*student(), figures=figures)
    assert shown(table)[1] == ("70.66 / 70.90", "-0.16 / -0.40")
    assert (
        "Sources differ on kd fkld (cifar100: cifar_resnet56 -> cifar_resnet20): "
        "70.66 (a paper, a thesis), 70.90 (a README)." in notes(table)
    )
    (line,) = lines(table)
    assert (line["published_top1"], line["published_source"]) == ("70.66", "a paper; a thesis")
    assert float(line["difference_to_published"]) == pytest.approx(-0.16, abs=1e-12)
    assert line["published_also"] == "70.9 (a README)"
    other = make(*student(), figures=[published(), published(top1=72.0, epochs=480)])
    assert shown(other)[1] == ("70.66 / 72.00§", "-0.16 / -")


def test_what_the_figures_are_of_is_said_once():
    figures = [
        published(epoch_reported="best on test", source="a README"),
        published("dkd", "fkld", 71.0, epoch_reported="unknown", drop_last=True),
        published("at", "", 72.0),
    ]
    table = make(*student(), *student("dkd"), *student("at", None), figures=figures)
    assert shown(table)[1:] == [("70.66", "-0.16"), ("72.00", "-1.50"), ("71.00", "-0.50")]
    assert "The published KD (a README) are of the best epoch on test, those here of the last epoch, " in text(table)
    assert "The published DKD (a paper) are of an epoch that is not known, best or last." in notes(table)
    assert "drop_last" not in text(table)
    runs = student("dkd")
    for run in runs:
        run["recipe"]["drop_last"] = False
    words = "recipe.drop_last is false here and true behind the published DKD (a paper)."
    assert words in notes(make(*runs, figures=figures))
    for known in (False, None):
        figure = published("dkd", "fkld", 71.0, drop_last=known)
        assert "drop_last" not in text(make(*runs, figures=[figure]))


def test_a_label_whose_source_reports_two_kinds_of_epoch_is_named_with_its_data_set():
    figures = [
        published(epoch_reported="best on test"),
        published(epoch_reported="unknown", dataset="digits"),
        published("dkd", "fkld", 71.0, epoch_reported="unknown"),
    ]
    table = make(*student(), *student("dkd"), *student(dataset="digits"), figures=figures)
    assert "The published KD (a paper on cifar100) are of the best epoch on test" in text(table)
    assert "The published DKD (a paper), KD (a paper on digits) are of an epoch that is not known" in text(table)


@pytest.mark.parametrize("metric", ["val/top1", "test/top1_max_over_epochs", "test/ece"])
def test_other_metrics_than_test_top1_have_no_published_columns(metric):
    runs = student()
    for run in runs:
        run["metrics"]["val/top1"] = 70.0
    bare, table = make(*runs, metric=metric), make(*runs, metric=metric, figures=[TEACHER, published()], rows=True)
    assert to_markdown(table) == to_markdown(bare)
    assert to_csv(table) == to_csv(bare)


def test_a_hole_has_the_figure_and_no_difference():
    (run,) = student(tops=(None,))
    assert shown(make(run, figures=[published()]))[1] == ("70.66", "-")


def test_columns_without_figures_keep_their_three_texts():
    table = make(*student(), *student(dataset="digits"), figures=[published()])
    header, body = grid(table)
    assert header[4:] == [
        "cifar100: cifar_resnet56 -> cifar_resnet20",
        "to plain",
        "to KD",
        "published",
        "to published",
        "digits: cifar_resnet56 -> cifar_resnet20",
        "to plain",
        "to KD",
    ]
    assert {len(line) for line in body} == {len(header)}
    assert [line["published_top1"] for line in lines(table)] == ["70.66", ""]


def test_methods_without_runs_are_rows_where_that_is_asked_for():
    figures = [
        TEACHER,
        published(),
        published("", "", 71.47, label="ITRD", epochs=None),
        published("mlkd", "fkld", 72.19, epochs=480),
        published("", "", 40.0, label="SHORT", epochs=1),
        published("", "", 60.0, label="elsewhere", dataset="digits"),
    ]
    assert "ITRD" not in to_markdown(make(*student(), figures=figures))
    table = make(*student(), figures=figures, rows=True)
    assert [(line[0], *line[4:]) for line in grid(table)[1][2:]] == [
        ("ITRD (published)", "", "", "", "71.47", ""),
        ("MLKD (published)", "", "", "", "72.19", ""),
        ("SHORT (published)", "", "", "", "40.00", ""),
    ]
    assert "(epochs not known: ITRD; 480 epochs: MLKD; 1 epoch: SHORT)" in text(table)
    assert len(lines(table)) == 1
    assert "Holes" not in to_markdown(table)


def test_the_same_runs_in_another_order_give_the_same_bytes_beside_published_figures(figures):
    contents = [*student("none", None), *student(), *student("dkd"), *student("kd", "rkld"), *student("at", None)]
    tables = [make(*order, figures=figures, rows=True) for order in (contents, contents[::-1])]
    assert to_markdown(tables[0]) == to_markdown(tables[1])
    assert to_csv(tables[0]) == to_csv(tables[1])


def test_every_line_of_a_table_with_published_figures_is_aligned():
    figures = [published(source="a|b<script>", top1=5.0)]
    found = to_markdown(make(*student(), *student("dkd"), figures=figures))
    table = [line for line in found.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "a\\|b&lt;script>" in found


@pytest.mark.parametrize("width", [80, 120, 160])
def test_a_terminal_shows_every_published_figure_whole(width):
    figures = [TEACHER, published(), published("", "", 71.47, label="ITRD")]
    contents = [*student(), *student("dkd"), *student(dataset="digits")]
    console = Console(width=width, file=io.StringIO())
    for part in to_rich(make(*contents, figures=figures, rows=True), width):
        console.print(part)
    found = console.file.getvalue()
    assert max(map(len, found.splitlines())) <= width
    for figure in ("72.34", "70.66", "-0.16", "71.47"):
        assert figure in found


def test_a_narrow_terminal_shows_what_others_report_in_a_table_of_its_own():
    figures = [TEACHER, published(), published("", "", 71.47, label="ITRD")]
    table = make(*student(), *student("dkd"), figures=figures, rows=True)
    assert len(to_rich(table, 200)) == 1
    ours, theirs = to_rich(table, 70)
    names = [[str(column.header) for column in part.columns][4:] for part in (ours, theirs)]
    title = "cifar100: cifar_resnet56 -> cifar_resnet20"
    assert names == [[title, "to plain", "to KD"], [title, "published", "to published"]]
    assert [part.row_count for part in (ours, theirs)] == [3, 4]
    assert len(to_rich(make(*student()), 70)) == 1
