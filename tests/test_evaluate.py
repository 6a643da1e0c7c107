"""`python -m vkd.evaluate` measures what training measured, on whatever data, wherever the run has gone."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PAIR, PLAIN, TEACHERS, only_run, read, snapshot, train

import vkd.training.assessment
from vkd.evaluate import evaluate, main
from vkd.models import create_model, save_weights
from vkd.training.measurement import FIGURES

ARCH = "cifar_resnet8_width4"


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as the runs were trained with, so that the figures can be the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """The trained runs in another place, which is not where the commands run."""
    root = tmp_path / "elsewhere" / "archive"
    shutil.copytree(trained, root)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def recorded(run):
    """The recorded figures of val and test."""
    metrics = read(run / "result.json")["metrics"]
    return {f"{split}/{name}": metrics[f"{split}/{name}"] for split in ("val", "test") for name in FIGURES}


def test_a_run_is_measured_as_it_was_recorded_to_the_last_bit(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = only_run(trained / PAIR)
    before = snapshot(trained)
    report = evaluate([f"run={run}", "device=cpu"])
    assert report["metrics"] == recorded(run)
    assert None not in report["metrics"].values()
    assert report["images"] == {"val": 259, "test": 500}
    assert (report["arch"], report["dataset"]) == (ARCH, "digits")
    assert snapshot(trained) == before
    assert not list(tmp_path.iterdir())


def test_a_run_and_its_teacher_may_have_been_moved(moved):
    run = only_run(moved / PAIR)
    assert evaluate([f"run={run}", "device=cpu"])["metrics"] == recorded(run)


def test_without_its_teacher_a_run_is_measured_without_agreement_and_says_so(moved, capsys):
    shutil.rmtree(moved / TEACHERS)
    run = only_run(moved / PAIR)
    assert main([f"run={run}", "device=cpu", "output=figures.json"]) == 0
    said = capsys.readouterr().out
    assert "warning: the run's teacher is no longer there" in said
    assert re.search(r"^agreement +- +-$", said, re.MULTILINE)
    found, expected = read(Path("figures.json"))["metrics"], recorded(run)
    for name, value in expected.items():
        assert found[name] == (None if name.endswith(("agreement", "teacher_kl")) else value)
    assert not (moved / TEACHERS).exists()


def test_a_plain_run_is_measured_without_a_teacher_and_without_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("method=none", "recipe.ema_decay=0.9", "evaluation_batch_size=37") == 0
    run = only_run(tmp_path / "runs" / PLAIN)
    capsys.readouterr()
    assert evaluate([f"run={run.relative_to(tmp_path)}", "device=cpu"])["metrics"] == recorded(run)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("words", "expected"), [([], 37), (["evaluation_batch_size=50"], 50)])
def test_images_are_measured_in_the_batches_of_the_run_unless_others_are_asked_for(moved, monkeypatch, words, expected):
    run = only_run(moved / PAIR)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("evaluation_batch_size: 250", "evaluation_batch_size: 37"))
    seen = []

    class Noting(vkd.training.assessment.Evaluator):
        def __init__(self, *arguments, batch_size, **options):
            seen.append(batch_size)
            super().__init__(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(vkd.training.assessment, "Evaluator", Noting)
    evaluate([f"run={run}", "device=cpu", "split=val", *words])
    assert seen == [expected]


@pytest.mark.parametrize("split", ["val", "test"])
def test_one_split_can_be_asked_for(trained, tmp_path, monkeypatch, capsys, split):
    monkeypatch.chdir(tmp_path)
    run = only_run(trained / PAIR)
    assert main([f"run={run}", "device=cpu", f"split={split}", "output=figures.json"]) == 0
    figures = read(Path("figures.json"))
    expected = {name: value for name, value in recorded(run).items() if name.startswith(split)}
    assert figures["metrics"] == expected
    assert list(figures["images"]) == [split]
    said = capsys.readouterr().out
    assert f"{expected[f'{split}/top1']:.2f}" in said
    assert f"{expected[f'{split}/nll']:.4f}" in said


def test_the_batch_size_of_evaluation_changes_rounding_at_most(trained):
    run = only_run(trained / PAIR)
    found = evaluate([f"run={run}", "device=cpu", "evaluation_batch_size=7"])["metrics"]
    assert found == pytest.approx(recorded(run), rel=1e-5)


def test_a_network_that_always_says_three_has_the_share_of_threes_as_its_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = create_model(ARCH, num_classes=7, in_channels=3, image_size=(6, 5), seed=0)
    with torch.no_grad():
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.tensor([0.0, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0]))
    save_weights(model, tmp_path / "three.safetensors", {})
    labels = {"train": np.arange(70) % 7, "test": np.array([3] * 12 + [0, 1, 2, 4, 5, 6, 0, 1])}
    random = np.random.RandomState(0)
    (tmp_path / "packs" / "mine").mkdir(parents=True)
    for split, values in labels.items():
        np.savez(
            tmp_path / "packs" / "mine" / f"{split}.npz",
            images=random.randint(0, 256, (len(values), 6, 5, 3), dtype=np.uint8),
            labels=values.astype(np.int64),
            class_names=np.array(list("abcdefg")),
        )
    words = [f"arch={ARCH}", "checkpoint=three.safetensors", "dataset.name=mine", "data_root=packs"]
    words += ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[1,1,1]", "device=cpu", "split=test", "output=out.json"]
    before = snapshot(tmp_path)
    assert main(words) == 0
    after = snapshot(tmp_path)
    assert after.keys() - before.keys() == {"out.json"}
    metrics = json.loads(after["out.json"])["metrics"]
    assert metrics["test/top1"] == 60.0
    confidence = 1 / (1 + 6 * np.exp(-20))
    assert metrics["test/ece"] == pytest.approx(confidence - 0.6, abs=1e-6)
    assert metrics["test/nll"] == pytest.approx(0.4 * 20 - np.log(confidence), rel=1e-5)
    assert metrics["test/agreement"] is None
    assert re.search(r"^images +20$", capsys.readouterr().out, re.MULTILINE)


def test_a_run_can_be_measured_on_other_data_than_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("method=none", "recipe.epochs=8") == 0
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.rint(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    (tmp_path / "packs" / "shifted").mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(
            tmp_path / "packs" / "shifted" / f"{split}.npz",
            images=images,
            labels=(scans.target + 1).astype(np.int64) % 10,
            class_names=np.array([str(digit) for digit in range(10)]),
        )
    run = only_run(tmp_path / "runs" / PLAIN)
    report = evaluate([f"run={run}", "dataset.name=shifted", "data_root=packs", "split=test", "device=cpu"])
    assert report["images"] == {"test": 1797}
    assert recorded(run)["test/top1"] > 60 > 30 > report["metrics"]["test/top1"]


def test_help_is_a_page_and_no_error(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for key in ("run=", "arch=", "checkpoint=", "split=", "output=", "fetch=", "device=", "python -m vkd.evaluate"):
        assert key in page
