import json
import os
import statistics

import pytest

from records.studies import result
from records.test_alpha_beta import make
from vkd.records.histories import MOST_BYTES, curves_of, read_history
from vkd.records.reading import Damaged


def write(folder, text):
    (folder / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_history_is_read_line_by_line_without_what_is_null(tmp_path):
    lines = [{"epoch": 1, "train/loss": 4.5, "val/top1": None}, {"epoch": 3, "train/loss": 2, "val/top1": 7.25}]
    write(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_history(tmp_path) == [
        {"epoch": 1.0, "train/loss": 4.5},
        {"epoch": 3.0, "train/loss": 2.0, "val/top1": 7.25},
    ]


def test_a_run_without_a_history_has_an_empty_one(tmp_path):
    assert read_history(tmp_path) == []
    assert read_history(tmp_path / "nowhere") == []
    assert read_history(write(tmp_path, "")) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"epoch": 1}\n{"epoch": 2, "train/l', "line 2 of metrics.jsonl is not whole JSON"),
        ("[1, 2]", "holds list, not a mapping"),
        ("3", "holds int, not a mapping"),
        ('{"train/loss": 1}', "lacks a whole-numbered epoch"),
        ('{"epoch": 0}', "lacks a whole-numbered epoch"),
        ('{"epoch": 1.5}', "lacks a whole-numbered epoch"),
        ('{"epoch": true}', "can be no figure"),
        ('{"epoch": 2}\n{"epoch": 2}', "is of epoch 2, which is not after"),
        ('{"epoch": 1, "a": NaN}', "no number of JSON"),
        ('{"epoch": 1, "a": 1e999}', "no number of JSON"),
        ('{"epoch": 1, "a": 1e300}', "can be no figure"),
        ('{"epoch": 1, "a": "b"}', "can be no figure"),
        ('{"epoch": 1, "a": {"b": 1}}', "can be no figure"),
        ('{"epoch": 1, "epoch": 2}', "twice"),
        ('{"epoch": 1, "a b\\u001b[2J": 1}', "no plain name"),
        ('{"epoch": 1' + "0" * 2_000 + "}", "digits"),
        ("[" * 60_000, "not whole JSON"),
        ('{"epoch": 1, "a": "' + "x" * 70_000 + '"}', "larger than 64 KiB"),
        (json.dumps({"epoch": 1, **{f"m{n}": 1 for n in range(501)}}), "too many values"),
        (b'{"epoch": 1, "\xff": 1}', "not whole JSON"),
        (b"\n" * (MOST_BYTES + 1), "larger than 16 MiB"),
    ],
)
def test_a_history_that_cannot_be_one_says_why(tmp_path, text, reason):
    with pytest.raises(Damaged, match=r".") as error:
        read_history(write(tmp_path, text))
    assert reason in str(error.value)
    assert "metrics.jsonl" in str(error.value)
    assert str(error.value).isprintable()


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(Damaged, match="no plain file"):
        read_history(tmp_path)
    with pytest.raises(Damaged):
        read_history(tmp_path / "a\0b")


def study():
    contents = [result("kd", "fkld", seed=seed) for seed in (1, 2, 3)]
    contents += [result("none", seed=seed) for seed in (1,)] + [result("kd", "rkld", seed=1)]
    histories = {
        "00000": [{"epoch": 1.0, "a": 1.0}, {"epoch": 2.0, "a": 4.0}, {"epoch": 4.0, "a": 5.5}],
        "00001": [{"epoch": 1.0, "a": 2.0}, {"epoch": 2.0, "b": 9.0}, {"epoch": 4.0, "a": 7.0}],
        "00002": [{"epoch": 1.0, "a": 4.5}, {"epoch": 3.0, "a": 6.0}],
        "00003": [{"epoch": 1.0, "a": 8.0}, {"epoch": 2.0, "a": 9.0}],
        "99999": [{"epoch": 1.0, "a": 1000.0}],
    }
    return make(contents), histories


def test_a_curve_is_the_mean_and_the_sample_standard_deviation_of_the_seeds_that_were_measured():
    table, histories = study()
    plain, kd = curves_of(table, 0, "a", histories)
    assert (plain.row.label, kd.row.label) == ("plain student", "kd fkld")
    by_epoch = {1: [1.0, 2.0, 4.5], 2: [4.0], 3: [6.0], 4: [5.5, 7.0]}
    assert kd.epochs == [1, 2, 3, 4]
    assert kd.n == [3, 1, 1, 2]
    assert kd.mean == pytest.approx([statistics.mean(by_epoch[epoch]) for epoch in kd.epochs])
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_epoch.values()]
    assert [high - mean for high, mean in zip(kd.high, kd.mean, strict=True)] == pytest.approx(spreads)
    assert [mean - low for low, mean in zip(kd.low, kd.mean, strict=True)] == pytest.approx(spreads)
    assert (plain.mean, plain.low, plain.high, plain.n) == ([8.0, 9.0], [8.0, 9.0], [8.0, 9.0], [1, 1])


def test_rows_that_do_not_state_a_metric_have_no_curve():
    table, histories = study()
    assert [curve.row.label for curve in curves_of(table, 0, "b", histories)] == ["kd fkld"]
    assert curves_of(table, 0, "c", histories) == []
    assert curves_of(table, 0, "a", {}) == []
