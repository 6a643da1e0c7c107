"""`python -m vkd.analyze` says where the gradients of recorded runs went, and draws it."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from commands import PAIR, TEACHERS, only_run, read, runs_in, snapshot, train
from records.studies import result

import vkd.models  # noqa: F401 - registers the networks
from vkd.analyze import HELP, AnalyzeConfig, main
from vkd.config import DatasetConfig
from vkd.data import load_data
from vkd.records.analysis_plots import draw_steps, draw_training
from vkd.records.grouping import build_table
from vkd.records.reading import Run

ARCH = "cifar_resnet8_width4"
EPOCHS = 2
FEW = ["dataset.train_fraction=0.2", "keep_checkpoint=false"]
GROUPS = ("target", "under", "over")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """A runs root with the study `spread`: plain, forward KL of two seeds, reverse KL, and a grid of two points."""
    root = tmp_path_factory.mktemp("analyze") / "runs"
    shutil.copytree(trained / "teachers", root / "teachers")
    usual = [*FEW, "study=spread", f"runs_root={root}", f"teacher.checkpoint={teacher_file(root)}", "snapshot_every=1"]
    for words in (
        ["method=none"],
        ["divergence=fkld"],
        ["divergence=fkld", "seed=2"],
        ["divergence=rkld"],
        ["divergence=abkd"],
        ["divergence=abkd", "divergence.alpha=0.5", "divergence.beta=0.5"],
    ):
        assert train(*usual, f"recipe.epochs={EPOCHS}", *words) == 0
    return root


@pytest.fixture
def mine(made, tmp_path, monkeypatch):
    """The same runs to change, below an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def refused(capsys):
    """A function that runs the command, sees that it refuses in one message and leaves no trace, and returns that."""

    def run(*words):
        before = snapshot(Path.cwd())
        capsys.readouterr()
        assert main(["device=cpu", *words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("vkd: ")
        assert "Traceback" not in said
        assert snapshot(Path.cwd()) == before
        return said

    return run


def run_of(root, divergence, seed=1, **point):
    """The directory of a run of the study."""
    for folder in runs_in(root / "spread"):
        content = read(folder / "result.json")
        found = content["divergence"] or {"name": "none"}
        if (found["name"], content["seed"]) == (divergence, seed) and point.items() <= found.items():
            return folder
    raise AssertionError(divergence)


def change(file, function):
    """Change the content of a JSON or YAML file of a run."""
    is_json = file.suffix == ".json"
    content = json.loads(file.read_text()) if is_json else yaml.safe_load(file.read_text())
    function(content)
    file.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))


def probabilities(run, file, split="val", temperature=1.0):
    """Probabilities [N, C] of the network in a file on a split, and labels [N]: through timm, in NumPy."""
    config = yaml.safe_load((run / "config.yaml").read_text())["dataset"]
    names = DatasetConfig.__annotations__
    data = load_data(DatasetConfig(**{k: v for k, v in config.items() if k in names}), "data", device="cpu", workers=0)
    model = timm.create_model(ARCH, num_classes=10, in_chans=1, checkpoint_path=str(file)).eval()
    logits, labels = [], []
    for batch in data.eval_batches(split, batch_size=100):
        pixels = (batch.images.float() / 255 - data.mean[0]) / data.std[0]
        with torch.no_grad():
            logits.append(model(pixels).double().numpy())
        labels += batch.targets.tolist()
    scaled = np.concatenate(logits) / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True), labels


def teacher_file(root):
    return only_run(root / TEACHERS) / "student.safetensors"


def plain_shares(p, q, labels, alpha, beta):
    """The shares of the gradient of an alpha-beta divergence, mean over images, in plain loops."""
    shares = {name: [] for name in GROUPS}
    for a, b, label in zip(p.tolist(), q.tolist(), labels, strict=True):
        weight = [
            y**beta * ((y**alpha - x**alpha) / alpha if alpha else math.log(y / x)) for x, y in zip(a, b, strict=True)
        ]
        size = [abs(w - y * sum(weight)) for w, y in zip(weight, b, strict=True)]
        parts = dict.fromkeys(GROUPS, 0.0)
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            parts["target" if k == label else "under" if y < x else "over"] += size[k] / sum(size)
        for name in GROUPS:
            shares[name].append(parts[name])
    return {name: statistics.fmean(values) for name, values in shares.items()}


# One run


@pytest.mark.parametrize(("divergence", "point"), [("fkld", (1, 0)), ("rkld", (0, 1)), ("abkd", (0.8, 0.3))])
def test_a_run_is_analysed_after_every_epoch_as_plain_loops_do(made, tmp_path, monkeypatch, capsys, divergence, point):
    monkeypatch.chdir(tmp_path)
    run = run_of(made, divergence, **({"alpha": 0.8} if divergence == "abkd" else {}))
    before = snapshot(made)
    assert main([f"run={run}", "output=found.json", "device=cpu"]) == 0
    assert snapshot(made) == before
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    found = read(Path("found.json"))
    assert (found["split"], found["images"], found["method"]) == ("val", 259, "kd")
    assert [entry["epoch"] for entry in found["epochs"]] == list(range(EPOCHS + 1))
    p, labels = probabilities(run, teacher_file(made), temperature=4.0)
    for entry in found["epochs"]:
        last = entry["epoch"] == EPOCHS
        name = "student.safetensors" if last else f"snapshots/epoch_{entry['epoch']:04d}.safetensors"
        q, _ = probabilities(run, run / name, temperature=4.0)
        expected = plain_shares(p, q, labels, *point)
        for group in GROUPS:
            share = entry["statistics"][f"share/{group}"]
            assert share["n"] == 259
            assert share["mean"] == pytest.approx(expected[group], rel=1e-4)
        assert 0.3 < entry["largest_ratio_to_bound"] <= 1 + 1e-9
    said = capsys.readouterr().out
    assert "n = 259 images of val" in said
    share = found["epochs"][-1]["statistics"]["share/target"]["mean"]
    (row, _) = [line.split() for line in said.splitlines() if line.startswith(f"    {EPOCHS}  ")]
    assert row[2] == f"{100 * share:.1f}"
    assert max(map(len, said.splitlines()[3:])) <= 80


def test_the_mass_of_a_student_stands_beside_its_teachers_in_the_teachers_order(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_of(made, "rkld")
    assert main([f"run={run}", "output=found.json", "device=cpu"]) == 0
    mass = read(Path("found.json"))["mass_by_rank"]
    p, _ = probabilities(run, teacher_file(made))
    q, _ = probabilities(run, run / "student.safetensors")
    order = np.argsort(-p, axis=1)
    assert mass["teacher"] == pytest.approx(np.take_along_axis(p, order, axis=1).mean(axis=0).tolist(), rel=1e-4)
    assert mass["student"] == pytest.approx(np.take_along_axis(q, order, axis=1).mean(axis=0).tolist(), rel=1e-4)
    assert mass["teacher"] == sorted(mass["teacher"], reverse=True)


def test_the_analysis_is_written_into_the_runs_directory_and_changes_nothing_else(mine):
    run = run_of(mine, "fkld")
    before = snapshot(mine)
    assert main([f"run={run}", "device=cpu"]) == 0
    after = snapshot(mine)
    assert after.keys() - before.keys() == {(run / "analysis.json").relative_to(mine).as_posix()}
    assert {name: after[name] for name in before} == before
    assert str(mine.parent) not in (run / "analysis.json").read_text()


def test_some_images_are_taken_evenly_from_the_whole_split(made, tmp_path, monkeypatch):
    from vkd.analyzing import Request, Workbench
    from vkd.records.reading import read_run

    monkeypatch.chdir(tmp_path)
    run = run_of(made, "fkld")
    scene = Workbench(Request(images=50, split="train")).scene(run, read_run(run))
    _, labels = probabilities(run, run / "student.safetensors", split="train")
    parts = np.array_split(np.arange(len(labels)), 3)
    places = [*parts[0][:20], *parts[1][:20], *parts[2][:10]]
    assert scene.images.targets.tolist() == [labels[place] for place in places]
    assert scene.teacher_logits.shape == (50, 10)
    assert main([f"run={run}", "images=50", "split=test", "output=found.json", "device=cpu"]) == 0
    found = read(Path("found.json"))
    assert (found["images"], found["split"]) == (50, "test")


def test_a_run_without_snapshots_is_its_last_student_and_says_so(mine, capsys):
    run = run_of(mine, "rkld")
    shutil.rmtree(run / "snapshots")
    assert main([f"run={run}", "device=cpu"]) == 0
    assert [entry["epoch"] for entry in read(run / "analysis.json")["epochs"]] == [EPOCHS]
    assert "there are no snapshots" in capsys.readouterr().out


def test_another_divergence_has_its_gradient_and_neither_hardness_nor_bound(mine, capsys):
    assert (
        train(*FEW, "study=other", "divergence=js", f"teacher.checkpoint={teacher_file(mine)}", f"runs_root={mine}")
        == 0
    )
    run = only_run(mine / "other")
    capsys.readouterr()
    assert main([f"run={run}", "device=cpu"]) == 0
    (entry,) = read(run / "analysis.json")["epochs"]
    assert entry["largest_ratio_to_bound"] is None
    assert not [name for name in entry["statistics"] if name.startswith(("hardness", "confidence", "bound"))]
    assert sum(entry["statistics"][f"share/{group}"]["mean"] for group in GROUPS) == pytest.approx(1)
    said = capsys.readouterr().out
    assert "js is no alpha-beta divergence" in said
    assert "hardness  " not in said


def test_another_method_has_its_divergence_applied_to_the_logits_as_they_are(mine, capsys, refused):
    assert (
        train(
            *FEW,
            "study=other",
            "method=dkd",
            "divergence=rkld",
            f"teacher.checkpoint={teacher_file(mine)}",
            f"runs_root={mine}",
        )
        == 0
    )
    run = only_run(mine / "other")
    capsys.readouterr()
    assert main([f"run={run}", "device=cpu"]) == 0
    assert "note: dkd applies rkld in its own way" in capsys.readouterr().out
    shutil.rmtree(mine / "other")
    assert train(*FEW, "study=other", "method=at", f"teacher.checkpoint={teacher_file(mine)}", f"runs_root={mine}") == 0
    said = refused(f"run={only_run(mine / 'other')}")
    assert "the method at" in said
    assert "kd" in said


def test_without_val_it_is_training_images_and_says_so(mine, capsys):
    words = [*FEW, "study=whole", "dataset.val_fraction=0", f"teacher.checkpoint={teacher_file(mine)}"]
    assert train(*words, f"runs_root={mine}") == 0
    run = only_run(mine / "whole")
    capsys.readouterr()
    assert main([f"run={run}", "device=cpu", "images=100"]) == 0
    assert read(run / "analysis.json")["split"] == "train"
    assert "note: there is no val split" in capsys.readouterr().out
    assert main([f"run={run}", "device=cpu", "split=val"]) == 2
    assert "split=val is not there" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "either run=DIRECTORY or study=NAME"),
        (["run=runs", "study=spread"], "either run=DIRECTORY or study=NAME"),
        (["runn=runs"], "run"),
        (["study=spread", "output=a.json"], "results_root"),
        (["study=spread", "images=0"], "images=1000"),
        (["study=spread", "images=many"], "whole number"),
        (["study=spread", "rate=0"], "rate=0.1"),
        (["study=spread", "rate=nan"], "rate=0.1"),
        (["study=spread", "split=tets"], "split=test"),
        (["study=spred"], "study=spread"),
        (["study=../runs"], "the name of a folder in runs_root"),
        (["study=spread", "device=abacus"], "device=auto"),
        (["run=runs/spread"], "no finished run"),
        (["run=nowhere"], "does not exist"),
        (["study=spread", "images=10000000000"], "pixels"),
    ],
)
def test_wrong_words_are_one_message_that_says_what_to_type(mine, refused, words, expected):
    assert expected in refused(*words)


def test_a_run_that_failed_or_has_no_teacher_is_refused(mine, refused):
    assert "learnt from the labels alone" in refused(f"run={run_of(mine, 'none')}")
    run = run_of(mine, "rkld")
    (run / "status.json").write_text(json.dumps({"state": "failed", "reason": "out of luck"}))
    assert "out of luck" in refused(f"run={run}")
    assert "output=FILE" in refused(f"run={run_of(mine, 'fkld')}", "output=nowhere/found.json")


@pytest.fixture
def before_any_work(monkeypatch):
    """Lets what comes before torch is imported pass, and no more."""

    def work():
        raise AssertionError("the work began")

    monkeypatch.setattr("vkd.analyze.import_training", work)


@pytest.fixture
def read_only(monkeypatch):
    """A function that has a folder not let itself be written to; chmod keeps nothing from root."""
    access = os.access

    def lock(folder):
        def ask(path, mode, **words):
            is_locked = bool(mode & os.W_OK) and Path(path).resolve() == folder.resolve()
            return not is_locked and access(path, mode, **words)

        monkeypatch.setattr(os, "access", ask)

    return lock


@pytest.mark.usefixtures("before_any_work")
def test_a_file_that_cannot_be_written_is_refused_before_any_work(mine, refused, read_only):
    run = run_of(mine, "fkld")
    Path("folder").mkdir()
    Path("file").write_text("kept")
    for output, why in (
        ("folder", "it is a folder"),
        ("nowhere/found.json", "there is no folder nowhere"),
        ("file/found.json", "file is a file"),
    ):
        said = refused(f"run={run}", f"output={output}")
        assert why in said
        assert "output=FILE" in said
    read_only(run)
    said = refused(f"run={run}")
    assert f"nothing can be written to {run}" in said
    assert "output=FILE" in said
    with pytest.raises(AssertionError, match="the work began"):
        main([f"run={run}", "output=found.json", "device=cpu"])


@pytest.mark.usefixtures("before_any_work")
def test_a_results_folder_that_cannot_be_made_or_written_to_is_refused_before_any_work(mine, refused, read_only):
    Path("file").write_text("kept")
    Path("kept").mkdir()
    Path("kept/spread").write_text("a file too")
    Path("locked").mkdir()
    read_only(Path("locked"))
    for root in ("file", "file/below", "kept", "locked", "locked/below"):
        said = refused("study=spread", f"results_root={root}")
        assert f"cannot write to {root}/spread" in said
        assert "results_root=FOLDER" in said
    with pytest.raises(AssertionError, match="the work began"):
        main(["study=spread", "results_root=new/results", "device=cpu"])


def test_a_teacher_that_has_gone_can_be_named_and_another_one_is_refused(mine, trained, refused, tmp_path):
    shutil.copytree(trained, tmp_path / "archive")
    run = only_run(tmp_path / "archive" / PAIR)
    assert main([f"run={run}", "device=cpu", "output=first.json"]) == 0
    teacher = teacher_file(tmp_path / "archive")
    shutil.copy(teacher, tmp_path / "kept.safetensors")
    shutil.rmtree(tmp_path / "archive" / "teachers")
    said = refused(f"run={run}")
    assert "the teacher's weights are not there" in said
    assert "teacher.checkpoint=FILE" in said
    shutil.copy(run / "student.safetensors", tmp_path / "other.safetensors")
    assert "not those that the run learnt from" in refused(f"run={run}", "teacher.checkpoint=other.safetensors")
    assert main([f"run={run}", "teacher.checkpoint=kept.safetensors", "device=cpu", "output=second.json"]) == 0
    assert read(Path("first.json")) == read(Path("second.json"))
    assert "the teacher's weights are not there" in refused("study=spread", "teacher.checkpoint=gone.safetensors")


def test_files_that_do_not_belong_together_are_refused(mine, refused):
    run = run_of(mine, "abkd", alpha=0.8)
    kept = (run / "config.yaml").read_text()
    change(run / "config.yaml", lambda content: content["divergence"].update(alpha=0.4))
    assert "config.yaml has divergence.alpha=0.4" in refused(f"run={run}")
    (run / "config.yaml").write_text(kept)
    shutil.copy(run_of(mine, "rkld") / "student.safetensors", run / "student.safetensors")
    assert "holds a student of another run" in refused(f"run={run}")


def test_a_config_from_elsewhere_fetches_nothing_and_resolves_nothing(mine, refused):
    run = run_of(mine, "rkld")
    kept = (run / "config.yaml").read_text()
    change(run / "config.yaml", lambda content: content.update(data_root="${oc.env:HOME}"))
    assert "which no run leaves there" in refused(f"run={run}")
    (run / "config.yaml").write_text(kept)
    for file in (run / "config.yaml", run / "result.json"):
        change(file, lambda content: content["dataset"].update(name="cifar10"))
    assert "fetch=true" in refused(f"run={run}")


def test_a_damaged_student_is_refused_in_a_run_and_left_out_of_a_study(mine, refused, capsys):
    run = run_of(mine, "fkld", seed=2)
    (run / "student.safetensors").write_bytes(b"nonsense")
    assert "damaged" in refused(f"run={run}")
    assert main(["study=spread", "images=60", "device=cpu"]) == 0
    assert f"{run.relative_to(mine)} is left out" in capsys.readouterr().out
    (grid,) = read(Path("results/spread/analysis.json"))["grids"]
    (row,) = [row for row in grid["rows"] if row["label"] == "kd fkld"]
    assert row["seeds"] == [1]
    assert row["runs"] == [read(run_of(mine, "fkld") / "result.json")["fingerprint"]]


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_the_help_has_every_key(capsys, word):
    assert main([word]) == 0
    page = capsys.readouterr().out
    assert page.strip() == HELP.strip()
    for name in AnalyzeConfig.__annotations__:
        assert f"  {name}" in page or f" {name}=" in page


# A study


@pytest.fixture(scope="module")
def analysed(made, tmp_path_factory):
    """The folder of the results of the study's analysis."""
    root = tmp_path_factory.mktemp("results")
    assert main(["study=spread", f"runs_root={made}", f"results_root={root}", "device=cpu"]) == 0
    return root / "spread"


def test_a_study_compares_forward_and_reverse_kl_with_the_point_that_val_chose(made, analysed):
    assert {path.name for path in analysed.iterdir()} == {
        "analysis.json", "analysis.md", "mass_step.png", "mass_step.svg", "mass_training.png", "mass_training.svg"
    }  # fmt: skip
    (grid,) = read(analysed / "analysis.json")["grids"]
    tops = {
        content["divergence"]["alpha"]: content["metrics"]["val/top1"]
        for folder in runs_in(made / "spread")
        if (content := read(folder / "result.json"))["method"] and content["divergence"]["name"] == "abkd"
    }
    best = max(sorted(tops), key=lambda alpha: tops[alpha])
    rows = {name: row for row in grid["rows"] for name in row["stands_for"]}
    assert set(rows) == {"FKLD", "RKLD", "AB"}
    assert rows["AB"]["divergence"]["alpha"] == best
    assert rows["FKLD"]["seeds"] == [1, 2]
    for row in grid["rows"]:
        epochs = [entry["epoch"] for entry in row["epochs"]]
        assert epochs == (list(range(EPOCHS + 1)) if row["stands_for"] else [EPOCHS])
    assert len(grid["rows"]) == 4


def test_where_val_chose_a_kullback_leibler_divergence_the_best_of_the_other_points_is_compared():
    from vkd.analyzing import families_of

    tops = {(1.0, 0.0): 80.0, (0.8, 0.3): 70.0, (0.5, 0.5): 75.0, (0.3, 0.3): 60.0}
    contents = [result("kd", "abkd", point=point, val=top, top1=100 - top) for point, top in tops.items()]
    contents.append(result("kd", "rkld"))
    runs = [Run(f"{place}", "done", "", content) for place, content in enumerate(contents)]
    (family,) = families_of(build_table(runs, study="s", metric="val/top1", command="c"))
    labels = {name: row.label for name, row in family.rows.items()}
    assert labels == {"FKLD": "kd abkd (1, 0)", "RKLD": "kd rkld", "AB": "kd abkd (0.5, 0.5)"}
    assert any("which is forward KL itself" in note for note in family.notes)
    (family,) = families_of(build_table(runs[1:], study="s", metric="val/top1", command="c"))
    assert {name: row.label for name, row in family.rows.items()} == {"RKLD": "kd rkld", "AB": "kd abkd (0.5, 0.5)"}
    assert family.notes == []


def test_seeds_are_averaged_and_their_number_is_stated(made, analysed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (grid,) = read(analysed / "analysis.json")["grids"]
    (row,) = [row for row in grid["rows"] if row["label"] == "kd fkld"]
    means, ratios, masses = [], [], []
    for seed in (1, 2):
        assert main([f"run={run_of(made, 'fkld', seed=seed)}", "output=found.json", "device=cpu"]) == 0
        found = read(Path("found.json"))
        means.append(found["epochs"][-1]["statistics"]["share/under"]["mean"])
        ratios.append(found["epochs"][-1]["largest_ratio_to_bound"])
        masses.append(found["mass_by_rank"]["student"])
    last = row["epochs"][-1]
    share = last["statistics"]["share/under"]
    assert share["mean"] == pytest.approx(statistics.fmean(means))
    assert share["std"] == pytest.approx(statistics.stdev(means))
    assert share["n"] == 2
    assert row["runs"] == [read(run_of(made, "fkld", seed=seed) / "result.json")["fingerprint"] for seed in (1, 2)]
    assert last["largest_ratio_to_bound"] == max(ratios)
    assert row["mass_by_rank"]["student"] == pytest.approx(np.mean(masses, axis=0).tolist())
    page = (analysed / "analysis.md").read_text()
    assert f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}" in page
    assert "259 images of val" in page
    assert str(made.parent) not in page + (analysed / "analysis.json").read_text()


def test_the_table_over_training_has_the_n_of_every_epoch(mine):
    for folder in runs_in(mine / "spread"):
        if not folder.name.startswith("kd-fkld"):
            shutil.rmtree(folder)
    (run_of(mine, "fkld", seed=2) / "snapshots" / "epoch_0001.safetensors").unlink()
    assert main(["study=spread", "images=60", "device=cpu"]) == 0
    page = Path("results/spread/analysis.md").read_text()
    heading, table = page.split("\nOver training, ")[1].split("\n\n")[:2]
    assert "n =" not in heading
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert header[:2] == ["epoch", "n"]
    assert [row[:2] for row in rows] == [["0", "2"], ["1", "1"], ["2", "2"]]
    assert ["±" in row[3] for row in rows] == [True, False, True]


def test_one_step_of_each_from_the_same_student_is_what_plain_loops_make_of_it(made, analysed):
    (grid,) = read(analysed / "analysis.json")["grids"]
    step = grid["step"]
    assert (step["from"], step["epoch"], step["seed"], step["images"]) == ("plain student", 1, 1, 259)
    run = run_of(made, "fkld")
    p, labels = probabilities(run, teacher_file(made), temperature=4.0)
    q, _ = probabilities(run, run_of(made, "none") / "snapshots" / "epoch_0001.safetensors", temperature=4.0)
    chosen = next(row["divergence"] for row in grid["rows"] if "AB" in row["stands_for"])
    points = {"FKLD": (1, 0), "RKLD": (0, 1), "AB": (chosen["alpha"], chosen["beta"])}
    order = np.argsort(-p, axis=1)
    lengths = []
    for name, (alpha, beta) in points.items():
        slope = (q**alpha - p**alpha) / alpha if alpha else np.log(q / p)
        weight = q**beta * slope
        gradient = (weight - q * weight.sum(axis=1, keepdims=True)) / 4
        rate = step["steps"][name]["rate"]
        lengths.append(rate * np.abs(gradient).sum(axis=1).mean())
        moved = q * np.exp(-rate * gradient / 4)
        ratio = np.log(moved / moved.sum(axis=1, keepdims=True) / q)
        ranked = np.take_along_axis(ratio, order, axis=1)
        found = step["steps"][name]["by_rank"]
        assert found["mean"] == pytest.approx(ranked.mean(axis=0).tolist(), rel=1e-3, abs=1e-6)
        assert found["low"] == pytest.approx(np.quantile(ranked, 0.25, axis=0).tolist(), rel=1e-3, abs=1e-6)
        assert found["high"] == pytest.approx(np.quantile(ranked, 0.75, axis=0).tolist(), rel=1e-3, abs=1e-6)
        label = np.eye(10, dtype=bool)[labels]
        for group, members in (("under", ~label & (q < p)), ("over", ~label & (q >= p))):
            bins = step["steps"][name][group]
            held = [(mass, value) for mass, value in zip(q[members], ratio[members], strict=True)]
            parts = np.array_split(sorted(held), min(12, len(held) // 50))
            assert bins["n"] == [len(part) for part in parts]
            assert bins["mean"] == pytest.approx([part[:, 1].mean() for part in parts], rel=2e-3, abs=1e-6)
            assert bins["q"] == pytest.approx([np.exp(np.log(part[:, 0]).mean()) for part in parts], rel=1e-3)
    assert step["steps"]["FKLD"]["rate"] == pytest.approx(0.1 * 16)
    assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-4)


def overlapping(figure):
    """Pairs of texts of the figure that cover each other."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts)]
    texts += [label for axis in figure.axes for label in axis.get_xticklabels() + axis.get_yticklabels()]
    texts += [text for legend in figure.legends for text in legend.get_texts()] + figure.texts
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    return [(a[0], b[0]) for index, a in enumerate(boxes) for b in boxes[:index] if a[1].overlaps(b[1])]


def lines_of(axis):
    """What is drawn in a panel: the values of each line by its colour."""
    return {line.get_color(): line.get_ydata() for line in axis.lines if len(line.get_xdata()) > 2}


def test_the_plots_show_the_figures_of_the_analysis_and_no_text_covers_another(analysed):
    found = read(analysed / "analysis.json")
    (grid,) = found["grids"]
    colours = {"FKLD": "#0072B2", "RKLD": "#D55E00", "AB": "#009E73"}
    rows = {name: row for row in grid["rows"] for name in row["stands_for"]}
    steps = draw_steps(found)
    for name, colour in colours.items():
        entry = grid["step"]["steps"][name]
        assert lines_of(steps.axes[0])[colour].tolist() == entry["by_rank"]["mean"]
        assert lines_of(steps.axes[2])[colour].tolist() == entry["over"]["mean"]
    training = draw_training(found)
    for axis, group in zip(training.axes, GROUPS, strict=False):
        for name, colour in colours.items():
            shares = [100 * entry["statistics"][f"share/{group}"]["mean"] for entry in rows[name]["epochs"]]
            assert lines_of(axis)[colour].tolist() == shares
            assert axis.get_ylabel() == "share of the L1 norm (%)"
    assert lines_of(training.axes[3])["#000000"].tolist() == rows["FKLD"]["mass_by_rank"]["teacher"]
    for figure in (steps, training):
        assert overlapping(figure) == []
        words = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert any("259 images of val" in text for text in words)
    double = {**found, "grids": [grid] * 6}
    for figure in (draw_steps(double), draw_training(double)):
        assert overlapping(figure) == []
        assert figure.texts[0].get_text().startswith("the first 4 of 6 grids")


def test_a_study_of_forward_kl_alone_is_analysed_without_a_point_and_one_of_nothing_is_refused(mine, refused, capsys):
    for folder in runs_in(mine / "spread"):
        if not folder.name.startswith("kd-fkld-s1"):
            shutil.rmtree(folder)
    assert main(["study=spread", "images=60", "device=cpu"]) == 0
    (grid,) = read(Path("results/spread/analysis.json"))["grids"]
    assert [row["stands_for"] for row in grid["rows"]] == [["FKLD"]]
    assert set(grid["step"]["steps"]) == {"FKLD", "RKLD"}
    assert grid["step"]["from"] == "kd fkld"
    shutil.rmtree(mine / "spread")
    assert train(*FEW, "study=spread", "method=none", f"runs_root={mine}") == 0
    assert "no finished run of fkld, rkld or abkd" in refused("study=spread")
