import csv
import io
import itertools
import statistics

import pytest

from records.studies import result
from vkd.records.grouping import build_table
from vkd.records.reading import Run
from vkd.records.tables import grid, holes, metric_title, notes, to_csv, to_markdown


def done(*contents):
    return [Run(f"quickstart/pair/{index:03}", "done", "", content) for index, content in enumerate(contents)]


def make(*contents, metric="test/top1", more=()):
    return build_table([*done(*contents), *more], study="quickstart", metric=metric, command="the command")


def seeds(method="kd", divergence="fkld", tops=(90.0, 91.0, 92.5), start=1, **settings):
    return [result(method, divergence, seed=start + i, top1=top, **settings) for i, top in enumerate(tops)]


def lines(table):
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def text(table):
    return "\n".join(notes(table))


def test_a_cell_holds_mean_spread_and_number_of_its_seeds():
    table = make(*seeds())
    assert grid(table)[1][-1][4].startswith("91.17 ± 1.26 (3)")
    (line,) = lines(table)
    assert float(line["mean"]) == pytest.approx(statistics.mean([90.0, 91.0, 92.5]), rel=1e-15)
    assert float(line["std"]) == pytest.approx(statistics.stdev([90.0, 91.0, 92.5]), rel=1e-12)
    assert (line["n"], line["seeds"], line["holes"]) == ("3", "1 2 3", "")


def test_differences_to_the_plain_student_and_to_kd_are_paired_by_seed():
    table = make(
        *seeds("none", None, (90.0, 91.0)), *seeds(tops=(91.0, 91.5)), *seeds("dkd", "abkd", (93.0, 92.0), point=(1, 0))
    )
    plain, kd, dkd = lines(table)
    assert (plain["method"], kd["method"], dkd["method"]) == ("none", "kd", "dkd")
    assert float(kd["difference_to_plain"]) == 0.75
    assert float(kd["difference_to_plain_std"]) == pytest.approx(statistics.stdev([1.0, 0.5]))
    assert (kd["difference_to_kd"], plain["difference_to_plain"]) == ("", "")
    assert float(dkd["difference_to_kd"]) == 1.25
    assert float(plain["difference_to_kd"]) == -0.75
    assert (dkd["difference_to_kd_pairs"], dkd["difference_to_plain_pairs"]) == ("2", "2")
    assert grid(table)[1][-1][5:] == ["+2.00 ± 1.41", "+1.25 ± 1.06"]


def test_where_seeds_do_not_coincide_the_difference_is_marked_as_one_of_means():
    table = make(*seeds("none", None, (90.0, 91.0), start=5), *seeds(tops=(91.0, 91.5)))
    assert grid(table)[1][-1][5] == "+0.75†"
    assert "`†`: difference of the two means" in text(table)


def test_one_and_one_point_zero_are_the_same_point():
    runs = [
        result("kd", "abkd", point=point, seed=seed, top1=90.0) for seed, point in enumerate([(1, 0), (1.0, 0.0)], 1)
    ]
    assert runs[0]["group"] == runs[1]["group"]
    (line,) = lines(make(*runs))
    assert (line["n"], line["alpha"], line["beta"], line["variant"]) == ("2", "1.0", "0.0", "")


def test_runs_with_another_recipe_are_never_averaged_and_the_variant_names_what_differs():
    table = make(*seeds(recipe={"epochs": 2}), *seeds(tops=(95.0,), recipe={"epochs": 20}))
    assert [(line["variant"], line["n"]) for line in lines(table)] == [
        ("recipe.epochs=2", "3"),
        ("recipe.epochs=20", "1"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: run["recipe"].update(lr=0.2),
        lambda run: run["recipe"].update(new=True),
        lambda run: run.update(precision="bf16"),
        lambda run: run.update(cross_entropy_weight=0.5),
        lambda run: run["method"]["kd"].update(weight=0.5),
        lambda run: run["divergence"].update(temperature=2),
        lambda run: run["dataset"].update(val_fraction=0),
        lambda run: run["dataset"].update(identity="other"),
        lambda run: run["teacher"].update(sha256="other"),
        lambda run: run.update(world_size=8),
        lambda run: run.update(group="0" * 64),
    ],
)
@pytest.mark.parametrize("same_group", [False, True])
def test_whatever_differs_but_the_seed_splits_the_row(change, same_group):
    a, b = result(seed=1, top1=80.0), result(seed=2, top1=90.0)
    change(b)
    if not same_group and b["group"] == a["group"]:
        b["group"] = "1" * 64
    found = lines(make(a, b))
    assert sorted(line["mean"] for line in found) == ["80.0", "90.0"]
    assert len({line["variant"] for line in found}) == 2


def test_settings_that_differ_between_columns_alone_make_no_variant():
    table = make(*seeds(recipe={"epochs": 2}), *seeds(dataset="cifar10", recipe={"epochs": 200}))
    assert "variant" not in grid(table)[0]
    assert len(table.rows) == 1


def test_another_temperature_is_another_row_and_compares_with_the_kd_of_its_own_recipe():
    cold = seeds(tops=(91.0, 91.0))
    for run in cold:
        run["divergence"]["temperature"] = 1
        run["group"] = "2" * 64
        run["fingerprint"] = f"cold {run['seed']}"
    warm = seeds(tops=(92.0, 92.0))
    other = seeds("kd", "rkld", (93.0, 93.0))
    table = make(*cold, *warm, *other)
    rows = {(line["divergence"], line["variant"]): line for line in lines(table)}
    assert rows.keys() == {("fkld", "divergence.temperature=1"), ("fkld", "divergence.temperature=4"), ("rkld", "")}
    assert float(rows["rkld", ""]["difference_to_kd"]) == 1.0


def test_there_is_no_difference_where_several_baselines_fit_equally_well():
    table = make(*seeds("none", None, recipe={"epochs": 2}), *seeds(), *seeds("dkd", "fkld"))
    kd = next(line for line in lines(table) if line["method"] == "kd")
    assert kd["difference_to_plain"] == ""
    assert "no difference to plain student: none has the same recipe.epochs" in text(table)
    both = [result(seed=seed, top1=90.0) for seed in (1, 2)]
    for weight, run in zip((0.5, 0.7), both, strict=True):
        run["method"]["kd"]["weight"] = weight
        run["group"] = f"{weight}"
    table = make(*both, result("dkd", "fkld"))
    assert lines(table)[-1]["difference_to_kd"] == ""
    assert "2 rows of it fit equally well" in text(table)


def test_plain_training_stands_in_every_column_of_its_data_and_student():
    table = make(
        *seeds("none", None, (90.0, 91.0)),
        *seeds(teacher="a", tops=(92.0, 92.0)),
        *seeds(teacher="b", tops=(93.0, 93.0)),
        *seeds("none", None, (50.0, 51.0), dataset="cifar10"),
    )
    header, body = grid(table)
    assert [column.title for column in table.columns] == [
        "cifar10: cifar_resnet8_width4",
        "digits: a -> cifar_resnet8_width4",
        "digits: b -> cifar_resnet8_width4",
    ]
    plain, kd = body[1:]
    assert [plain[index].split(" (")[0] for index in (4, 7, 10)] == ["50.50 ± 0.71", "90.50 ± 0.71", "90.50 ± 0.71"]
    assert [kd[index] for index in (5, 8, 11)] == ["-", "+1.50 ± 0.71", "+2.50 ± 0.71"]
    assert len(header) == len(plain) == 13


def test_the_teachers_accuracy_stands_on_top_and_what_it_saw_is_flagged():
    contents = seeds()
    table = make(*contents, metric="val/top1")
    assert grid(table)[1][0][:5] == ["teacher (val)", "", "", "", "99.20"]
    for content in contents:
        content["teacher"]["saw_val"] = "unknown"
    assert grid(make(*contents))[1][0][4] == "98.90 (saw val: unknown)"
    contents[1]["teacher"] = {**contents[1]["teacher"], "sha256": "other", "accuracy": {"val": 98.0, "test": 96.9}}
    assert grid(make(*contents))[1][0][5] == "97.90 ± 1.41 (saw val: unknown)"


def test_a_run_that_is_found_twice_is_counted_once():
    a, b = seeds(tops=(90.0, 92.0))
    table = make(a, b, a)
    assert lines(table)[0]["n"] == "2"
    assert "is the same run as" in text(table)
    twin = {**a, "fingerprint": "another"}
    table = make(a, b, twin)
    assert lines(table)[0]["mean"] == "91.0"
    assert "has the group and seed of" in text(table)


def test_runs_of_one_cell_from_different_machines_are_flagged():
    a, b = result(seed=1), result(seed=2, environment={"torch": "2.9.0"})
    table = make(a, b)
    assert "(2)‡" in grid(table)[1][-1][4]
    assert "`‡`: runs of one cell were made with different versions or hardware: kd fkld" in text(table)
    assert "Made with torch 2.9.0, timm 1.0.31, python 3.11.7, device cpu (2 threads), vkd 0.1.0: 1 run." in notes(
        table
    )


def hole(state="failed", reason="loss not finite", **settings):
    content = result(**settings)
    config = {name: content[name] for name in ("method", "divergence", "seed", "student", "recipe")}
    config |= {"dataset": {"name": content["dataset"]["name"]}, "teacher": {"arch": "cifar_resnet20", "seed": 0}}
    return Run(f"quickstart/pair/{state}-{settings.get('seed', 1)}", state, reason, config)


def test_a_failed_run_is_a_hole_with_its_reason_and_place():
    table = make(*seeds(tops=(90.0, 91.0)), more=[hole(seed=3)])
    assert "(2 of 3)" in grid(table)[1][-1][4]
    assert holes(table) == [
        "kd fkld, digits: cifar_resnet20 -> cifar_resnet8_width4, seed 3: failed: loss not finite "
        "(`quickstart/pair/failed-3`)"
    ]
    assert lines(table)[0]["holes"] == "seed 3: failed: loss not finite (`quickstart/pair/failed-3`)"


def test_a_row_of_holes_alone_is_shown():
    table = make(*seeds("none", None), more=[hole(seed=seed) for seed in (1, 2, 3)])
    assert grid(table)[1][-1] == ["kd", "fkld", "-", "-", "hole (0 of 3)", "-", "-"]


def test_a_hole_with_another_recipe_is_a_row_of_its_own():
    table = make(*seeds(), more=[hole(seed=4, recipe={"epochs": 2})])
    assert [row.variant for row in table.rows] == ["recipe.epochs=2", "recipe.epochs=20"]


def test_null_in_a_result_and_a_value_in_a_config_are_not_the_same():
    table = make(*seeds(recipe={"mixup": None}), more=[hole(seed=4, recipe={"mixup": 0.2})])
    assert [row.variant for row in table.rows] == ["recipe.mixup=0.2", "recipe.mixup=not set"]


def test_a_hole_that_may_belong_to_several_rows_is_listed_and_counted_in_none():
    bare = hole(seed=4)
    del bare.content["recipe"]
    table = make(*seeds(recipe={"epochs": 2}), *seeds(), more=[bare])
    assert [line["n"] for line in lines(table)] == ["3", "3"]
    assert [line["holes"] for line in lines(table)] == ["", ""]
    assert holes(table) == [
        "in no row: seed 4: failed: loss not finite (may belong to several rows) (`quickstart/pair/failed-4`)"
    ]


def test_a_hole_whose_seed_is_there_from_elsewhere_is_none():
    table = make(*seeds(), more=[hole(seed=2)])
    assert holes(table) == []
    assert "its seed is there from elsewhere: failed: loss not finite" in text(table)


def test_a_run_that_says_nothing_of_itself_is_listed():
    table = make(*seeds(), more=[Run("quickstart/pair/x", "damaged", "no config.yaml")])
    assert holes(table) == ["in no row: damaged: no config.yaml (`quickstart/pair/x`)"]


def test_a_done_run_without_the_metric_is_a_hole():
    table = make(*seeds(tops=(90.0, None, 92.0)))
    assert "(2 of 3)" in grid(table)[1][-1][4]
    assert "seed 2: done, but has no test/top1" in holes(table)[0]


def test_a_seed_that_half_of_the_rows_have_is_missed_elsewhere_but_one_rows_extra_seeds_are_not():
    table = make(*seeds("none", None, (1.0,) * 9), *seeds(), *seeds("kd", "rkld", (90.0, 91.0)), *seeds("dkd", "rkld"))
    assert [line["holes"] for line in lines(table)] == ["", "", "seed 3: missing: no such run", ""]


def test_a_row_without_runs_in_a_column_says_so():
    table = make(*seeds(), *seeds(dataset="cifar10"), *seeds("dkd", "rkld"))
    assert holes(table) == ["dkd rkld: no runs in cifar10: cifar_resnet20 -> cifar_resnet8_width4"]


def test_the_best_row_is_marked_by_val_whatever_test_says():
    table = make(*seeds(tops=(99.0, 99.0), val=80.0), *seeds("dkd", "fkld", (90.0, 90.0), val=81.0))
    assert [line["best_by_val"] for line in lines(table)] == ["0", "1"]
    assert grid(table)[1][-1][4] == "90.00 ± 0.00 (2)*"
    assert "best mean val/top1" in text(table)


def test_no_row_is_marked_where_validation_sets_differ_or_are_empty():
    other = seeds("dkd", "fkld", val=95.0)
    for run in other:
        run["dataset"]["val_fraction"] = 0.1
    assert {line["best_by_val"] for line in lines(make(*seeds(), *other))} == {"0"}
    assert "validation sets differ" in text(make(*seeds(), *other))
    assert {line["best_by_val"] for line in lines(make(*seeds(val=None)))} == {"0"}


def test_rows_are_ordered_plain_first_then_kd_then_the_rest_by_alpha_and_beta():
    contents = [
        *seeds("dkd", "fkld"),
        *seeds("at", None),
        *itertools.chain(*(seeds("kd", "abkd", point=point) for point in [(1, 0), (0.2, 10), (0.2, 9)])),
        *seeds("kd", "rkld"),
        *seeds(),
        *seeds("none", None),
    ]
    assert [line[:4] for line in grid(make(*contents))[1][1:]] == [
        ["plain student", "-", "-", "-"],
        ["kd", "fkld", "-", "-"],
        ["kd", "rkld", "-", "-"],
        ["kd", "abkd", "0.2", "9"],
        ["kd", "abkd", "0.2", "10"],
        ["kd", "abkd", "1", "0"],
        ["at", "-", "-", "-"],
        ["dkd", "fkld", "-", "-"],
    ]


def test_the_scale_of_alpha_beta_divergences_is_always_stated():
    contents = seeds("kd", "abkd", point=(1, 0))
    assert "divergence scale: not matched to KL's" in text(make(*contents))
    for content in contents:
        content["divergence"]["match_kl_scale"] = True
    assert "divergence scale: matched to KL's" in text(make(*contents))
    for content in contents:
        del content["divergence"]["match_kl_scale"]
    assert "divergence scale: not stated" in text(make(*contents))


def test_a_maximum_over_epochs_is_called_one():
    table = make(*seeds(), metric="test/top1_max_over_epochs")
    assert to_markdown(table).startswith("# quickstart: test top-1, maximum over epochs (%)\n\n    the command\n")
    assert "picks each run's epoch on test itself" in text(table)
    assert metric_title("test/ece") == "test ECE"
    assert grid(make(*seeds(), metric="test/ece"))[1][-1][4].startswith("0.0500 ± 0.0000 (3)")


def test_the_same_runs_in_another_order_give_the_same_bytes():
    runs = done(*seeds("none", None), *seeds(), *seeds("kd", "abkd", point=(1, 0)), *seeds(recipe={"epochs": 2}))
    tables = [
        build_table(order, study="q", metric="test/top1", command="c")
        for order in (runs, runs[::-1], runs[5:] + runs[:5])
    ]
    assert len({to_markdown(table) for table in tables}) == 1
    assert len({to_csv(table) for table in tables}) == 1


def test_every_line_of_the_markdown_table_is_aligned():
    content = seeds(student="a|b<script>")
    table = [line for line in to_markdown(make(*content, *seeds("dkd", None))).splitlines() if line.startswith("|")]
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert "a\\|b&lt;script>" in table[0]


def test_numbers_in_the_csv_are_not_rounded():
    (line,) = lines(make(*seeds(tops=(1 / 3,))))
    assert float(line["mean"]) == 1 / 3
    assert line["std"] == ""
