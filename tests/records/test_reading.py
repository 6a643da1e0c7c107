import json
import os
import shutil
import time

import pytest

from records.studies import result, write_run
from vkd.records.reading import MOST_BYTES, clean, read_run, read_runs


def states(root):
    return {run.path.rpartition("/")[2]: (run.state, run.reason) for run in read_runs(root)}


def test_a_done_run_is_read_whole(tmp_path):
    write_run(tmp_path, result("dkd+kd", "abkd", point=(1, 0.3), seed=7, top1=94.25))
    (run,) = read_runs(tmp_path / "quickstart", relative_to=tmp_path)
    assert run.done
    assert run.identified
    assert (run.dataset, run.teacher, run.student) == ("digits", "cifar_resnet20", "cifar_resnet8_width4")
    assert (run.method, run.divergence, run.alpha, run.beta, run.seed) == ("kd+dkd", "abkd", 1.0, 0.3, 7)
    assert run.metric("test/top1") == 94.25
    assert run.teacher_accuracy("test") == 98.9
    assert run.path.startswith("quickstart/cifar_resnet20-cifar_resnet8_width4/dkd+kd-abkd-s7-")


@pytest.mark.parametrize("method", ["none", "null", "{}", "{none: {}}"])
def test_plain_training_has_no_teacher_and_no_divergence_even_where_its_config_names_them(tmp_path, method):
    content = result("none")
    folder = write_run(tmp_path, content, {"state": "failed", "reason": "x"})
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("arch: null", "arch: big").replace("method: {}", f"method: {method}"))
    (run,) = read_runs(tmp_path / "quickstart")
    assert (run.method, run.teacher, run.divergence, run.plain) == ("none", "", "", True)
    assert not [name for name in run.parameters if name.startswith(("teacher", "divergence", "method"))]


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ({"state": "failed", "reason": "loss\n not  finite"}, "failed", "loss not finite"),
        ({"state": "failed", "reason": "", "traceback": "Traceback\nValueError: no"}, "failed", "ValueError: no"),
        ({"state": "failed"}, "failed", "no reason given"),
        ({"state": "interrupted", "epoch": 3, "epochs": 20}, "interrupted", "epoch 3 of 20"),
        (
            {"state": "running", "epoch": 3, "epochs": 20, "updated": "2026-01-01T00:00:00"},
            "running",
            "epoch 3 of 20, last heard of 2026-01-01T00:00:00",
        ),
        ({"state": "done"}, "damaged", "status.json says done, but there is no result.json"),
        ({"state": ["?"]}, "damaged", "status.json has the unknown state ['?']"),
    ],
)
def test_a_run_that_is_not_done_says_why(tmp_path, status, state, reason):
    folder = write_run(tmp_path, result(seed=3), status)
    run = read_run(folder)
    assert (run.state, run.reason) == (state, reason)
    assert run.identified
    assert run.seed == 3


def test_a_result_of_a_run_that_was_started_again_does_not_count(tmp_path):
    folder = write_run(tmp_path, result())
    (folder / "status.json").write_text(json.dumps({"state": "running", "epoch": 1, "epochs": 20}))
    assert read_run(folder).state == "running"


def test_a_copied_result_without_status_counts(tmp_path):
    folder = write_run(tmp_path, result())
    (folder / "status.json").unlink()
    (folder / "config.yaml").unlink()
    assert read_run(folder).done


def test_a_run_with_a_config_alone_is_unfinished(tmp_path):
    folder = write_run(tmp_path, result())
    (folder / "status.json").unlink()
    (folder / "result.json").unlink()
    assert (read_run(folder).state, read_run(folder).reason) == ("unfinished", "no result.json")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"format": 1, "finger', "result.json is not whole JSON"),
        (b"", "result.json is not whole JSON"),
        (b"\xff\xfe\x00", "result.json is not whole JSON"),
        (b"[" * 100_000, "result.json is not whole JSON"),
        (b"[1]", "result.json holds list, not a mapping"),
        (b'{"format": 2}', "result.json has format 2; this version of vkd reads format 1"),
        (b'{"format": 1}', "result.json lacks fingerprint"),
        (b" " * (MOST_BYTES + 1), "result.json is larger than 4 MiB"),
    ],
)
def test_a_damaged_result_is_a_hole_that_its_config_still_labels(tmp_path, data, reason):
    folder = write_run(tmp_path, result(seed=2))
    (folder / "result.json").write_bytes(data)
    run = read_run(folder)
    assert run.state == "damaged"
    assert run.reason.startswith(reason)
    assert (run.dataset, run.method, run.seed) == ("digits", "kd", 2)


@pytest.mark.parametrize("missing", ["fingerprint", "group", "metrics", "dataset", "student", "method", "seed"])
def test_a_result_without_what_a_table_stands_on_is_damaged(tmp_path, missing):
    content = result()
    folder = write_run(tmp_path, content)
    del content[missing]
    (folder / "result.json").write_text(json.dumps(content))
    run = read_run(folder)
    assert run.state == "damaged"
    assert missing in run.reason


def test_a_yaml_tag_that_would_run_code_runs_nothing(tmp_path):
    folder = write_run(tmp_path, result(), {"state": "failed", "reason": "x"})
    trap = tmp_path / "trap"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        (folder / "config.yaml").write_text(f"seed: {tag} ['{trap}']\n")
        run = read_run(folder)
        assert (run.state, run.identified) == ("failed", False)
        assert "config.yaml is not plain YAML" in run.reason
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2",
        "- 1\n",
        "",
        "\x00",
        "a: 2026-99-99",
        "? [1, 2]\n: {}\n? {}\n: 1",
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 8)}]}}\n" for i in range(1, 12)),
        "a: &a [*a]",
        "[" * 5000,
    ],
)
def test_a_config_that_is_no_reasonable_yaml_is_told_fast(tmp_path, text):
    folder = write_run(tmp_path, result(), {"state": "failed", "reason": "x"})
    (folder / "config.yaml").write_text(text)
    start = time.process_time()
    run = read_run(folder)
    assert time.process_time() - start < 2
    assert run.state == "failed"
    assert "config.yaml" in run.reason
    assert not run.identified


def test_things_that_are_no_plain_files_are_not_waited_for(tmp_path):
    folder = write_run(tmp_path, result())
    (folder / "result.json").unlink()
    os.mkfifo(folder / "result.json")
    assert read_run(folder).reason == "result.json is no plain file"


def test_hidden_folders_are_skipped_and_empty_run_folders_are_not(tmp_path):
    folder = write_run(tmp_path, result())
    study = tmp_path / "quickstart"
    shutil.copytree(folder, study / ".trash" / folder.name)
    shutil.copytree(folder, folder.parent / ".copy")
    (study / "pair" / "kd-fkld-s1-0123abcd").mkdir(parents=True)
    (study / "pair" / "notes").mkdir()
    found = states(study)
    assert found.keys() == {folder.name, "kd-fkld-s1-0123abcd"}
    assert found["kd-fkld-s1-0123abcd"] == ("unfinished", "no result.json; no config.yaml")


def test_runs_come_in_the_order_of_their_paths(tmp_path):
    for seed in (3, 1, 2):
        write_run(tmp_path, result(seed=seed), name=f"kd-fkld-s{seed}-00000000")
    assert [run.seed for run in read_runs(tmp_path / "quickstart")] == [1, 2, 3]


def test_a_folder_that_is_not_there_has_no_runs(tmp_path):
    assert list(read_runs(tmp_path / "nothing")) == []


@pytest.mark.parametrize("value", [None, True, "94", [94], float("nan"), 10**400])
def test_a_metric_that_is_no_finite_number_is_none(tmp_path, value):
    content = result()
    content["metrics"]["test/top1"] = value
    assert read_run(write_run(tmp_path, content)).metric("test/top1") is None


def test_settings_compare_as_numbers_but_true_is_not_one(tmp_path):
    def parameters(**recipe):
        shutil.rmtree(tmp_path / "quickstart", ignore_errors=True)
        return read_run(write_run(tmp_path, result(recipe=recipe))).parameters

    assert parameters(lr=1) == parameters(lr=1.0)
    assert parameters(lr="5e-4") == parameters(lr=0.0005)
    assert parameters(lr=True) != parameters(lr=1)
    assert parameters(steps=[1, 2]) == parameters(steps=[1.0, 2.0])
    assert parameters(workers=2, compile=True) == parameters(workers=8, compile=False)


def test_text_of_a_run_cannot_steer_a_terminal():
    assert clean("a\x1b[31mred\nb\u202e") == "a [31mred b"
    assert len(clean("x" * 1000)) == 300


def test_ten_thousand_runs_would_be_read_in_a_minute(tmp_path):
    for seed in range(200):
        write_run(tmp_path, result(seed=seed), {"state": "failed"} if seed % 2 else None)
    start = time.process_time()
    assert len(list(read_runs(tmp_path))) == 200
    assert time.process_time() - start < 60 / 50
