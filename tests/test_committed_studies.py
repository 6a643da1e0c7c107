"""Every figure of a committed table, computed again from the committed records of its runs, in plain Python."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from scipy import stats

RESULTS = Path(__file__).parent.parent / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/runs.jsonl"))


def key(record):
    """What the table has a row for: method, divergence, alpha, beta and whether validation images were kept."""
    method, divergence = "+".join(record["method"]) or "none", record["divergence"] or {}
    name = "" if method == "none" else divergence["name"]
    return method, name, divergence.get("alpha"), divergence.get("beta"), record["dataset"]["val_fraction"]


def as_number(text):
    return float(text) if text else None


def of_line(line, records):
    """The key of a line of table.csv, whose variant says val_fraction where rows differ in it."""
    found = re.search(r"dataset.val_fraction=(\S+?)(?:,|$)", line["variant"])
    fractions = {record["dataset"]["val_fraction"] for record in records}
    fraction = float(found[1]) if found else fractions.pop()
    return line["method"], line["divergence"], as_number(line["alpha"]), as_number(line["beta"]), fraction


def sign_flips(differences):
    """The two-sided p-value over all ways to turn the signs."""
    seen = abs(sum(differences))
    totals = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= seen - 1e-9 for total in totals) / len(totals)


def differences(own, other):
    """Seed by seed; None where there is nothing to compare with, or this is the row itself."""
    return None if other is None or own is other else [own[seed] - other[seed] for seed in sorted(own)]


@pytest.fixture(params=STUDIES)
def study(request):
    """A committed study: its lines of table.csv and its records by row and seed."""
    folder = RESULTS / request.param
    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = {}
    for record in records:
        rows.setdefault(key(record), {})[record["seed"]] = record["metrics"]
    return folder, records, lines, rows


def test_there_is_a_study_with_its_records():
    assert "alpha_beta" in STUDIES


def test_every_figure_of_the_table_follows_from_the_records_of_its_runs(study):
    _, records, lines, rows = study
    assert {of_line(line, records) for line in lines} == set(rows)
    fractions = {row[-1] for row in rows}
    top1 = {row: {seed: metrics["test/top1"] for seed, metrics in seeds.items()} for row, seeds in rows.items()}
    for line in lines:
        row = of_line(line, records)
        own = top1[row]
        assert float(line["mean"]) == pytest.approx(statistics.mean(own.values()), abs=1e-9)
        assert float(line["std"]) == pytest.approx(statistics.stdev(own.values()), abs=1e-9)
        assert int(line["n"]) == len(own)
        most = statistics.mean(metrics["test/top1_max_over_epochs"] for metrics in rows[row].values())
        assert float(line["test_top1_max_over_epochs"]) == pytest.approx(most, abs=1e-9)
        assert row[-1] in fractions
        for name, wanted in (("plain", ("none", "", None, None)), ("kd", ("kd", "fkld", None, None))):
            pairs = differences(own, top1.get((*wanted, row[-1])))
            if pairs is None:
                assert line[f"difference_to_{name}"] == ""
                continue
            mean, spread = statistics.mean(pairs), statistics.stdev(pairs)
            half = stats.t.ppf(0.975, len(pairs) - 1) * spread / len(pairs) ** 0.5
            assert float(line[f"difference_to_{name}"]) == pytest.approx(mean, abs=1e-9)
            assert float(line[f"difference_to_{name}_low"]) == pytest.approx(mean - half, abs=1e-9)
            assert float(line[f"difference_to_{name}_high"]) == pytest.approx(mean + half, abs=1e-9)
            assert float(line[f"difference_to_{name}_p"]) == pytest.approx(sign_flips(pairs), abs=1e-9)


def test_the_mean_in_every_form_of_the_table_is_the_one_of_the_records(study):
    folder, _, _, rows = study
    printed = (folder / "table.md").read_text()
    for seeds in rows.values():
        values = [metrics["test/top1"] for metrics in seeds.values()]
        text = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"
        assert text in printed
        assert text.split(" (")[0] in (folder / "report.html").read_text()


def test_validation_chose_the_point_and_the_note_says_what_test_would_have_gained(study):
    folder, records, lines, rows = study
    grid = {row: seeds for row, seeds in rows.items() if row[1] == "abkd" and row[-1] > 0}
    if not grid:
        pytest.skip("no grid")
    means = {
        split: {row: statistics.mean(one[f"{split}/top1"] for one in seeds.values()) for row, seeds in grid.items()}
        for split in ("val", "test")
    }
    chosen = max(means["val"], key=means["val"].get)
    gain = max(means["test"].values()) - means["test"][chosen]
    (note,) = (line for line in (folder / "table.md").read_text().splitlines() if "was chosen from" in line)
    assert f"({chosen[2]:g}, {chosen[3]:g})" in note
    assert f"from {len(grid)} points" in note
    assert f"selecting on test would have gained {gain:+.2f}" in note
    for line in lines:
        if (row := of_line(line, records)) in grid:
            assert float(line["val_top1"]) == pytest.approx(means["val"][row], abs=1e-9)
            assert line["chosen_from_grid"] == str(int(row == chosen))
    assert len({record["teacher"]["sha256"] for record in records if record["teacher"]}) == 1


def test_nothing_of_the_machine_is_in_the_committed_records(study):
    folder, *_ = study
    for path in folder.iterdir():
        if path.suffix in (".jsonl", ".md", ".html", ".json", ".csv", ".tex", ".svg"):
            text = path.read_text()
            assert not re.search(r"(?<![\w./])/(work|tmp|root|home)/", text), path.name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_the_committed_table(study, tmp_path):
    folder, *_ = study
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        + (folder / "table.tex").read_text()
        + "\\end{document}\n"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
