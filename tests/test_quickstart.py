"""The quickstart study, shortened: one command trains it, one collects it."""

import csv
import json

import pytest
import torch

import vkd.collect
import vkd.train


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study's folder of runs and of results, from one sweep of one epoch."""
    root = tmp_path_factory.mktemp("quickstart")
    # Networks this small gain nothing from a second thread, and wait for it when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    roots = [f"runs_root={root / 'runs'}", f"results_root={root / 'results'}"]
    short = ["recipe.epochs=1", "teacher.recipe.epochs=3", "tracker=none", "device=cpu"]
    assert vkd.train.main(["+experiment=quickstart", *roots, *short]) == 0
    assert vkd.collect.main(["study=quickstart", *roots]) == 0
    torch.set_num_threads(threads)
    return root


def test_eighteen_combinations_are_twelve_students_of_one_teacher(study):
    results = [json.loads(path.read_text()) for path in study.glob("runs/quickstart/**/result.json")]
    assert len(results) == 12
    assert len({result["fingerprint"] for result in results}) == 12
    assert len({result["group"] for result in results}) == 4
    taught = [result["teacher"]["sha256"] for result in results if result["teacher"]]
    assert len(taught) == 9
    assert len(set(taught)) == 1
    assert len(list(study.glob("runs/teachers/**/result.json"))) == 1


def test_the_table_has_a_row_a_method_and_divergence_with_three_seeds_each(study):
    with (study / "results/quickstart/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["divergence"], row["n"]) for row in rows] == [
        ("none", "", "3"),
        ("kd", "fkld", "3"),
        ("kd", "rkld", "3"),
        ("kd", "abkd", "3"),
    ]
    for row in rows:
        values = [
            result["metrics"]["test/top1"]
            for result in (json.loads(path.read_text()) for path in study.glob("runs/quickstart/**/result.json"))
            if (list(result["method"]) or ["none"]) == [row["method"]]
            and (result["divergence"] or {"name": ""})["name"] == row["divergence"]
        ]
        assert float(row["mean"]) == pytest.approx(sum(values) / 3, abs=1e-9)


def test_the_same_command_again_trains_nothing(study, capsys):
    before = {path: path.stat().st_mtime_ns for path in study.glob("runs/quickstart/**/*.json")}
    short = ["recipe.epochs=1", "teacher.recipe.epochs=3", "tracker=none", "device=cpu"]
    assert vkd.train.main(["+experiment=quickstart", f"runs_root={study / 'runs'}", *short]) == 0
    assert {path: path.stat().st_mtime_ns for path in study.glob("runs/quickstart/**/*.json")} == before
    assert capsys.readouterr().out.count("already done") == 18
