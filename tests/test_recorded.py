"""`python -m vkd.train from=RUN`: a run once more from the config that it left behind."""

import dataclasses
import functools
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import yaml
from commands import PAIR, PLAIN, TINY, only_run, read, runs_in, train, untimed, weights

import vkd.train
from vkd.composition import compose_config, compose_jobs, read_command_line
from vkd.config import Config, config_directory, parse
from vkd.errors import ConfigError
from vkd.recorded import read_recorded

WORDS = [
    *TINY,
    "divergence=abkd",
    "divergence.alpha=1e-3",
    "divergence.beta=0.7",
    "recipe.learning_rate=3e-5",
    "dataset.augmentation={flip:{},crop:{padding:2}}",
    "recipe.optimizer_options={dampening:0.1}",
    "seed=7",
    "study=theirs",
]
"""A run in which nothing is as usual: order of augmentations, tiny numbers, options that no file names."""


@functools.cache
def asked(*words):
    """The config of a run with these words; nobody may change it."""
    return parse(compose_config([*WORDS, *words]))


def record(config, path):
    """The config of a run as its directory has it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function that leaves the config of a run with these words in `theirs/`, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def leave(*words):
        return record(asked(*words), Path("theirs"))

    return leave


def only_job(*words):
    """The config of the one job of a command line."""
    ((_, config),) = compose_jobs(*read_command_line(words))
    return config


def edit(run, change):
    """Change the recorded config."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    change(content)
    (run / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


# What is repeated


@pytest.mark.parametrize("words", [("method=[kd,at]",), ("method=none",), ("method=lsd", "teacher.pretrained=true")])
def test_the_config_of_a_run_is_the_same_again_to_the_order_of_its_augmentations(recorded, words):
    expected = asked(*words)
    recorded(*words)
    found = only_job("from=theirs")
    assert found == expected
    assert list(found.dataset.augmentation) == ["flip", "crop"]


def test_a_run_that_is_there_is_not_done_again(trained, capsys):
    run = only_run(trained / PAIR)
    before = (run / "result.json").stat().st_mtime_ns
    assert vkd.train.main([f"from={run}", "tracker=none"]) == 0
    assert f"already done: {run}" in capsys.readouterr().out
    assert (run / "result.json").stat().st_mtime_ns == before


def test_elsewhere_it_gives_the_same_numbers_and_bits(place, trained):
    run = only_run(trained / PAIR)
    assert train_as_recorded(f"from={run}/config.yaml", "runs_root=runs") == 0
    again = only_run(place / "runs" / PAIR)
    assert again.name == run.name
    assert weights(again) == weights(run)
    assert untimed(again) == untimed(run)
    command = read(again / "result.json")["environment"]["command"]
    assert command == f"python -m vkd.train from={run}/config.yaml runs_root=runs"


def train_as_recorded(*words):
    """The exit code of `vkd.train` with these words alone, on as many threads as the recorded run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return vkd.train.main(list(words))
    finally:
        torch.set_num_threads(threads)


def test_a_sweep_over_a_recorded_run_repeats_what_its_words_leave_alone(place, trained):
    run = only_run(trained / PAIR)
    assert train_as_recorded("-m", f"from={run}", "runs_root=runs", "seed=1,2") == 0
    same, other = runs_in(place / "runs" / PAIR)
    assert (same.name, other.name.rpartition("-")[0]) == (run.name, "kd-fkld-s2")
    assert (weights(same), untimed(same)) == (weights(run), untimed(run))
    assert weights(other) != weights(run)


def test_a_fused_sweep_over_a_recorded_run_does_too(place, trained):
    run = only_run(trained / PAIR)
    words = ["hydra/launcher=fused", f"from={run}", "runs_root=runs", "divergence=fkld,rkld"]
    assert train_as_recorded("-m", *words) == 0
    same, other = runs_in(place / "runs" / PAIR)
    assert (weights(same), untimed(same)) == (weights(run), untimed(run))
    found, expected = (yaml.safe_load((path / "config.yaml").read_text()) for path in (other, run))
    assert found["divergence"] == {"name": "rkld", "temperature": 4.0}
    assert {**found, "divergence": None, "runs_root": None} == {**expected, "divergence": None, "runs_root": None}


def test_the_words_of_each_job_of_a_sweep_ask_for_it_by_themselves(recorded):
    recorded()
    jobs = compose_jobs(["-m"], ["from=theirs", "seed=1,2", "divergence.alpha=0.5,0.6"])
    assert [config.seed for _, config in jobs] == [1, 1, 2, 2]
    for words, config in jobs:
        assert compose_jobs([], words) == [(words, config)]


@pytest.mark.parametrize("name", ["it's {a,b}, [c=d]", "null", "2026"])
def test_any_name_of_a_folder_will_do(recorded, tmp_path, name):
    expected = asked()
    run = Path(recorded().rename(tmp_path / name))
    for path in (name, run / "config.yaml", f"../{tmp_path.name}/{name}"):
        ((words, config),) = compose_jobs([], [f"from={path}"])
        assert config == expected, path
        assert compose_jobs([], words) == [(words, config)]


def test_a_path_that_leads_upwards_is_no_file_of_hydras_even_where_it_leads_to_one_from_there(
    recorded, tmp_path, monkeypatch
):
    shutil.copytree(config_directory(), tmp_path / "conf")
    for module in ("vkd.composition", "vkd.recorded"):
        monkeypatch.setattr(f"{module}.config_directory", lambda: tmp_path / "conf")
    (recorded() / "config.yaml").rename("mine.yaml")
    below = tmp_path / "x" / "y"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert only_job("from=../../mine.yaml") == asked()


# Later words win


def test_words_win_over_the_record_wherever_they_stand(recorded):
    words = ["seed=3", "recipe.epochs=9", "tracker=offline"]
    recorded()
    assert only_job("from=theirs", *words) == only_job(*words, "from=theirs") == asked(*words)


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("divergence=rkld", {"divergence": {"name": "rkld", "temperature": 4.0}}),
        ("divergence.beta=2", {"divergence": {"name": "abkd", "temperature": 4.0, "alpha": 1e-3, "beta": 2.0}}),
        ("method.kd.weight=2", {"method": {"kd": {"weight": 2.0, "temperature_squared": True}}}),
        ("student.arch=resnet18", {"student": {"arch": "resnet18"}}),
        ("dataset.augmentation.flip=null", {"dataset": {"augmentation": {"flip": None, "crop": {"padding": 2}}}}),
    ],
)
def test_a_word_changes_what_it_names_and_nothing_else(recorded, word, changed):
    before = dataclasses.asdict(asked())
    recorded()
    after = dataclasses.asdict(only_job("from=theirs", word))
    for key, value in after.items():
        expected = changed.get(key, before[key])
        if isinstance(expected, dict) and key in ("dataset", "divergence"):
            expected = {**before[key], **expected} if key == "dataset" else expected
            value = {name: value[name] for name in expected}
        assert value == expected, key


def test_a_group_is_replaced_as_a_whole(recorded):
    quick = parse(compose_config(["recipe=quick"])).recipe
    recorded()
    config = only_job("from=theirs", "recipe=quick")
    assert config.recipe == quick
    assert config.teacher.recipe.learning_rate != 0.2
    assert config.seed == 7


def test_a_method_in_the_place_of_another_has_the_weight_of_cross_entropy_that_the_literature_has_beside_it(recorded):
    recorded()
    assert asked().cross_entropy_weight == 0.1
    assert only_job("from=theirs", "method=dkd").cross_entropy_weight == 1.0
    shutil.rmtree("theirs")
    recorded("cross_entropy_weight=0.5")
    assert only_job("from=theirs", "method=dkd").cross_entropy_weight == 0.5


def test_plain_training_can_be_given_a_method_with_a_teacher_and_not_without(recorded):
    recorded("method=none")
    with pytest.raises(ConfigError, match="has no teacher") as caught:
        only_job("from=theirs", "method=kd", "divergence=fkld")
    assert "teacher.arch=..." in str(caught.value)
    config = only_job("from=theirs", "method=kd", "divergence=fkld", "teacher.arch=cifar_resnet20")
    assert (config.teacher.arch, config.cross_entropy_weight) == ("cifar_resnet20", 0.1)
    assert config.teacher.recipe == config.recipe


# Other versions


def test_a_config_without_the_newer_keys_has_their_defaults(recorded):
    recorded()
    for key in ("deterministic", "checkpoint_minutes", "sync_batch_norm", "students_at_once", "tracker"):
        edit(Path("theirs"), lambda content, key=key: content.pop(key))
    edit(Path("theirs"), lambda content: content["dataset"].pop("train_fraction"))
    config = only_job("from=theirs")
    usual = Config()
    assert (config.deterministic, config.checkpoint_minutes) == (usual.deterministic, usual.checkpoint_minutes)
    assert (config.tracker.name, config.dataset.train_fraction) == ("offline", 1.0)
    assert config.recipe.learning_rate == 3e-5


# What is refused, in one message and before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(sede=2), r"config\.yaml: there is no key sede[\s\S]*try: seed"),
        (
            lambda content: content["recipe"].update(epoch=2),
            r"vkd: theirs/config\.yaml: there is no key recipe\.epoch[\s\S]*try: recipe\.epochs",
        ),
        (lambda content: content["recipe"].update(epochs="many"), r"recipe\.epochs = \"many\" is not what"),
        (lambda content: content["recipe"].pop("epochs"), r"recipe\.epochs has no value"),
        (lambda content: content.update(hydra={"run": {"dir": "x"}}), "there is no key hydra"),
        (lambda content: content.update(defaults=["dataset: cifar100"]), "there is no key defaults"),
        (lambda content: content["student"].update(_target_="os.system"), r"no key student\._target_"),
        (lambda content: content["method"]["kd"].update(_target_="os.system"), r"no key method\.kd\._target_"),
        (lambda content: content["divergence"].update(defaults=["/dataset: cifar100"]), r"no key divergence\.defaults"),
        (lambda content: content["method"].update(defaults={}), "defaults"),
        (lambda content: content.update(study="${oc.env:HOME}"), r"interpolation '\\\$\{oc\.env:HOME\}'"),
        (lambda content: content["method"].update({"${seed}": {}}), "interpolation"),
        (lambda content: content.pop("student"), "names no dataset and no student"),
    ],
)
def test_a_config_that_no_run_leaves_is_refused_in_one_message(recorded, change, message, capsys):
    edit(recorded(), change)
    before = sorted(Path().rglob("*"))
    assert vkd.train.main(["from=theirs"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("vkd: ") == 1
    assert "Traceback" not in error
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not plain YAML"),
        (b"\xff\xfe\x00", "is not plain YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not plain YAML"),
        (b"[" * 1500, "is not plain YAML"),
        (b"dataset: {}\nstudent: {}\nseed: 1\nseed: 2", "a key is there twice"),
        (b"dataset: {}\nstudent: {}\nrecipe: &a {epochs: 1}\nteacher: {<<: *a}", "is not plain YAML"),
        (b"", "not a mapping"),
        (b"- a", "not a mapping"),
        (b"{}", "names no dataset and no student"),
        (b"dataset: {}\nstudent: {}\nseed: 2026-01-01", "which no run leaves there"),
        (b'dataset: {}\nstudent: {}\nstudy: "\\e[31m"', r"the text '\\x1b\[31m', which no run leaves there"),
        (b"dataset: &a [*a]\nstudent: {}", "too many values"),
        (b"a: &a [1,2,3,4,5,6,7,8,9]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
         b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ndataset: [*d,*d,*d,*d,*d,*d,*d,*d]\nstudent: {}", "too many values"),
        (b"dataset: {name: digits}\nstudent: {arch: x}\n" + b"#" * 2**18, "larger than 256 KiB"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        only_job(f"from={tmp_path}")
    assert caught.value.problem.startswith(f"{tmp_path}/config.yaml ")


def test_a_number_in_base_60_takes_no_time_however_long_it_is(recorded):
    file = recorded() / "config.yaml"
    text = file.read_text()
    file.write_text(f"{text}zz: 1{':59' * 10_000}\n")
    before = time.process_time()
    assert yaml.safe_load(file.read_text())["zz"] > 60**10_000
    careless = time.process_time() - before
    file.write_text(f"{text}zz: 1{':59' * 80_000}\n")
    before = time.process_time()
    with pytest.raises(ConfigError, match=r"config\.yaml is not plain YAML: a number of too many digits"):
        read_recorded("theirs")
    assert time.process_time() - before < max(20 * careless, 1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("from=", r"from= names no run"),
        ("from=thiers", r"there is no thiers[\s\S]*try: from=theirs"),
        ("from=thiers/config.yaml", r"there is no thiers/config\.yaml[\s\S]*try: from=theirs/config\.yaml"),
        ("from=theirs/confg.yaml", r"there is no theirs/confg\.yaml[\s\S]*try: from=theirs/config\.yaml"),
        ("from=.", r"\. is no run's directory: it has no config\.yaml[\s\S]*try: from=theirs"),
        ("from=theirs from=theirs", "a command starts from one config"),
        ("-m from=theirs,others seed=1", "there is no theirs,others"),
        ("from=theirs recipe.epoch=3", r"there is no key recipe\.epoch[\s\S]*recipe\.epochs"),
        ("from=theirs divergence=rkdl", "there is no divergence 'rkdl'"),
        ("-m from=theirs recipe.epochs=1,0", r"no job was started[\s\S]*recipe\.epochs=0"),
    ],
)
def test_wrong_words_are_one_message(recorded, word, message):
    recorded()
    with pytest.raises(ConfigError, match=message):
        compose_jobs(*read_command_line(word.split()))


def test_a_file_that_may_not_be_read_is_a_message(recorded):
    file = recorded() / "config.yaml"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ConfigError, match="cannot be read"):
        only_job("from=theirs")


def test_without_from_the_recorded_choices_do_not_exist(recorded):
    recorded()
    assert only_job("from=theirs").study == "theirs"
    assert only_job().study is None
    with pytest.raises(ConfigError, match="there is no divergence 'recordd'"):
        only_job("divergence=recordd")


def test_the_teacher_of_a_study_can_be_trained_as_a_student_of_another(trained):
    teacher = only_run(trained / "teachers")
    with pytest.raises(ConfigError, match="study=teachers"):
        only_job(f"from={teacher}")
    assert only_job(f"from={teacher}", "study=mine").is_plain
    assert str(PLAIN).endswith(only_job(f"from={teacher}", "study=mine").student.arch)


def test_help_names_it(capsys):
    assert train("--help") == 0
    assert "[from=RUN]" in capsys.readouterr().out
