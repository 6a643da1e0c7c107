"""Wrong input of every kind: one message that says what to type instead, no traceback, nothing half-written."""

import os
import pickle
import socket
import tempfile

import numpy as np
import pytest
import torch
from commands import TINY, snapshot, start, train
from PIL import Image

import vkd.collect
import vkd.evaluate
from vkd.models import create_model, save_weights

ARCH = "cifar_resnet8_width4"


class Trap:
    """Something that makes a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def write_packed(folder, *, classes=3, labels=None):
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(
            folder / f"{split}.npz",
            images=np.zeros((12, 8, 8, 1), dtype=np.uint8),
            labels=np.arange(12) % classes if labels is None else labels,
            class_names=np.array([f"class {index}" for index in range(classes)]),
        )


def write_images(root, *, empty):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            if not empty or name == "ant":
                Image.new("RGB", (9, 9)).save(root / split / name / "1.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory of damaged, foreign and hostile files."""
    root = tmp_path_factory.mktemp("workplace")
    for name, arch, classes in (
        ("random", ARCH, 10),
        ("seven", ARCH, 7),
        ("thousand", ARCH, 1000),
        ("other", "cifar_resnet8", 10),
    ):
        model = create_model(arch, num_classes=classes, in_channels=1, image_size=(8, 8), seed=0)
        save_weights(model, root / f"{name}.safetensors", {})
        torch.save(model.state_dict(), root / f"{name}.pth")
    for name in ("random.safetensors", "random.pth"):
        (root / name.replace("random", "torn")).write_bytes((root / name).read_bytes()[:5000])
    torch.save({"state_dict": Trap()}, root / "trap.pth")
    (root / "trap.pkl").write_bytes(pickle.dumps(Trap()))
    write_packed(root / "data" / "whole")
    write_packed(root / "data" / "torn")
    whole = (root / "data" / "torn" / "train.npz").read_bytes()
    (root / "data" / "torn" / "train.npz").write_bytes(whole[: len(whole) // 2])
    write_packed(root / "data" / "labels", labels=np.arange(12) % 4)
    write_images(root / "hollow", empty=True)
    (root / "file").write_text("in the way")
    (root / "empty run").mkdir()
    return root


@pytest.fixture
def refused(workplace, monkeypatch, capsys):
    """A function that runs a command, sees that it refuses without leaving a trace, and returns what it said."""
    monkeypatch.chdir(workplace)

    def run(command, *words):
        before = snapshot(workplace)
        code = command(*words)
        said = capsys.readouterr()
        assert code in (1, 2)
        assert "Traceback" not in said.out + said.err
        assert snapshot(workplace) == before
        return said.err

    return run


def evaluate(*words):
    return vkd.evaluate.main(list(words))


def collect(*words):
    return vkd.collect.main(list(words))


MINE = ("dataset.mean=[0.5]", "dataset.std=[0.5]")

WORDS = {
    # Groups and their choices.
    "misspelt group": ("datset=digits", "there is no key datset", "try: dataset=..."),
    "data set": ("dataset=digit", "there is no dataset 'digit'", "cifar100", "try: dataset=digits"),
    "divergence": ("divergence=fkl", "there is no divergence 'fkl'", "try: divergence=fkld"),
    "method": ("method=kdd", "there is no method 'kdd'", "expected: at, cc, ", "try: method=kd"),
    "plain training and a method": ("method=[none,kd]", "adds plain training to a method", "method=none alone"),
    "recipe": ("recipe=quik", "there is no recipe 'quik'", "try: recipe=quick"),
    "recipe of the teacher": ("recipe@teacher.recipe=quik", "there is no recipe", "try: recipe@teacher.recipe=quick"),
    "place of a recipe": ("recipe@teacher.recip=quick", "recipe@teacher.recip", "try: recipe@teacher.recipe=..."),
    "tracker": ("tracker=wanb", "there is no tracker 'wanb'", "try: tracker=wandb"),
    "pair": ("pair=resnet56_resnet2", "there is no pair", "try: pair=resnet56_resnet20"),
    "experiment": ("+experiment=quickstar", "there is no experiment 'quickstar'", "try: +experiment=quickstart"),
    "experiment without a plus": ("experiment=quickstart", "experiment", "plus", "try: +experiment=..."),
    "launcher": ("hydra/launcher=basik", "there is no hydra/launcher 'basik'", "try: hydra/launcher=basic"),
    "group set to null": ("method=null", "method=null names no choice", "expected: at, cc, ", "method=none"),
    "group left out": ("~recipe", "~recipe names no choice", "quick"),
    # Keys.
    "key of the recipe": ("recipe.epoch=1", "there is no key recipe.epoch", "try: recipe.epochs=..."),
    "first part of a key": ("recip.epochs=1", "there is no key recip.epochs", "try: recipe.epochs=..."),
    "key of the divergence": ("divergence=abkd divergence.alfa=1", "divergence.alfa", "try: divergence.alpha=..."),
    "key of an unused divergence": ("method=none divergence.alfa=1", "divergence.alfa", "divergence.alpha=..."),
    "key of the method": ("method.kd.wieght=1", "there is no key method.kd.wieght", "try: method.kd.weight=..."),
    "key of a method not chosen": ("method=none method.kd.weight=1", "method.kd.weight", "try: method=kd"),
    "key of the data set": ("dataset.men=[1]", "there is no key dataset.men", "try: dataset.mean=..."),
    "added key": ("+sed=1", "there is no key sed", "expected: ", "try: seed"),
    "added key of the method": ("+method.kd.weigth=1", "there is no key method.kd.weigth", "try: method.kd.weight"),
    "augmentation": ("dataset.augmentation.flp={}", "there is no augmentation 'flp'", "try: flip"),
    "alpha of forward KL": ("divergence.alpha=1", "divergence=fkld takes no alpha", "try: divergence=abkd"),
    "skew of alpha-beta": ("divergence=abkd divergence.skew=1", "takes no skew", "try: divergence=skew_fkld"),
    # Values.
    "alpha of letters": ("divergence=abkd divergence.alpha=x", "divergence.alpha", "expected: a number"),
    "alpha nan": ("divergence=abkd divergence.alpha=nan", "divergence.alpha = nan", "finite"),
    "beta inf": ("divergence=abkd divergence.beta=inf", "divergence.beta = inf", "finite"),
    "no epochs": ("recipe.epochs=0", "recipe.epochs = 0", "expected: a whole number from 1"),
    "negative epochs": ("recipe.epochs=-1", "recipe.epochs = -1", "expected: a whole number from 1"),
    "half an epoch": ("recipe.epochs=2.5", "recipe.epochs = 2.5", "expected: a whole number"),
    "epochs of letters": ("recipe.epochs=ten", "recipe.epochs = ten", "expected: a whole number"),
    "epochs of nothing": ("recipe.epochs=", "recipe.epochs", "expected: a whole number"),
    "teacher's epochs": ("teacher.recipe.epochs=0", "teacher.recipe.epochs = 0", "expected: a whole number from 1"),
    "one image a batch": ("recipe.batch_size=1", "recipe.batch_size = 1", "expected: 2 or more"),
    "learning rate inf": ("recipe.learning_rate=inf", "recipe.learning_rate = inf", "finite"),
    "precision": ("precision=fp8", "precision=fp8", "bf16, fp16, fp32", "try: precision=fp"),
    "seed": ("seed=x", "seed = x", "expected: a whole number"),
    "negative seed": ("seed=-1", "seed = -1", "expected: a whole number from 0"),
    "temperature": ("divergence.temperature=0", "divergence.temperature = 0", "expected: a number above 0"),
    "optimizer": ("recipe.optimizer=sgdd", "recipe.optimizer=sgdd", "try: recipe.optimizer=sgd"),
    "scheduler": ("recipe.scheduler=cosin", "recipe.scheduler=cosin", "try: recipe.scheduler=cosine"),
    "network without a prefix": ("student.arch=resnet20", "no network 'resnet20'", "try: cifar_resnet20"),
    "misspelt network": ("teacher.arch=cifar_resnet21", "no network 'cifar_resnet21'", "cifar_resnet20"),
    "network where arch is meant": ("student=cifar_resnet8", "student = cifar", "try: student.arch=cifar_resnet8"),
    "number for a list": ("dataset.mean=0.1", "dataset.mean = 0.1", "expected: a list of numbers"),
    "study that climbs": ("study=../x", "study", "../x", "cannot name a folder", "expected: letters"),
    "no runs root": ("runs_root=", "runs_root is empty", "try: runs_root=runs"),
    "interpolation": ("study=${nothing}", "study", "nothing", "not found"),
    # Combinations.
    "plateau without val": (
        "recipe.scheduler=plateau dataset.val_fraction=0",
        "recipe.scheduler=plateau",
        "dataset.val_fraction=0",
        "try: recipe.scheduler=cosine",
    ),
    "two sets of weights": (
        "teacher.pretrained=true teacher.checkpoint=random.pth",
        "teacher.pretrained=true and teacher.checkpoint",
        "expected: one of them",
    ),
    "mean without std": ("teacher.mean=[0.5]", "teacher.mean and teacher.std", "expected: both or neither"),
    # The command line itself.
    "sweep without -m": ("seed=1,2", "seed=1,2", "several values", "-m seed=1,2"),
    "list without brackets": ("recipe.milestones=1,2", "recipe.milestones=1,2", "'recipe.milestones=[1,2]'"),
    "open bracket": ("recipe.milestones=[1,2", "'recipe.milestones=[1,2' cannot be read", "bracket"),
    "word without a value": ("seed", "'seed'", "key=value"),
    "word without a key": ("=1", "'=1' has no key", "key=value"),
    "switch": ("--mutlirun", "there is no switch --mutlirun", "try: --multirun"),
    "switch among words": ("--mutlirun seed=1,2", "there is no switch --mutlirun", "try: --multirun"),
    "value of a switch": ("--cfg jib", "--cfg", "'jib'", "job"),
    "config of another name": ("--config-name foo", "there is no config 'foo'"),
}

CONTENT = {
    # What only the machine, the data or a file can tell.
    "device": ("device=cuda:9", "device=cuda:9", "expected: auto, cpu", "try: device=auto"),
    "kind of device": ("device=gpu", "device=gpu", "expected: auto, cpu", "try: device=auto"),
    "batch beyond the data": (
        "recipe.batch_size=5000 recipe.drop_last=true",
        "recipe.batch_size=5000",
        "1038",
        "try: recipe.batch_size=1038",
    ),
    "teacher's batch beyond the data": (
        "teacher.recipe.batch_size=5000 teacher.recipe.drop_last=true",
        "recipe.batch_size=5000",
        "1038",
    ),
    "option of the optimizer": ("recipe.optimizer_options.foo=1", "recipe.optimizer=momentum", "'foo'"),
    "options of the optimizer": ("recipe.optimizer_options={foo:1}", "recipe.optimizer=momentum", "'foo'"),
    "option of the scheduler": ("recipe.scheduler_options.foo=1", "recipe.scheduler=cosine", "'foo'"),
    "too many means": ("dataset.mean=[0.1,0.2]", "dataset.mean has 2 values", "1 channel", "try: dataset.mean=[0.5]"),
    "teacher's means": (
        "teacher.checkpoint=missing.pth teacher.mean=[1,2] teacher.std=[1,2]",
        "teacher.mean has 2 values",
        "1 channel",
    ),
    "val_fraction": ("dataset.val_fraction=1.5", "dataset.val_fraction=1.5", "try: dataset.val_fraction=0.1"),
    "pretrained without weights": ("teacher.pretrained=true", "no published", ARCH, "teacher.checkpoint="),
    "no such checkpoint": ("teacher.checkpoint=missing.pth", "no checkpoint 'missing.pth'", "train the network first"),
    "checkpoint of 7 classes": ("teacher.checkpoint=seven.safetensors", "7 classes, 10 were asked for", "seven."),
    "checkpoint of 1000 classes": ("teacher.checkpoint=thousand.pth", "1000 classes, 10 were asked", "thousand.pth"),
    "checkpoint of another network": (
        "teacher.checkpoint=other.safetensors",
        "does not fit",
        "try: arch=cifar_resnet8",
    ),
    "torn safetensors": ("teacher.checkpoint=torn.safetensors", "'torn.safetensors' is damaged", "again"),
    "torn torch file": ("teacher.checkpoint=torn.pth", "'torn.pth' is damaged", "again"),
    "trap in a torch file": ("teacher.checkpoint=trap.pth", "'trap.pth'", "mkdir", "refused"),
    "trap in a pickle": ("teacher.checkpoint=trap.pkl", "'trap.pkl'", "damaged or no checkpoint"),
    "checkpoint that is a directory": ("teacher.checkpoint=data", "'data' is a directory", "path of a"),
    "teacher at chance": (
        "teacher.checkpoint=random.pth teacher.allow_chance_accuracy=false",
        "near chance",
        "dataset.mean",
        "try: teacher.allow_chance_accuracy=true",
    ),
    "data set that nobody has": ("dataset.name=digitz", "no data set 'digitz'", "try: dataset.name=digits"),
    "torn packed file": ("dataset.name=torn", "data/torn/train.npz is damaged", "try: make it again"),
    "labels outside the classes": ("dataset.name=labels", "data/labels/train.npz has label 3", "expected: 0 to 2"),
    "no image folder": ("dataset=imagefolder", "dataset.root is null", "try: dataset.root="),
    "wrong image folder": ("dataset=imagefolder dataset.root=nowhere", "dataset.root=nowhere does not exist"),
    "class without images": ("dataset=imagefolder dataset.root=hollow", "hollow/train/bee has no images", ".png"),
    "runs root that is a file": ("runs_root=file", "file/", "cannot be written", "try: runs_root="),
    "runs root that cannot be": ("runs_root=/proc/nothing", "/proc/nothing", "cannot be written", "try: runs_root="),
}

SWEEPS = {
    "alpha for forward KL": (
        "divergence=fkld,abkd divergence.alpha=0.5,1",
        "no job was started",
        "divergence=fkld takes no alpha",
        "try: divergence=abkd divergence.alpha=...",
    ),
    "one network of two": ("student.arch=cifar_resnet8,typo", "no job was started", "there is no network 'typo'"),
    "one choice of two": ("dataset=digits,digit", "no job was started", "no dataset 'digit'", "try: dataset=digits"),
    "one value of two": ("recipe.epochs=1,0", "no job was started", "recipe.epochs=0", "a whole number from 1"),
    "misspelt key": ("sed=1,2", "there is no key sed", "try: seed"),
    "runs root that is a file": ("seed=1,2 runs_root=file", "file/", "cannot be written", "try: runs_root="),
    "range of numbers": ("seed=interval(1,3)", "sweep type", "INTERVAL"),
}


@pytest.mark.parametrize("case", WORDS)
def test_wrong_words_are_answered_with_the_right_ones(refused, case):
    words, *fragments = WORDS[case]
    said = refused(train, *words.split())
    for fragment in fragments:
        assert fragment in said
    for jargon in ("full_key", "object_type", "struct", "Ambiguous", "defaults list", "usage:"):
        assert jargon not in said


@pytest.mark.parametrize("case", CONTENT)
def test_wrong_content_is_found_before_anything_is_trained_or_written(refused, case):
    words, *fragments = CONTENT[case]
    mean = MINE if "dataset.name=" in words else ()
    said = refused(train, *words.split(), *mean)
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_with_an_impossible_job_does_not_start(refused, case):
    words, *fragments = SWEEPS[case]
    said = refused(train, "-m", *words.split())
    for fragment in fragments:
        assert fragment in said


def test_without_a_network_a_download_is_refused_with_other_ways_to_the_data(refused, monkeypatch, tmp_path):
    def unreachable(*_args, **_kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the lock of downloads lies
    said = refused(train, "dataset=cifar100", "data_root=elsewhere")
    for fragment in ("'cifar100'", "elsewhere", "could not be reached", "cifar100/train.npz", "dataset=digits"):
        assert fragment in said


def test_a_teacher_at_chance_gets_past_when_that_is_wanted(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = ["teacher.checkpoint=random.pth", f"runs_root={tmp_path}", "teacher.allow_chance_accuracy=true"]
    assert train(*words) == 0
    assert "it may have been trained on the images of val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("", ["name what to measure", "run=DIRECTORY or arch=NAME"]),
        ("run=x arch=y", ["name what to measure", "either"]),
        ("arhc=cifar_resnet8", ["there is no key arhc", "try: arch=..."]),
        ("--run=x", ["there is no key --run", "run="]),
        ("arch", ["'arch' is not a key=value word", "--help"]),
        ("arch=cifar_resnet8", ["needs weights", "checkpoint=FILE or pretrained=true"]),
        ("arch=cifar_resnet8 checkpoint=a pretrained=true", ["needs weights"]),
        ("arch=resnet20 checkpoint=a", ["no network 'resnet20'", "cifar_resnet20"]),
        ("arch=cifar_resnet8 checkpoint=missing.pth", ["no checkpoint 'missing.pth'"]),
        (f"arch={ARCH} checkpoint=seven.pth dataset=digits", ["7 classes, 10 were asked for"]),
        (f"arch={ARCH} checkpoint=random.pth dataset=digit", ["no dataset 'digit'", "try: dataset=digits"]),
        (f"arch={ARCH} checkpoint=random.pth dataset.men=[1]", ["no key dataset.men", "dataset.mean"]),
        (f"arch={ARCH} checkpoint=random.pth split=tset", ["split=tset", "expected: test, val"]),
        (f"arch={ARCH} checkpoint=random.pth device=cuda:9", ["device=cuda:9", "device=auto"]),
        (f"arch={ARCH} checkpoint=random.pth pretrained=perhaps", ["pretrained", "true or false"]),
        (f"arch={ARCH} checkpoint=random.pth output=nowhere/figures.json", ["nowhere"]),
        ("run=nowhere", ["nowhere/config.yaml cannot be read", "the directory of a run"]),
        ("run=file", ["file/config.yaml cannot be read", "the directory of a run"]),
        ("run=nowhere checkpoint=random.pth", ["run= brings its own weights"]),
    ],
)
def test_wrong_words_of_evaluate_are_answered_with_the_right_ones(refused, words, fragments):
    said = refused(evaluate, *words.split())
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("content", ["seed: 1\n", "- 1\n", "a: [", "dataset: {name: digits}\nstudent: {arhc: x}\n"])
def test_a_damaged_config_of_a_run_is_a_message(workplace, tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "study" / "pair" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(content)
    before = snapshot(tmp_path)
    assert evaluate(f"run={run}") == 2
    said = capsys.readouterr().err
    assert said.startswith("vkd: ")
    assert "Traceback" not in said
    assert snapshot(tmp_path) == before


def test_a_misspelt_key_of_collect_is_answered_with_the_right_one(refused):
    said = refused(collect, "stduy=quickstart")
    assert "vkd.collect has no key 'stduy'" in said
    assert "try: study=quickstart" in said


def test_wrong_input_of_a_real_command_ends_it_with_a_message(workplace):
    commands = {
        "there is no key datset": ("vkd.train", ["datset=digits"]),
        "there is no checkpoint 'missing.pth'": ("vkd.train", [*TINY, "teacher.checkpoint=missing.pth"]),
        "vkd.collect has no key 'stduy'": ("vkd.collect", ["stduy=quickstart"]),
    }
    before = snapshot(workplace)
    processes = {said: start(module, *words, cwd=workplace) for said, (module, words) in commands.items()}
    for said, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode in (1, 2)
        assert said in err.splitlines()[0]
        assert "Traceback" not in out + err
    assert snapshot(workplace) == before
